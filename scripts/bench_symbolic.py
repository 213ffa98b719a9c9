"""What the worker processes of symbolic correctness cost: answers a second, against math-verify called directly.

Direct is one process a core, each with its share of the pairs and nothing between; ours is the reward, from a process
that does nothing else, with as many workers. Both are warm, and no pair is hostile. Run it on an idle machine:

    python scripts/bench_symbolic.py

The figure to look at is the last one, which should be above 80 %.
"""

import argparse
import random
import statistics
import subprocess
import sys
import time

from trl_grpo_ext.rewards.symbolic import get_math_correctness_reward, make_verifier
from trl_grpo_ext.rewards.worker_pool import close_workers, usable_cores


FORMS = (
    (r"\frac{{{a}x}}{{{b}}}", r"\frac{{{c}x}}{{{d}}}"),
    (r"{a}\sqrt{{{b}}}", r"\sqrt{{{c}}}"),
    (r"x^2+{a}x+{b}", r"(x+{a})(x+{b})"),
    (r"({a},{b}]", r"({a},{c}]"),
    (r"\{{{a},{b}\}}", r"\{{{b},{a}\}}"),
    (r"y={a}x+{b}", r"y={b}+{a}x"),
)


def make_pairs(count: int) -> list[list[str]]:
    """Answers and references that want math-verify, no two alike: none is in a cache, or compared once for several."""
    numbers = ({"a": index + 2, "b": index + 3, "c": 2 * index + 4, "d": 2 * index + 6} for index in range(count))
    forms = (FORMS[index % len(FORMS)] for index in range(count))
    pairs = [[form.format(**values) for form in pair] for pair, values in zip(forms, numbers, strict=True)]
    random.Random(0).shuffle(pairs)  # so that each process has as much to do
    return pairs


def verify_directly(part: int, parts: int, count: int) -> None:
    """One of the processes that call math-verify directly: it waits for a line, and says when it is done."""
    verify = make_verifier()
    pairs = make_pairs(count)[part::parts]
    print("ready", flush=True)
    sys.stdin.readline()
    for pair in pairs:
        verify(pair)
    print("done", flush=True)


def seconds_directly(workers: int, count: int) -> float:
    """Seconds for all pairs, of as many processes at once."""
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--count", str(count), "--part", str(part), "--workers", str(workers)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for part in range(workers)
    ]
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    started = time.perf_counter()
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("\n")
        process.stdin.flush()
    for process in processes:
        assert process.stdout is not None
        process.stdout.readline()
    seconds = time.perf_counter() - started
    for process in processes:
        process.communicate()
    return seconds


def seconds_of_reward(workers: int, count: int) -> float:
    """Seconds for all pairs, of the reward with as many workers."""
    reward = get_math_correctness_reward(answer_extractor="none", workers=workers)
    try:
        reward(completions=[r"\frac12"] * 2 * workers, answer=[rf"\sqrt{{{index}}}" for index in range(2 * workers)])
        answers, references = map(list, zip(*make_pairs(count), strict=True))
        started = time.perf_counter()
        scores = reward(completions=answers, answer=references)
        seconds = time.perf_counter() - started
    finally:
        close_workers()
    if None in scores:
        raise SystemExit(f"{scores.count(None)} answers were not scored: the machine is too busy to measure on")
    return seconds


def main() -> None:
    """Measure, in turns."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=2000, help="pairs (default: %(default)s)")
    parser.add_argument("--workers", type=int, default=usable_cores(), help="processes (default: one a core)")
    parser.add_argument("--repeats", type=int, default=3, help="measurements of each (default: %(default)s)")
    parser.add_argument("--part", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part is not None:
        verify_directly(options.part, options.workers, options.count)
        return
    ratios = []
    for _ in range(options.repeats):
        direct = seconds_directly(options.workers, options.count)
        ours = seconds_of_reward(options.workers, options.count)
        ratios.append(direct / ours)
        print(
            f"{options.workers} processes: direct {options.count / direct:.0f} answers a second, "
            f"reward {options.count / ours:.0f}, {direct / ours:.0%}"
        )
    print(f"median {statistics.median(ratios):.0%}")


if __name__ == "__main__":
    main()
