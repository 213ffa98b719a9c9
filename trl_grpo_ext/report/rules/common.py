"""What rules have in common. Imports no torch."""

from ..findings import HINT, PROBLEM
from ..generations import RewardAbout
from ..record import Run


def the_last(what: str, count: int, generations: int) -> str:
    return f"the last {count} {what} and {generations} generations"


def rewards_of_kind(run: Run, kind: str) -> list[RewardAbout]:
    return [reward for reward in run.rewards if reward.kind == kind]


def severity_of(reward: RewardAbout) -> str:
    return HINT if reward.weight == 0 else PROBLEM  # a weight of 0 makes it a metric


def setting(run: Run, name: str) -> str:
    value = run.settings.get(name, "unknown")
    return f"{value:g}" if isinstance(value, float) else str(value)


def number_of(run: Run, name: str, default: int) -> int:
    value = run.settings.get(name)
    return value if isinstance(value, int) and value > 0 else default


def quoted(text: str, chars: int = 60) -> str:
    """A model's text or a reference inside a line: short, and without what would break the line or the screen."""
    return repr(text if len(text) <= chars else f"{text[: chars // 2]}...{text[-chars // 2 :]}")
