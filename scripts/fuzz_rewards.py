"""Look for texts on which a reward fails, returns nonsense, or takes too long.

    python scripts/fuzz_rewards.py --generated 100000              # completions made from right ones, and a table
    python scripts/fuzz_rewards.py --generated 100000 --dataset_name path/to/train.jsonl
    pip install atheris; python scripts/fuzz_rewards.py --minutes 10 --corpus tests/corpus

With `--generated` each reward scores that many completions: right solutions with parts taken out, doubled, moved, or
put in from other formats and from LaTeX; lengths are then doubled up to 100,000 characters. With `--minutes`, atheris
looks for inputs that take new ways through the code. Exit status: 0 nothing was found, 1 something was, which is shown
and is to become a file in `tests/corpus`; 2 wrong arguments. It needs no torch.
"""

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

from trl_grpo_ext.evaluation import grade
from trl_grpo_ext.exits import stop
from trl_grpo_ext.rewards import (
    ANSWER_EXTRACTORS,
    RewardBundle,
    get_answer_extractor,
    get_correctness_reward,
    get_exact_correctness_reward,
    get_format_reward,
    get_soft_format_reward,
    gsm8k_bundle,
    numerically_equal,
    parse_answer_number,
    parse_number,
    parse_plain_number,
    tag_bundle,
)
from trl_grpo_ext.tasks import read_problems


# What a policy puts into its texts, and what it is paid for leaving out.
PIECES = (
    *(
        "<reasoning>",
        "</reasoning>",
        "<answer>",
        "</answer>",
        "<think>",
        "</think>",
        "<SOLUTION>",
        "</SOLUTION>",
        "####",
    ),
    *(
        "\\boxed{",
        "\\frac{1}{2}",
        "\\frac12",
        "\\sqrt{",
        "}",
        "$",
        "\\text{ cm}",
        "=",
        "!",
        "%",
        "```",
        "...",
        "\n",
        " ",
    ),
    *(
        "12",
        "1 000",
        "1,000",
        "1{,}000",
        "3 1/2",
        "1/0",
        "-",
        "\N{EN DASH}",
        "\N{MINUS SIGN}",
        "minus ",
        "not ",
        "or ",
    ),
    *("thousand", "1e999", "\0", "\ud800", "\N{ARABIC-INDIC DIGIT FIVE}", "word ", "x", "\\", "{", "(", "2)", "1."),
)
BATCH = 500
LENGTHS = (12_500, 25_000, 50_000, 100_000)
# More than this beside a text of half the length is more than linear; the clock, a cache and a bound account for some.
GROWTH = 3.0


def all_rewards() -> RewardBundle:
    """Every reward of this package that needs no worker processes, each under a name of its own."""
    named: dict[str, Any] = {}
    for prefix, bundle in {
        "": gsm8k_bundle(),
        "notebooks/": gsm8k_bundle(as_in_notebooks=True),
        "tag/": tag_bundle(),
        "hardened/": gsm8k_bundle(hardened=True),
    }.items():
        named.update({f"{prefix}{name}": reward for name, reward in zip(bundle.names, bundle, strict=True)})
    named["exact"] = get_exact_correctness_reward()
    named["seed"] = get_correctness_reward(numeric="seed")
    for name in ANSWER_EXTRACTORS:
        named[f"by {name}"] = get_correctness_reward(answer_extractor=name)
    named["think, then anything"] = get_soft_format_reward(sections=["think", ("", "")])
    named["tags, each once"] = get_format_reward(exactly_once=True, missing_score=-0.5)
    return RewardBundle([_Named(name, reward) for name, reward in named.items()])


class _Named:
    """A reward under another name: those of two bundles have the same."""

    def __init__(self, name: str, reward: Callable[..., Any]) -> None:
        self.__name__, self.reward = name, reward

    def __call__(self, **arguments: Any) -> Any:
        return self.reward(**arguments)


def solutions_of(dataset_name: str) -> list[tuple[str, str]]:
    """Right completions with their references."""
    return [(row["solution"], row["answer"]) for row in read_problems(dataset_name)]


def changed(text: str, generator: random.Random) -> str:
    """A completion as a policy might write it that tries everything."""
    parts = text.split(" ")
    for _ in range(generator.randrange(6)):
        place = generator.randrange(len(parts) + 1)
        match generator.randrange(5):
            case 0:
                parts.insert(place, generator.choice(PIECES))
            case 1:
                parts[place : place + 1 + generator.randrange(4)] = []
            case 2:
                parts[place:place] = parts[place : place + generator.randrange(8)] * generator.randrange(4)
            case 3:
                parts = parts[place:] + parts[:place]
            case 4:
                parts.insert(place, "".join(generator.choices(PIECES, k=1 + generator.randrange(12))))
    return " ".join(parts)


def batches(solutions: list[tuple[str, str]], count: int, seed: int) -> Iterator[tuple[list[str], list[str]]]:
    """So many changed completions, a batch at a time, with the references of what they were."""
    generator = random.Random(seed)
    for start in range(0, count, BATCH):
        drawn = [generator.choice(solutions) for _ in range(min(BATCH, count - start))]
        yield [changed(text, generator) for text, _ in drawn], [answer for _, answer in drawn]


def score_generated(options: argparse.Namespace) -> list[str]:
    """Score generated completions; returns what was found."""
    found: list[str] = []
    solutions = solutions_of(options.dataset_name)
    rewards = all_rewards()
    seconds = dict.fromkeys(rewards.names, 0.0)
    unscored = dict.fromkeys(rewards.names, 0)
    for number, (completions, answers) in enumerate(batches(solutions, options.generated, options.seed)):
        if sys.stderr.isatty():
            print(f"\r{number * BATCH:,} of {options.generated:,}", end="", file=sys.stderr)
        for name, reward in zip(rewards.names, rewards, strict=True):
            started = time.process_time()
            try:
                scores = reward(completions=completions, answer=answers)
            except Exception as error:
                found.append(f"{name}: {type(error).__name__}: {error}, in batch {number}")
                continue
            seconds[name] += time.process_time() - started
            unscored[name] += scores.count(None)
            found += [
                f"{name}: {score} for {text!r}"
                for text, score in zip(completions, scores, strict=True)
                if score is not None and not math.isfinite(score)
            ]
            if len(scores) != len(completions):
                found.append(f"{name}: {len(scores)} scores for {len(completions)} completions")
    growth = {name: growth_of(reward, solutions) for name, reward in zip(rewards.names, rewards, strict=True)}
    found += [
        f"{name}: {growth[name]:.1f} times as long for twice the text" for name in growth if growth[name] > GROWTH
    ]
    show_table(options.generated, seconds, unscored, growth)
    return found


def growth_of(reward: Callable[..., Any], solutions: list[tuple[str, str]]) -> float:
    """How much longer a text takes that is twice as long: the least of several, because noise only lengthens."""
    text, answer = solutions[0]
    times = []
    for length in LENGTHS:
        whole = (text + " ") * (length // len(text) + 1)
        best = math.inf
        for _ in range(5):
            started = time.process_time()
            for _ in range(20):
                reward(completions=[whole[:length]], answer=[answer])
            best = min(best, time.process_time() - started)
        times.append(max(best, 1e-4))  # below that the clock tells nothing
    return min(after / before for before, after in pairwise(times))


def show_table(count: int, seconds: dict[str, float], unscored: dict[str, int], growth: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{count:,} generated completions", title_justify="left")
    table.add_column("reward", no_wrap=True)
    for column in ("completions/s", "not scored", "time for twice the text"):
        table.add_column(column, justify="right")
    for name, taken in seconds.items():
        table.add_row(name, f"{count / max(taken, 1e-9):,.0f}", f"{unscored[name]:,}", f"x{growth[name]:.2f}")
    Console().print(table)


def fuzz(options: argparse.Namespace) -> None:
    """Let atheris look for inputs; it ends the process when it finds one, and shows it."""
    try:
        import atheris
    except ImportError:
        stop(2, "--minutes needs atheris: pip install atheris")
    rewards = all_rewards()
    atheris.instrument_all()

    def one_input(data: bytes) -> None:
        text = data.decode("utf-8", "surrogateescape")
        started = time.process_time()
        for reward in rewards:
            for score in reward(completions=[text, f"<answer>{text}</answer>"], answer=["12", text]):
                if score is not None and not math.isfinite(score):
                    raise AssertionError(f"{reward.__name__} gives {score}")
        for name in ANSWER_EXTRACTORS:
            get_answer_extractor(name)(text)
        for parse in (parse_number, parse_answer_number, parse_plain_number):
            parse(text)
        numerically_equal(text, "12")
        grade(text, "12")
        if time.process_time() - started > 1.0:
            raise AssertionError(f"took {time.process_time() - started:.1f} s")

    arguments = [sys.argv[0], f"-max_total_time={round(60 * options.minutes)}", "-max_len=4096", "-timeout=10"]
    folder = Path(options.corpus)
    folder.mkdir(parents=True, exist_ok=True)
    # what is new goes into the first folder, and the tests' files are read alone
    found = Path(options.output)
    found.mkdir(parents=True, exist_ok=True)
    atheris.Setup([*arguments, f"-artifact_prefix={found}/found-", str(found), str(folder)], one_input)
    atheris.Fuzz()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n", 1)[0],
        epilog=__doc__.split("\n\n", 1)[1],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--generated", type=int, metavar="N", help="Score so many generated completions.")
    parser.add_argument("--minutes", type=float, help="Let atheris look for so long.")
    parser.add_argument("--dataset_name", default="arithmetic", help="File with right solutions.")
    parser.add_argument("--corpus", default="tests/corpus", help="Folder with files from which atheris begins.")
    parser.add_argument("--output", default="outputs/fuzz", help="Folder for the inputs that atheris makes and finds.")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    if (options.generated is None) == (options.minutes is None):
        stop(2, "give one of --generated and --minutes")
    if options.generated is not None and options.generated < 1:
        stop(2, f"--generated must be at least 1, got {options.generated}")
    if options.minutes is not None:
        fuzz(options)
        return
    found = score_generated(options)
    for line in found[:20]:
        print(line.encode("utf-8", "backslashreplace").decode())
    sys.exit(1 if found else 0)


if __name__ == "__main__":
    main()
