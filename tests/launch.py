"""Training in processes of its own, started as users start it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest


ROOT = Path(__file__).resolve().parent.parent
# DeepSpeed decorates functions for torch.compile when it starts, which imports torch's compiler: seconds, for nothing.
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1"}


def launcher(config: str, *options: object, num_processes: int = 2, port: int = 0) -> list[str]:
    """The command before a script: `accelerate launch` with one of the recipes' configurations."""
    if config.startswith(("zero", "multi")) and shutil.which("c++") is None:
        pytest.skip("DeepSpeed compiles a part of itself when it first runs, and there is no C++ compiler (c++)")
    return [
        str(Path(sys.executable).with_name("accelerate")),
        "launch",
        *("--config_file", str(ROOT / "recipes" / "accelerate" / config)),
        *("--num_processes", str(num_processes)),
        *("--main_process_port", str(port)),  # 0: any that is free
        *map(str, options),
    ]


def write_settings(folder: Path, name: str, **settings: Any) -> list[str]:
    """The command of `run_canned.py` with these settings; what it leaves behind is in the folder `name`."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"output_dir": str(folder / name), **settings}))
    return [str(Path(__file__).with_name("run_canned.py")), str(file)]


def run_canned(
    folder: Path, name: str, launcher: Sequence[str] = (sys.executable,), **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run `run_canned.py` to its end."""
    return subprocess.run(
        [*launcher, *write_settings(folder, name, **settings)],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
        cwd=ROOT,  # DeepSpeed's own files are named relative to it
        env=ENVIRONMENT,
    )


def ran_on(folder: Path, rank: int = 0) -> dict[str, Any]:
    """What a process of `run_canned.py` has left behind."""
    content: dict[str, Any] = json.loads((folder / f"rank-{rank}.json").read_text())
    return content
