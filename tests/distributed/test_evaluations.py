"""Two CPU processes that evaluate between passes: they train as those that do not, and trackers get all figures."""

import json

import pytest
from canned import assert_same_weights, schedule_options
from launch import ENVIRONMENT, launcher, ran_on, run_to_the_end, write_settings
from read_wandb import logged_to_wandb
from safetensors.torch import load_file

from trl_grpo_ext.evaluation import read_answers


pytestmark = [pytest.mark.slow, pytest.mark.distributed]

STEPS = 10  # eight for the passes over one generation, and two of the next
OPTIONS = {**schedule_options(4, 1, 2), "max_steps": STEPS, "bf16": False, "max_completion_length": 6, "seed": 2}
EVALUATIONS = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 4}


def figures(folder):
    """The figures of a run by evaluation and step, each with its interval."""
    lines = map(json.loads, (folder / "answers" / "figures.jsonl").read_text().splitlines())
    return {(line["evaluation"], line["step"]): line["figures"] for line in lines}


@pytest.mark.parametrize(
    ("config", "more", "wrapper", "stage"),
    [
        ("ddp_cpu.yaml", {}, "DistributedDataParallel", None),
        ("ddp_cpu.yaml", {"lora": True}, "DistributedDataParallel", None),
        ("zero3_cpu.yaml", {}, "DeepSpeedEngine", 3),
    ],
    ids=["ddp", "ddp-lora", "zero3"],
)
def test_the_weights_are_those_of_a_run_without(policy, tmp_path, config, more, wrapper, stage):
    without, evaluated = (
        {
            "policy": policy,
            "output_dir": str(tmp_path / name),
            "options": {**OPTIONS, **options},
            "evaluates": bool(options),
            **more,
        }
        for name, options in (("without", {}), ("with", {**EVALUATIONS, "report_to": "wandb"}))
    )
    command = [*launcher(config), *write_settings(tmp_path, "settings", runs=[without, evaluated])]
    environment = {**ENVIRONMENT, "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}
    result = run_to_the_end(command, environment=environment)
    assert result.returncode == 0, result.stderr[-5000:]

    for rank in (0, 1):
        of_both = [ran_on(tmp_path / name, rank) for name in ("without", "with")]
        for ran in of_both:
            assert (ran["processes"], ran["wrapper"], ran["packs"]) == (2, wrapper, True)
            assert (ran["sharding"] and ran["sharding"]["stage"]) == stage
        assert of_both[0]["evaluated"] is None
        assert of_both[1]["evaluated"] == list(range(1, STEPS + 1))
        losses = [[entry["loss"] for entry in ran["log"] if "loss" in entry] for ran in of_both]
        assert losses[0] == losses[1]
        assert len(losses[0]) == STEPS
    assert_same_weights(*(load_file(tmp_path / name / "final.safetensors") for name in ("with", "without")))
    start = load_file(tmp_path / "with" / "start.safetensors")
    assert any(
        not start[name].equal(weight) for name, weight in load_file(tmp_path / "with/final.safetensors").items()
    )

    measured = figures(tmp_path / "with")
    assert list(measured) == [("before", 0), *(("step", step) for step in range(1, STEPS + 1)), ("after", STEPS)]
    logs = [[e for e in ran_on(tmp_path / "with", rank)["log"] if "eval_tokens" in e] for rank in (0, 1)]
    assert logs[0] == logs[1]  # both decide by them which model is the best one
    answers = read_answers(tmp_path / "with" / "answers" / "step-000003.jsonl")
    assert [(answer.id, answer.temperature, answer.sample) for answer in answers] == [
        (problem, *which) for problem in range(3) for which in ((0.0, 0), (1.0, 0), (1.0, 1))
    ]
    assert len({answer.completion for answer in answers}) > 3

    # the process that had W&B's run has ended by `os._exit`, and nothing is lost
    tracked = [
        (row["train/global_step"], row["eval/tokens"]) for row in logged_to_wandb(tmp_path) if "eval/tokens" in row
    ]
    assert tracked == [(entry["step"], entry["eval_tokens"]) for entry in logs[0]]
    assert [step for step, _ in tracked] == list(range(STEPS + 1))
