"""TRL's parser of options, as far as the commands that only score need it, for where TRL is not installed.

`--help`, `--config FILE` and errors are those of `trl.TrlParser`, which [`trl_grpo_ext.arguments`] takes where TRL is.
"""

import os
from argparse import Action, ArgumentDefaultsHelpFormatter, ArgumentParser, ArgumentTypeError
from collections.abc import Callable, Iterable
from dataclasses import MISSING, Field, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Union, get_args, get_origin, get_type_hints

import yaml


TRUE, FALSE = ("yes", "true", "t", "y", "1"), ("no", "false", "f", "n", "0")


class PlainParser(ArgumentParser):
    """Options from dataclasses: texts, numbers, lists of these, each perhaps `None`, and flags that are off at first.

    Args:
        dataclass_types (a dataclass or an iterable of them, *optional*):
            The options.
        **kwargs:
            What `argparse.ArgumentParser` takes.
    """

    def __init__(self, dataclass_types: Any = None, **kwargs: Any) -> None:
        self._added: list[Action] = []  # before: argparse adds `--help` itself
        super().__init__(**{"formatter_class": ArgumentDefaultsHelpFormatter, **kwargs})
        kinds = dataclass_types if isinstance(dataclass_types, Iterable) else [dataclass_types]
        self.dataclass_types = [kind for kind in kinds if kind is not None]
        for kind in self.dataclass_types:
            hints = get_type_hints(kind)
            for item in fields(kind):
                if item.init:
                    self._add(item, hints[item.name])

    def add_argument(self, *names: Any, **options: Any) -> Action:
        self._added.append(super().add_argument(*names, **options))
        return self._added[-1]

    def _add(self, item: Field, hint: Any) -> None:
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        kind = next(kind for kind in kinds if kind is not NoneType)
        item.type = kind  # as TRL's does: what looks at the fields afterwards sees no union
        names = [f"--{item.name}", *([f"--{item.name.replace('_', '-')}"] if "_" in item.name else [])]
        default = item.default if item.default_factory is MISSING else item.default_factory()
        options: dict[str, Any] = dict(item.metadata)
        options |= {"required": True} if default is MISSING else {"default": default}
        if kind is bool:
            options |= {"type": _to_bool, "default": default is not MISSING and default, "required": False}
            options |= {"nargs": "?", "const": True}
        elif get_origin(kind) is list:
            options |= {"type": get_args(kind)[0], "nargs": "+"}
        else:
            options["type"] = _or_none(kind) if NoneType in kinds and kind is not str else kind
        self.add_argument(*names, **options)

    def parse_args_into_dataclasses(self, args: Any = None, return_remaining_strings: bool = False) -> tuple[Any, ...]:
        """The dataclasses, behind them a namespace of what `add_argument` has added, and what is no option.

        Raises:
            ValueError: If something is no option, and is not asked for.
        """
        namespace, remaining = self.parse_known_args(args)
        values, made = vars(namespace), []
        for kind in self.dataclass_types:
            made.append(kind(**{item.name: values.pop(item.name) for item in fields(kind) if item.init}))
        made += [namespace] if values else []
        if return_remaining_strings:
            return *made, remaining
        if remaining:
            raise ValueError(f"these are no options: {remaining}")
        return tuple(made)

    def parse_args_and_config(
        self,
        args: Iterable[str],
        return_remaining_strings: bool = False,
        separate_remaining_strings: bool = False,
    ) -> tuple[Any, ...]:
        """As [`parse_args_into_dataclasses`], with the values of the file that `--config` names as defaults.

        Args:
            args (`Iterable[str]`):
                The command line.
            return_remaining_strings (`bool`, *optional*, defaults to `False`):
                Whether what is no option is given back, instead of being an error.
            separate_remaining_strings (`bool`, *optional*, defaults to `False`):
                Whether what is none in the file stands by itself, before what is none on the command line.
        """
        args, in_file = list(args), []
        if "--config" in args:
            index = args.index("--config")
            path = args[index + 1]
            del args[index : index + 2]
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            if not isinstance(content, dict):
                raise ValueError(f"Config file {path} must contain a YAML mapping.")
            variables = content.pop("env", {})
            if not isinstance(variables, dict):
                raise ValueError("`env` field should be a dict in the YAML file.")
            os.environ.update({name: str(value) for name, value in variables.items()})
            in_file = self._set_defaults(content)
        *made, on_command_line = self.parse_args_into_dataclasses(args, return_remaining_strings=True)
        if return_remaining_strings and separate_remaining_strings:
            return *made, in_file, on_command_line
        if return_remaining_strings:
            return *made, in_file + on_command_line
        if in_file or on_command_line:
            raise ValueError(f"these are no options: {in_file + on_command_line}")
        return tuple(made)

    def _set_defaults(self, values: dict[str, Any]) -> list[str]:
        """Take values of a file as defaults; returns those that are of no option, as a command line has them."""
        for action in self._added:
            if action.dest in values:
                action.default, action.required = values[action.dest], False
        known = {action.dest for action in self._added}
        return [word for name, value in values.items() if name not in known for word in (f"--{name}", str(value))]


def _to_bool(text: Any) -> bool:
    if isinstance(text, bool):
        return text
    if text.lower() in TRUE or text.lower() in FALSE:
        return text.lower() in TRUE
    raise ArgumentTypeError(
        f"Truthy value expected: got {text} but expected one of yes/no, true/false, t/f, y/n, 1/0 (case insensitive)."
    )


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    def parse(text: str) -> Any:
        return None if text.lower() in ("none", "null") else kind(text)

    parse.__name__ = getattr(kind, "__name__", "value")  # argparse's messages name it
    return parse
