"""How even the work of many ranks is, before and after rows are dealt out over them (`balance_ranks`); no GPU needed.

    python scripts/plan_balance.py                                   # 8, 64 and 512 ranks, 200 seeds: a minute
    python scripts/plan_balance.py --ranks 16 --rows 32 --dead 0.3 --mean_tokens 2000 --seeds 50

Completions are made up: groups with prompts of 100 to 200 tokens, lengths log-normal, a share of the groups dead, that
is, without a gradient. The plan is the trainer's own. A row of the table is a setting: tokens of the slowest rank over
the mean of all, before and after, means over seeds, and what 99 % of the seeds stay below after; how many more tokens
there are because some prompts are computed on two ranks; how much of its own rows a rank sends at most; how long it
plans; and, for comparison, generation, which nothing evens out: the longest completion of all over the mean of the
ranks' longest ones, for which each rank generates.
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

from trl_grpo_ext.rollouts.balance import NOWHERE, Cost, RowTable, ranks_of_rows, slowest_over_mean, work_of_ranks


# Tokens, and with a prompt that is computed once for the rows of it on a rank
COST = Cost(by_prompt=True)


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
    seeds: int = field(default=200, metadata={"help": "How many batches are made up for each setting."})
    markdown: bool = field(default=False, metadata={"help": "Print the table as Markdown."})

    def __post_init__(self) -> None:
        for name in ("mean_tokens", "longest_tokens", "num_generations", "seeds"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")
        for name in ("ranks", "rows"):
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


def made_up_rows(args: BalanceArguments, ranks: int, rows: int, dead: float, sigma: float, seed: int) -> RowTable:
    """A batch of `ranks * rows` rows; ranks have them one after the other, so groups may be cut in two."""
    numbers, size = np.random.default_rng(seed), args.num_generations
    groups = ranks * rows // size
    lengths = numbers.lognormal(math.log(args.mean_tokens) - sigma**2 / 2, sigma, groups * size)
    return RowTable(
        rank=np.repeat(np.arange(ranks), rows),
        step=np.zeros(groups * size, dtype=np.int64),
        prompt=np.repeat(np.arange(groups), size),
        prompt_tokens=np.repeat(numbers.integers(100, 201, groups), size),
        completion_tokens=np.clip(np.round(lengths), 1, args.longest_tokens).astype(np.int64),
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
    if args.markdown:
        for line in (names, ["---"] * len(names), *lines):
            print("|", " | ".join(line), "|")
        return 0
    table = Table(*names, title="Tokens of the slowest rank over the mean")
    for line in lines:
        table.add_row(*line)
    Console(width=None if sys.stdout.isatty() else 119).print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
