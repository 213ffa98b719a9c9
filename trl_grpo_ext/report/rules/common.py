"""What rules have in common. Imports no torch."""

from collections.abc import Sequence

from ..findings import HINT, PROBLEM, Found
from ..generations import RewardAbout
from ..record import Run


def the_last(what: str, count: int, generations: int) -> str:
    """The words for [`~trl_grpo_ext.report.windows.last_window`]."""
    return f"the last {count} {what} ({generations} generations or more)"


def rewards_of_kind(run: Run, kind: str) -> list[RewardAbout]:
    """A run's rewards for correctness, format or another thing."""
    return [reward for reward in run.rewards if reward.kind == kind]


def joined(found: Sequence[tuple[RewardAbout, str]], step: int) -> Found | None:
    """What was found of several rewards as one; a hint where all of them are metrics."""
    if not found:
        return None
    is_metric = all(reward.weight == 0 for reward, _ in found)
    evidence = "; ".join(f"{reward.name} {what}" for reward, what in found)
    return Found(f"{evidence}.", step, severity=HINT if is_metric else PROBLEM)


def setting(run: Run, name: str) -> str:
    """A setting as text, for what is said of it."""
    value = run.settings.get(name, "unknown")
    return f"{value:g}" if isinstance(value, float) else str(value)


def number_of(run: Run, name: str, default: int) -> int:
    """A setting that is a positive whole number, or the default."""
    value = run.settings.get(name)
    return value if isinstance(value, int) and value > 0 else default


def quoted(text: str, chars: int = 60) -> str:
    """A model's text or a reference inside a line: short, and without what would break the line or the screen."""
    return repr(text if len(text) <= chars else f"{text[: chars // 2]}...{text[-chars // 2 :]}")
