"""Two nodes of two processes each, in network namespaces; one is lost in the middle of the passes."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
from launch import launcher, ran_on, run_canned, run_to_the_end, warm_python
from test_faults import BOUND_S, OPTIONS, assert_same_end

from trl_grpo_ext.checkpoints import whole_checkpoints


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

HERE = Path(__file__).resolve().parent
NAMESPACES = ["unshare", "--user", "--map-root-user", "--net", "--mount", "--kill-child", "--fork", "bash"]
TIMEOUT_S = 20


@pytest.fixture(scope="module")
def two_nodes():
    """The command before one that is to run among two nodes."""
    command = [*NAMESPACES, str(HERE / "two_nodes.sh")]
    try:
        found = subprocess.run([*command, "true"], capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        pytest.skip(f"namespaces cannot be made here: {error}")
    if found.returncode != 0:
        pytest.skip(f"namespaces cannot be made here: {found.stderr.strip()}")
    return command


@pytest.mark.parametrize(
    ("config", "stage", "cuts_cable"), [("multi_node.yaml", 2, True), ("zero3_cpu.yaml", 3, False)]
)
def test_two_nodes(two_nodes, policy, tmp_path, config, stage, cuts_cable):
    warm_python()  # one for both nodes
    run = {"policy": policy, "options": {**OPTIONS, "ddp_timeout": TIMEOUT_S}}
    settings = {"config": config, "run": run, "output_dir": str(tmp_path / "nodes"), "cuts_cable": cuts_cable}
    (tmp_path / "settings.json").write_text(json.dumps(settings))
    command = [*two_nodes, sys.executable, str(HERE / "two_nodes.py"), str(tmp_path / "settings.json")]
    result = run_to_the_end(command, timeout=500, folder=None)
    second = (tmp_path / "second.0").read_text() if (tmp_path / "second.0").exists() else ""
    assert result.returncode == 0, result.stderr + second[-3000:]
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["killed"] >= 3  # the launcher and its processes
    assert results["status"] != 0
    assert results["seconds"] < (TIMEOUT_S if cuts_cable else 0) + BOUND_S
    assert "it has lost another rank, whose message says why" in (tmp_path / "first.0").read_text()
    assert results["resumed"] == [0, 0], second[-5000:]
    # the resumed run began where the first one was lost
    assert min(whole_checkpoints(tmp_path / "nodes")[0]) == 1
    one_node = run_canned(tmp_path, "one", launcher(config, "--mixed_precision", "no", num_processes=4), **run)
    assert one_node.returncode == 0, one_node.stderr[-5000:]
    for folder in ("nodes", "one"):
        ran = ran_on(tmp_path / folder, rank=3)
        assert (ran["processes"], ran["sharding"]["stage"], ran["packs"]) == (4, stage, True)
    assert_same_end(tmp_path / "nodes", tmp_path / "one")
