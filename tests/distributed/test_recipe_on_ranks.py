"""The recipe, started on two processes as its README says."""

import json

import pytest
import torch
from launch import ROOT, launcher, run_to_the_end
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from trl_grpo_ext.embedded_policy import embedded_policy_path
from trl_grpo_ext.runs import read_run


pytestmark = [pytest.mark.slow, pytest.mark.distributed]


def run(command, output_dir, **options):
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    script = str(ROOT / "recipes" / "gsm8k.py")
    result = run_to_the_end([*command, script, "--output_dir", str(output_dir), *arguments], timeout=400)
    assert result.returncode == 0, result.stderr[-5000:]
    # progress and results come from one process
    assert result.stdout.count("new numbers, known templates") == 1
    assert result.stderr.count("Evaluating before (heldout):   0%") == 1
    assert "find_unused_parameters" not in result.stderr
    return json.loads((output_dir / "summary.json").read_text())


@pytest.mark.parametrize("config", ["zero2.yaml", "zero3_cpu.yaml"])
def test_zero(tmp_path, config):
    summary = run(
        launcher(config, "--mixed_precision", "no"),
        tmp_path,
        max_steps=2,
        per_device_train_batch_size=16,
        num_generations=4,
        max_completion_length=48,
        eval_items=7,  # one process has an item less
        eval_samples=2,
        eval_batch_size=4,
        train_items=64,
    )
    assert summary["processes"] == 2
    assert read_run(tmp_path).settings["eval_items"] == 7
    assert summary["accuracy"]["before"]["items"] == summary["accuracy"]["after"]["items"] == 7
    # what is saved at the end is a whole model, and another one than at the start
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    start = load_file(f"{embedded_policy_path()}/model.safetensors")
    weights = model.state_dict()
    moved = [name for name, weight in start.items() if not weight.float().equal(weights[name])]
    assert all(weight.shape == weights[name].shape for name, weight in start.items())
    assert len(moved) > len(start) / 2


def test_the_demo_on_two_processes(tmp_path):
    """Each process has half of the completions, so that a step is the same step."""
    summary = run(launcher("ddp_cpu.yaml", is_warm=False), tmp_path, per_device_train_batch_size=32)
    assert summary["processes"] == 2
    assert summary["accuracy"]["after"]["items"] == 200
    assert summary["accuracy"]["after"]["strict"]["mean"] >= 0.90
    assert summary["accuracy"]["after"]["strict_mean@4"]["mean"] >= 0.80
