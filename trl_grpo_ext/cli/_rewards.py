"""What the subcommands about rewards have in common: rewards by name."""

from typing import TYPE_CHECKING, Any

from ..exits import stop


if TYPE_CHECKING:
    from ..rewards import RewardBundle


def rewards_of(option: str, names: Any) -> "RewardBundle":
    """The rewards that an option names; ends with one line if there are none of that name."""
    from ..rewards.names import find_rewards

    try:
        return find_rewards(names)
    except ValueError as error:
        stop(2, f"--{option}: {error}")
