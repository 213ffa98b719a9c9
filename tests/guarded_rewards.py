"""Reward functions that fail in every way there is, importable by the process that isolates them."""

import os
import time


def by_text(completions, **columns):
    """A score by what the completion says."""
    return [_score(text) for text in completions]


def _score(text):
    if text == "raise":
        raise KeyError("no such thing")
    if text == "hang":
        return 9**9**9
    if text == "wait":
        time.sleep(3600)
    if text == "exit":
        os._exit(3)
    if text == "memory":
        return len([bytearray(2**24) for _ in range(10**6)])
    return float(len(text))


def with_logs(prompts, completions, points, log_extra=None, log_metric=None, trainer_state=None, **columns):
    """Scores from a column, logged too; it fails on a batch with negative ones."""
    if min(points) < 0:
        raise ValueError("negative")
    log_extra("length", [len(text) for text in completions])
    log_metric("points", sum(points) / len(points))
    return points
