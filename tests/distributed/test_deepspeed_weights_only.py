"""DeepSpeed loads whatever its files hold, by itself; a run of ours that goes on from them loads numbers alone."""

import pytest
import torch
from launch import launcher, run_canned

from trl_grpo_ext.checkpoints import MANIFEST


class Hostile:
    def __init__(self, place):
        self.place = str(place)

    def __reduce__(self):
        return exec, (f"import pathlib; pathlib.Path({self.place!r}).touch()",)


@pytest.mark.slow
@pytest.mark.distributed
def test_a_program_in_deepspeeds_files_is_not_run(policy, tmp_path):
    """One process of ZeRO-2 in half precision, whose optimizer's files hold more kinds of things than others."""
    command = launcher("zero2.yaml", num_processes=1)
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "bf16": True}
    settings = {"policy": policy, "output_dir": str(tmp_path / "run"), "options": options}
    goes_on = {**settings, "options": {**options, "max_steps": 3}, "resume": True}
    result = run_canned(tmp_path, "settings", command, runs=[settings, goes_on])
    assert result.returncode == 0, result.stderr[-3000:]

    checkpoint = tmp_path / "run" / "checkpoint-3"
    (file,) = checkpoint.glob("global_step3/*optim_states.pt")
    torch.save({**torch.load(file, weights_only=False), "x": Hostile(tmp_path / "hostile")}, file)
    (checkpoint / MANIFEST).unlink()
    settings = {**settings, "options": {**options, "max_steps": 4}, "resume": str(checkpoint)}
    result = run_canned(tmp_path, "run", command, **settings)
    assert result.returncode != 0
    assert "has more in it than numbers" in result.stderr
    assert "it asks for exec" in result.stderr
    assert not (tmp_path / "hostile").exists()
