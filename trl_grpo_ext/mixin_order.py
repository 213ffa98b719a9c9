"""The one order in which the mixins may stand, checked when a class is made of them."""

from typing import TYPE_CHECKING, Any

from trl import GRPOTrainer

from . import compat


if TYPE_CHECKING:
    from trl import GRPOTrainer as _GRPOTrainer
else:
    _GRPOTrainer = object  # a mixin may stand before any subclass of TRL's

ORDER = ("WholeCheckpointsMixin", "MultiIterationMixin", "SharedPrefixMixin", "UndisturbedEvaluationMixin")


class OrderedMixin(_GRPOTrainer):
    """Base of the mixins: a class in which one of them cannot do its work is refused.

    Checkpoints are put in place when all has been written, so that mixin stands before those that write; rows are
    dealt out before they are packed; and behind TRL's trainer a mixin is never called.

    Raises:
        TypeError: When a class is made in which the mixins stand in another order, or behind `GRPOTrainer`.
        IncompatibleReleaseError: When a trainer is made with a TRL that has moved what the mixins need.
        ValueError: When it is made with settings for which an older TRL goes another way.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        places = [name for base in cls.__mro__ if (name := _name_of_mixin(base))]
        wanted = [name for name in (*ORDER, GRPOTrainer.__name__) if name in places]
        if places != wanted:
            bases = ", ".join([*wanted[:-1], "YourTrainer" if wanted[-1] == GRPOTrainer.__name__ else wanted[-1]])
            raise TypeError(
                f"{cls.__name__} has its bases in an order in which not all of them work ({', '.join(places)}): write "
                f"`class {cls.__name__}({bases})`, where YourTrainer is GRPOTrainer or your subclass of it"
            )

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        compat.check_release()
        super().__init__(*args, **kwargs)
        compat.check_state(self)
        compat.check_arguments(self)


def _name_of_mixin(base: type) -> str | None:
    if base is GRPOTrainer:
        return base.__name__
    return base.__name__ if base.__name__ in ORDER and base.__module__.startswith(f"{__package__}.") else None
