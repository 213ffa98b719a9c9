r"""Answers that a symbolic comparison hangs, explodes or crashes on, and others beside them.

As a script, `python hostile_answers.py FILE SECONDS`: scores them as a rank of a training does, and writes the result.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any
from unittest.mock import patch

from trl_grpo_ext.rewards import close_workers, get_math_correctness_reward, symbolic


REFERENCE = r"\sqrt{13}"
HOSTILE = [
    *(r"9^{9^{9}}", r"9^{9^{9^{9}}}", r"2^{2^{2^{2^{2^{2}}}}}", r"10^{10^{10}}+1", r"7^{7^{7^{7}}}-1"),
    *(r"\sin(10^{10^{10}})", r"\log(9^{9^{9}})", r"\sqrt[3]{9^{9^{9}}}", r"\lfloor 9^{9^{9}} \rfloor"),
    *(r"(10^9)!", r"(10^8)!+1", r"((9!)!)!", r"\binom{10^9}{5\cdot10^8}"),
    *(r"\sum_{n=1}^{10^9} n^n", r"\sum_{n=1}^{10^7} \frac{1}{n}", r"\sum_{k=0}^{10^8} \sin(k)"),
    *(r"\prod_{n=1}^{10^9} n", r"\prod_{k=1}^{10^7} (k^2+1)", r"\prod_{k=2}^{10^9} \frac{k}{k+1}"),
    *(r"\sum_{n=1}^{10^9} \frac{1}{n^n}", r"\prod_{n=1}^{10^8} (n+\frac{1}{n})", r"(x+1)^{100000}"),
    *("{" * 3000 + "1" + "}" * 3000, "(" * 3000 + "1" + ")" * 3000, "-" * 3000 + "1"),
    *(r"\frac{1}{" * 1000 + "2" + "}" * 1000, "1/" * 2000 + "1", "memory", "crash", "exit"),
]
HARMLESS = {
    **{REFERENCE: 2.0, r"13^{1/2}": 2.0, r"\sqrt{26/2}": 2.0, r"\frac{13}{\sqrt{13}}": 2.0},
    **{"13": 0.0, r"\sqrt{14}": 0.0, "nothing": 0.0, "": 0.0},
}


def score(timeout_s: float, workers: int | None = None) -> dict[str, Any]:
    """All in one batch, on ranks each its share: what came out, and how long another thread was stopped at most."""
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    hostile_answers = HOSTILE[rank::ranks]
    answers = [
        answer
        for index, hostile in enumerate(hostile_answers)
        for answer in (hostile, [*HARMLESS][index % len(HARMLESS)])
    ]
    logged: dict[str, float] = {}
    stopped, is_over = [0.0], threading.Event()

    def tick() -> None:
        before = time.monotonic()
        while not is_over.wait(0.01):
            now = time.monotonic()
            stopped[0], before = max(stopped[0], now - before), now

    with patch.object(symbolic, "VERIFIER", "pool_tasks:make_verifier_or_worse"):
        reward = get_math_correctness_reward(
            timeout_s=timeout_s, workers=workers, memory_limit_mb=256, answer_extractor="none"
        )
        reward(completions=["3.6055512"], answer=[REFERENCE])  # workers are there
        thread = threading.Thread(target=tick)
        thread.start()
        started = time.monotonic()
        scores = reward(completions=answers, answer=[REFERENCE] * len(answers), log_metric=logged.__setitem__)
        seconds = time.monotonic() - started
        is_over.set()
        thread.join()
    return {
        "count": len(hostile_answers),
        "hostile": scores[0::2],
        "harmless": scores[1::2],
        "right": [HARMLESS[answer] for answer in answers[1::2]],
        "seconds": seconds,
        "stopped": stopped[0],
        "logged": logged,
        "rank": os.environ.get("RANK"),
        "pid": os.getpid(),
    }


if __name__ == "__main__":
    file, seconds = sys.argv[1:]
    report = score(float(seconds))
    close_workers()
    Path(f"{file}-{report['rank']}").write_text(json.dumps(report))
