"""How even the work of many ranks is, before and after rows are dealt out over them (`balance_ranks`); no GPU needed.

    python scripts/plan_balance.py                                   # 8, 64 and 512 ranks, 200 seeds: a minute
    python scripts/plan_balance.py --ranks 16 --rows 32 --dead 0.3 --mean_tokens 2000 --seeds 50

Completions are made up: groups with prompts of 100 to 200 tokens, lengths log-normal, a share of the groups dead, that
is, without a gradient. The plan is the trainer's own. A row of the table is a setting: tokens of the slowest rank over
the mean of all, before and after, means over seeds, and what 99 % of the seeds stay below after; how many more tokens
there are because some prompts are computed on two ranks; how much of its own rows a rank sends at most; how long it
plans; and, for comparison, generation, which nothing evens out: the longest completion of all over the mean of the
ranks' longest ones, for which each rank generates.

A second table is of evaluation, in which a batch too lasts as long as its longest answer on any rank: problems with
several samples of each, and for how many tokens ranks generate, over those that the answers have. The order is the
driver's own, without knowing lengths, with those of the greedy answers, and with those of an evaluation before.
"""

import gc
import math
import statistics
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import product

from trl_grpo_ext.extras import require_or_stop


if __name__ == "__main__":
    require_or_stop()

import numpy as np
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm
from trl import TrlParser

from trl_grpo_ext.evaluation.answers import Answer
from trl_grpo_ext.evaluation.driver import KnownLengths, Problem, Task, in_chunks
from trl_grpo_ext.rollouts.balance import NOWHERE, Cost, RowTable, ranks_of_rows, slowest_over_mean, work_of_ranks


# Tokens, and with a prompt that is computed once for the rows of it on a rank
COST = Cost(by_prompt=True)
# How much the logarithms of lengths correlate: two answers of a policy to one problem, and a sample with the same one,
# of the same random numbers, of the policy some steps before. The offline recipe's are 0.35 to 0.66, and above 0.9.
OF_ONE_PROBLEM, OF_ONE_SAMPLE = 0.5, 0.9


@dataclass
class BalanceArguments:
    """What `plan_balance.py` may be asked."""

    ranks: list[int] = field(default_factory=lambda: [8, 64, 512], metadata={"help": "Numbers of ranks."})
    rows: list[int] = field(default_factory=lambda: [16, 64], metadata={"help": "Rows of a rank and optimizer step."})
    dead: list[float] = field(
        default_factory=lambda: [0.0, 0.5], metadata={"help": "Shares of groups without a gradient."}
    )
    sigma: list[float] = field(
        default_factory=lambda: [0.6, 1.0], metadata={"help": "Spreads of the logarithm of a completion's length."}
    )
    mean_tokens: int = field(default=200, metadata={"help": "Mean length of completions."})
    longest_tokens: int = field(default=2048, metadata={"help": "Where completions are cut off."})
    num_generations: int = field(default=8, metadata={"help": "Completions of a group."})
    eval_ranks: list[int] = field(
        default_factory=lambda: [1, 8, 64], metadata={"help": "Numbers of ranks that evaluate."}
    )
    eval_problems: int = field(default=1319, metadata={"help": "Problems; GSM8K's test set has 1,319."})
    eval_samples: int = field(default=4, metadata={"help": "Samples of each problem."})
    eval_batch_size: int = field(default=64, metadata={"help": "Answers that a rank generates at once."})
    eval_seeds: int = field(
        default=10, metadata={"help": "How many evaluations are made up for each setting; 0: none."}
    )
    seeds: int = field(default=200, metadata={"help": "How many batches are made up for each setting."})
    markdown: bool = field(default=False, metadata={"help": "Print the table as Markdown."})

    def __post_init__(self) -> None:
        for name in (
            "mean_tokens",
            "longest_tokens",
            "num_generations",
            "seeds",
            "eval_problems",
            "eval_samples",
            "eval_batch_size",
        ):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        if self.eval_seeds < 0:
            raise ValueError(f"--eval_seeds must not be negative, got {self.eval_seeds}")
        for name in ("ranks", "rows", "eval_ranks"):
            if min(getattr(self, name)) < 1:
                raise ValueError(f"--{name} must be at least 1, got {min(getattr(self, name))}")
        for ranks, rows in product(self.ranks, self.rows):
            if ranks * rows % self.num_generations:
                raise ValueError(
                    f"{ranks} ranks with {rows} rows each cannot hold whole groups of --num_generations "
                    f"{self.num_generations}: let it divide {ranks * rows}"
                )
        if not all(0 <= share < 1 for share in self.dead):
            raise ValueError(f"--dead must be at least 0 and below 1, got {self.dead}")
        if not all(spread >= 0 for spread in self.sigma):
            raise ValueError(f"--sigma must not be negative, got {self.sigma}")


@dataclass(frozen=True)
class Seed:
    """What came out for one batch: ratios, and milliseconds of planning."""

    before: float
    after: float
    more_tokens: float
    sent: float
    milliseconds: float
    generation: float


def made_up_lengths(args: BalanceArguments, sigma: float, normal: np.ndarray) -> np.ndarray:
    """Completions' lengths in tokens, log-normal, from numbers of the standard normal distribution."""
    lengths = np.exp(math.log(args.mean_tokens) - sigma**2 / 2 + sigma * normal)
    return np.clip(np.round(lengths), 1, args.longest_tokens).astype(np.int64)


def made_up_rows(args: BalanceArguments, ranks: int, rows: int, dead: float, sigma: float, seed: int) -> RowTable:
    """A batch of `ranks * rows` rows; ranks have them one after the other, so groups may be cut in two."""
    numbers, size = np.random.default_rng(seed), args.num_generations
    groups = ranks * rows // size
    lengths = made_up_lengths(args, sigma, numbers.standard_normal(groups * size))
    return RowTable(
        rank=np.repeat(np.arange(ranks), rows),
        step=np.zeros(groups * size, dtype=np.int64),
        prompt=np.repeat(np.arange(groups), size),
        prompt_tokens=np.repeat(numbers.integers(100, 201, groups), size),
        completion_tokens=lengths,
        is_kept=np.repeat(numbers.random(groups) >= dead, size).astype(np.int64),
    )


def plan(table: RowTable, num_ranks: int) -> Seed:
    """Deal rows out, and compare."""
    stays = np.where(table.is_kept.astype(bool), table.rank, NOWHERE)
    gc.disable()  # it comes now and then, and goes through all that this process has imported
    began = time.perf_counter()
    dealt = ranks_of_rows(table, num_ranks, COST)
    seconds = time.perf_counter() - began
    gc.enable()
    before, after = (work_of_ranks(table, where, num_ranks, COST) for where in (stays, dealt))
    tokens = table.prompt_tokens + table.completion_tokens
    leaves = (dealt != NOWHERE) & (dealt != table.rank)
    longest = table.completion_tokens.reshape(num_ranks, -1).max(axis=1)  # rows are rank by rank
    sent = np.bincount(table.rank, tokens * leaves, num_ranks) / np.bincount(table.rank, tokens, num_ranks)
    return Seed(
        slowest_over_mean(before),
        slowest_over_mean(after),
        float(after.sum() / before.sum() - 1) if before.any() else 0.0,
        float(sent.max()),
        1e3 * seconds,
        float(longest.max() / longest.mean()),
    )


def generated_tokens(args: BalanceArguments, num_ranks: int, sigma: float, known: str | None, seed: int) -> float:
    """For how many tokens ranks generate in an evaluation's samples, over those that the answers have."""
    numbers = np.random.default_rng(seed)
    problems = [Problem(index, "", "", []) for index in range(args.eval_problems)]
    tasks = [Task(problem, 1.0, sample) for problem in problems for sample in range(args.eval_samples)]

    def much_like(logarithms: np.ndarray, correlation: float) -> np.ndarray:
        others = numbers.standard_normal(logarithms.shape)
        return correlation * logarithms + math.sqrt(1 - correlation**2) * others

    of_problems = numbers.standard_normal(args.eval_problems)
    greedy = much_like(of_problems, math.sqrt(OF_ONE_PROBLEM))
    samples = much_like(np.repeat(of_problems, args.eval_samples), math.sqrt(OF_ONE_PROBLEM))
    tokens = dict(zip((task.key for task in tasks), made_up_lengths(args, sigma, samples).tolist(), strict=True))
    if known == "greedy":
        keys, known_lengths = [(problem.id, 0.0, 0) for problem in problems], greedy
    elif known == "earlier":
        keys, known_lengths = list(tokens), much_like(samples, OF_ONE_SAMPLE)
    else:
        keys, known_lengths = [], np.zeros(0)
    answers = [
        Answer(id=name, sample=sample, temperature=temperature, prompt="", completion="", answer="", tokens=length)
        for (name, temperature, sample), length in zip(
            keys, made_up_lengths(args, sigma, known_lengths).tolist(), strict=True
        )
    ]
    generated = 0
    for chunk in in_chunks(tasks, KnownLengths(answers), args.eval_batch_size * num_ranks):
        rows = math.ceil(len(chunk) / num_ranks) * num_ranks  # each rank has as many
        generated += rows * max(tokens[task.key] for task in chunk)
    return generated / sum(tokens.values())


def results_of_evaluation(args: BalanceArguments) -> Iterable[list[str]]:
    for num_ranks, sigma in product(args.eval_ranks, args.sigma):
        means = [
            statistics.fmean(generated_tokens(args, num_ranks, sigma, known, seed) for seed in range(args.eval_seeds))
            for known in (None, "greedy", "earlier")
        ]
        yield [str(num_ranks), f"{sigma:g}", *(f"{mean:.2f}" for mean in means)]


def results_of(args: BalanceArguments) -> Iterable[tuple[tuple[int, int, float, float], list[Seed]]]:
    settings = list(product(args.ranks, args.rows, args.dead, args.sigma))
    with tqdm(total=len(settings) * args.seeds, unit="batch", disable=not sys.stderr.isatty()) as progress:
        for ranks, rows, dead, sigma in settings:
            seeds = []
            for seed in range(args.seeds):
                table = made_up_rows(args, ranks, rows, dead, sigma, seed)
                seeds.append(plan(table, ranks))
                progress.update()
            yield (ranks, rows, dead, sigma), seeds


def main(argv: list[str]) -> int:
    try:
        (args,) = TrlParser([BalanceArguments], description=__doc__.splitlines()[0]).parse_args_and_config(argv)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    names = [
        "ranks x rows",
        "dead",
        "sigma",
        "before",
        "after",
        "99 % of seeds",
        "more tokens",
        "sends",
        "plans, ms",
        "generation",
    ]
    lines = []
    for (ranks, rows, dead, sigma), seeds in results_of(args):
        after = sorted(seed.after for seed in seeds)
        lines.append(
            [
                f"{ranks} x {rows}",
                f"{dead:.0%}",
                f"{sigma:g}",
                f"{statistics.fmean(seed.before for seed in seeds):.2f}",
                f"{statistics.fmean(after):.3f}",
                f"{after[math.ceil(0.99 * len(after)) - 1]:.3f}",
                f"{statistics.fmean(seed.more_tokens for seed in seeds):+.1%}",
                f"{max(seed.sent for seed in seeds):.2f}",
                f"{statistics.median(seed.milliseconds for seed in seeds):.1f}",
                f"{statistics.fmean(seed.generation for seed in seeds):.2f}",
            ]
        )
    of_evaluation = list(results_of_evaluation(args)) if args.eval_seeds else []
    show("Tokens of the slowest rank over the mean", names, lines, args.markdown)
    if of_evaluation:
        names = ["ranks that evaluate", "sigma", "nothing known", "greedy answers", "evaluation before"]
        show("Tokens that samples are generated for, over theirs", names, of_evaluation, args.markdown)
    return 0


def show(title: str, names: list[str], lines: list[list[str]], markdown: bool) -> None:
    """Print a table."""
    if markdown:
        for line in (names, ["---"] * len(names), *lines):
            print("|", " | ".join(line), "|")
        print()
        return
    table = Table(*names, title=title)
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 119).print(table)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
