"""Training in processes of their own."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def two_process_launcher(folder: Path) -> list[str | Path]:
    """The command before a script for DDP on two CPU processes; its configuration is written to `folder`.

    The type is MULTI_GPU with `use_cpu`: where it is MULTI_CPU, accelerate runs one process and says nothing.
    """
    config = folder / "ddp.yaml"
    config.write_text(
        "compute_environment: LOCAL_MACHINE\ndistributed_type: MULTI_GPU\nuse_cpu: true\nnum_machines: 1\n"
        "num_processes: 2\nmachine_rank: 0\nmixed_precision: 'no'\nmain_training_function: main\n"
    )
    accelerate = Path(sys.executable).with_name("accelerate")
    return [accelerate, "launch", "--main_process_port", "0", "--config_file", config]


def run_canned(
    folder: Path, name: str, launcher: Sequence[str | Path] = (sys.executable,), **settings: Any
) -> subprocess.CompletedProcess[str]:
    """Run `run_canned.py` with these settings; what it leaves behind is in the folder `name`."""
    file = folder / f"{name}.json"
    file.write_text(json.dumps({"output_dir": str(folder / name), **settings}))
    script = Path(__file__).with_name("run_canned.py")
    return subprocess.run(
        [*map(str, launcher), str(script), str(file)], capture_output=True, text=True, timeout=300, check=False
    )
