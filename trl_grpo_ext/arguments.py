"""A script's options, parsed as TRL does: what is wrong is said in one line, which suggests the nearest name.

Where TRL is not installed, [`trl_grpo_ext.plain_parser`] parses the options of what does without it.

Importing this module, parsing and `--help` import no torch, unless the options themselves do.
"""

import os
import re
from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import MISSING, Field, fields
from textwrap import dedent, indent
from types import UnionType
from typing import Any, NoReturn, Union, get_args, get_origin, get_type_hints

from yaml import YAMLError

from .exits import stop
from .private import expand_home
from .spelling import suggestion


try:
    from trl import TrlParser
except ModuleNotFoundError as error:  # where there is no trainer, the options are few and plain
    if error.name != "trl":
        raise
    from .plain_parser import PlainParser as TrlParser

# What TRL looks at in the first step only.
CHOICES: dict[str, tuple[Any, ...]] = {
    "scale_rewards": ("group", "batch", "none", True, False),
    "importance_sampling_level": ("token", "sequence"),
    "multi_objective_aggregation": ("sum_then_normalize", "normalize_then_sum"),
}
# Texts that name something for people: in a file, a number or a date is one too.
LABELS = ("run_name", "project", "hub_model_id", "model_revision", "hub_revision", "dataset_config")


class ArgumentError(ValueError):
    """Options that cannot be had; the message is one line."""


class OneLineParser(TrlParser):
    """TRL's parser, which raises [`ArgumentError`] instead of printing how a script with 230 options is used.

    Args:
        dataclass_types (a dataclass or an iterable of them, *optional*):
            The options.
        example (`str`, *optional*):
            Command lines that `--help` shows at its end, as they stand here.
        **kwargs:
            What `argparse.ArgumentParser` takes.

    Attributes:
        given (`dict[str, Any]`):
            After parsing: each option's value as it was asked for, on the command line, in the file or by default;
            before the dataclasses fill in what depends on the machine and the number of processes.
    """

    given: dict[str, Any]

    def __init__(self, dataclass_types: Any = None, *, example: str | None = None, **kwargs: Any) -> None:
        super().__init__(dataclass_types, **{"allow_abbrev": False, **kwargs})
        self.example = example

    def format_help(self) -> str:
        if self.example is None:
            return super().format_help()
        return f"{super().format_help()}\nexample:\n{indent(dedent(self.example).strip(), '  ')}\n"

    def error(self, message: str) -> NoReturn:
        choice = re.search(r"invalid choice: '?(.*?)'? \(choose from (.*)\)", message)
        if choice is not None:
            message += suggestion(choice[1], [name.strip(" '") for name in choice[2].split(",")])
        raise ArgumentError(message)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> tuple[Any, list[str]]:
        parsed, remaining = super().parse_known_args(args, namespace)
        self.given = dict(vars(parsed))
        self._check_values()
        for name, value in self.given.items():  # lists of a file, with numbers for texts
            setattr(parsed, name, value)
        self.given = deepcopy(self.given)  # some dataclasses put objects into the lists that they are given
        return parsed, remaining

    def _check_values(self) -> None:
        """Hold values from a file against what the command line takes: TRL's parser looks at their names alone."""
        uses_deepspeed = self.given.get("deepspeed") or os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true"
        if uses_deepspeed and not _is_deepspeed_available():  # else transformers fails in the middle of something
            raise ArgumentError(
                "DeepSpeed is not installed: install it (pip install deepspeed), or choose a launch configuration "
                "without it"
            )
        # not the fields' types: transformers' parser changes them
        hints = {name: hint for kind in self.dataclass_types for name, hint in get_type_hints(kind).items()}
        for item in self._fields():
            self.given[item.name] = expand_home(self.given[item.name])  # as run.yaml has it
            value, choices = self.given[item.name], item.metadata.get("choices") or _choices_of(item.name)
            kinds = get_args(hints[item.name]) if get_origin(hints[item.name]) in (Union, UnionType) else ()
            kinds = kinds or (hints[item.name],)
            if value is None:
                if item.default not in (None, MISSING, "") and type(None) not in kinds:
                    raise ArgumentError(f"{item.name}: there is no value; leave the option out for its default")
                continue
            self.given[item.name] = value = _check_kind(item.name, value, kinds)
            if choices is not None and value not in choices:
                listed, nearest = ", ".join(map(repr, choices)), suggestion(str(value), map(str, choices))
                raise ArgumentError(f"{item.name}: got {value!r}, which is none of {listed}{nearest}")
            if (item.type is int and isinstance(value, float) and value.is_integer()) or (
                item.type is bool and type(value) is int and value in (0, 1)
            ):
                self.given[item.name] = value = item.type(value)
            for kind, types in ((int, int), (float, (int, float)), (bool, bool)):
                if item.type is kind and not isinstance(value, types):
                    raise ArgumentError(f"{item.name}: got {value!r}, which is no {kind.__name__}")

    def _fields(self) -> list[Field]:
        return [item for kind in self.dataclass_types for item in fields(kind) if item.init]

    def parse_or_stop(self, arguments: Sequence[str], ignore: Iterable[str] = ()) -> tuple[Any, ...]:
        """[`parse_script`], where options that cannot be had end the process with one line and status 2."""
        try:
            return self.parse_script(arguments, ignore)
        except ArgumentError as error:
            stop(2, error)

    def parse_known_script(self, arguments: Sequence[str]) -> tuple[Any, ...]:
        """[`parse_script`], which leaves what is no option to the caller.

        Returns:
            `tuple`:
                What [`parse_script`] returns; behind it what of the file is no option, as `--name`, value, and so on;
                and what of the command line is none.
        """
        arguments = _split_config(arguments)
        if arguments.count("--config") > 1:
            raise ArgumentError("--config is there twice: name one file")
        if arguments[-1:] == ["--config"]:
            raise ArgumentError("--config: the file's name is missing")
        try:
            return self.parse_args_and_config(
                arguments, return_remaining_strings=True, separate_remaining_strings=True
            )
        except YAMLError as error:
            raise ArgumentError(f"{_file_of(arguments)}: {error}") from error
        except (ValueError, TypeError, OSError, ImportError, RuntimeError) as error:
            message = str(error)
            choice = re.search(r"(\S+) is not a valid \w+, please select one of \[(.*)\]", message)
            if choice is not None:
                message += suggestion(choice[1].strip("'"), [name.strip(" '") for name in choice[2].split(",")])
            raise ArgumentError(message) from error

    def parse_script(self, arguments: Sequence[str], ignore: Iterable[str] = ()) -> tuple[Any, ...]:
        """The dataclasses, from the command line and the file that `--config` names there.

        Args:
            arguments (`Sequence[str]`):
                The command line.
            ignore (`Iterable[str]`):
                Keys of the file that are no options.

        Returns:
            `tuple`:
                The dataclasses, and behind them a namespace of what was added with `add_argument`, if anything was.
        """
        arguments = _split_config(arguments)
        *parsed, in_file, on_command_line = self.parse_known_script(arguments)
        names = {item.name for item in self._fields()}
        for option in on_command_line:
            name = option.partition("=")[0].lstrip("-").replace("-", "_")
            if option.startswith("--"):
                raise ArgumentError(f"there is no option {option.partition('=')[0]}{suggestion(name, names, '--')}")
            raise ArgumentError(f"{option!r} belongs to no option")
        for option in in_file[::2]:
            name = option.removeprefix("--")
            if name not in ignore:
                raise ArgumentError(f"{_file_of(arguments)}: there is no option {name!r}{suggestion(name, names)}")
        return tuple(parsed)


def _choices_of(name: str) -> tuple[Any, ...] | None:
    if name in ("loss_type", "vllm_importance_sampling_mode"):
        from .objective import LOSS_TYPES, SAMPLING_MODES  # here, because it imports torch: few scripts have them

        return tuple(LOSS_TYPES) if name == "loss_type" else SAMPLING_MODES
    return CHOICES.get(name)


def _is_deepspeed_available() -> bool:
    from accelerate.utils import is_deepspeed_available  # here, because it imports torch

    return is_deepspeed_available()


def _check_kind(name: str, value: Any, kinds: Sequence[Any]) -> Any:
    """A value that is of one of these types, numbers in lists made of texts; raises for another one."""
    without_none = [kind for kind in kinds if kind is not type(None)]
    if int in without_none and str in without_none and isinstance(value, str) and value.isdecimal():
        return int(value)  # the command line knows one type an option: a number or a word comes as text
    if without_none == [str] and name in LABELS and not isinstance(value, (str, bool, list, dict)):
        return str(value)
    if without_none == [str] and not isinstance(value, (str, bool)):
        raise ArgumentError(f"{name}: got {value!r}, which is no text")
    if name.endswith("_kwargs") and not (isinstance(value, dict) or str(value).lstrip().startswith("{")):
        raise ArgumentError(f"{name}: got {value!r}, which is no mapping of names to values")
    if len(without_none) == 1 and get_origin(without_none[0]) is list:
        kind = get_args(without_none[0])[0]
        if not isinstance(value, list) and not (kind is str and isinstance(value, str)):  # one name may stand alone
            raise ArgumentError(f"{name}: got {value!r}, which is no list")
        if kind in (int, float):
            try:
                return [kind(item) if isinstance(item, str) else item for item in value]
            except ValueError as error:
                raise ArgumentError(f"{name}: {error}") from error
    return value


def _split_config(arguments: Sequence[str]) -> list[str]:
    """TRL's parser knows `--config FILE`; other options may be written `--option=VALUE` as well."""
    pairs = (argument.split("=", 1) if argument.startswith("--config=") else [argument] for argument in arguments)
    return [part for pair in pairs for part in pair]


def _file_of(arguments: Sequence[str]) -> str:
    return arguments[list(arguments).index("--config") + 1]
