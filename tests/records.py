"""Records of runs that never were: made up step by step, so that a test can make one of them sick."""

import json
import random
from pathlib import Path
from typing import Any

from trl_grpo_ext.report.generations import RewardAbout, generation_statistics
from trl_grpo_ext.report.record import RECORD_FILE, Run, to_line


REWARDS = [
    RewardAbout("correctness_reward_func", 4.0, "correctness", 2.0),
    RewardAbout("soft_format_reward_func", 1.0, "format", 0.5),
]
SETTINGS = {"learning_rate": 1e-5, "num_iterations": 2, "num_generations": 8, "max_completion_length": 96, "beta": 0.0}


def made_up_events(steps: int = 40, *, seed: int = 0, groups: int = 8, **settings: Any) -> list[dict[str, Any]]:
    """The events of a run that learns: accuracy from 0.3 to 0.9, the format from 0.6 to 1."""
    numbers = random.Random(seed)
    settings = {**SETTINGS, **settings}
    size = settings["num_generations"]
    about = {
        "model": "some/model",
        "dataset": {"rows": 1000, "columns": ["prompt", "answer"]},
        "rewards": [vars(reward) for reward in REWARDS],
        "settings": settings,
        "versions": {"trl": "1.16.0"},
        "processes": 1,
        "device": "cpu",
    }
    events: list[dict[str, Any]] = [{"event": "begin", "step": 0, "time": 1000.0, "about": about}]
    for step in range(1, steps + 1):
        done = step / steps
        if (step - 1) % settings["num_iterations"] == 0:
            right = [numbers.random() < 0.3 + 0.6 * done for _ in range(groups * size)]
            tags = [numbers.random() < 0.6 + 0.4 * done for _ in range(groups * size)]
            scores = {
                "correctness_reward_func": [2.0 * value for value in right],
                "soft_format_reward_func": [0.5 * value for value in tags],
            }
            answers = ["14" if value else "24" for value in right]
            samples = [
                {
                    "prompt": "What is 2 + 2 x 6?",
                    "completion": f"<reasoning>\n2 x 6 = 12\n</reasoning>\n<answer>\n{answers[i]}\n</answer>\n",
                    "reference": "14",
                    "extracted": answers[i],
                    "rewards": {name: values[i] for name, values in scores.items()},
                    "advantage": 0.5 if right[i] else -0.5,
                    "tokens": 20,
                    "is_truncated": False,
                    "chars": 70,
                }
                for i in range(size)
            ]
            statistics = generation_statistics(scores, REWARDS, size).to_dict()
            events.append({"event": "generation", "step": step - 1, "statistics": statistics, "samples": samples})
        metrics = {
            "completions/mean_length": 30 + numbers.random(),
            "completions/clipped_ratio": 0.01,
            "entropy": 0.6 - 0.3 * done,
            "clip_ratio/region_mean": 0.01,
            "iteration/2/approx_kl": 0.002,
            "iteration/2/clip_ratio": 0.02,
            "learning_rate": settings["learning_rate"],
        }
        seconds = {"generation": 0.3, "rewards": 0.01, "update": 0.5, "between": 0.02}
        events.append({"event": "step", "step": step, "time": 1000.0 + step, "metrics": metrics, "seconds": seconds})
        events.append({"event": "log", "step": step, "logs": {"loss": 0.0, "grad_norm": 0.4}})
    events.append({"event": "end", "step": steps, "time": 1001.0 + steps, "status": "finished"})
    return events


def made_up_run(events: list[dict[str, Any]] | None = None, **options: Any) -> Run:
    """The run of some events, as if read from a file."""
    run = Run()
    for event in made_up_events(**options) if events is None else events:
        run.add(json.loads(to_line(event)))
    return run


def write_record(folder: Path, events: list[dict[str, Any]] | None = None, **options: Any) -> Path:
    """A folder with the record of a made-up run."""
    folder.mkdir(parents=True, exist_ok=True)
    events = made_up_events(**options) if events is None else events
    (folder / RECORD_FILE).write_text("".join(map(to_line, events)), encoding="utf-8")
    return folder
