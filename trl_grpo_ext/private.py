"""What is nobody else's business, in what a run writes: tokens, and where somebody's home folder is. Imports no torch.

Paths below the home folder are written as `~/...`, which [`expand_home`] makes paths of again where a file is read.
"""

import os
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


_SECRETS = ("token", "use_auth_token", "api_key", "password", "secret")
_ENDINGS_OF_SECRETS = ("_token", "_api_key", "_password", "_secret")
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
TILDE = f"~{os.sep}"


def is_secret(name: str) -> bool:
    """Whether a setting of this name is a token, a key or a password."""
    return name in _SECRETS or name.endswith(_ENDINGS_OF_SECRETS)


def without_credentials(text: str) -> str:
    """A text whose addresses have no user and no password."""
    return _CREDENTIALS.sub("", text)


def home_folder() -> str | None:
    """The home folder, without a separator at its end; `None` where it is not known, or the root of all paths."""
    home = os.path.expanduser("~")
    return None if home == "~" or Path(home) == Path(Path(home).anchor) else home.rstrip(os.sep)


def shorten_home(value: Any) -> Any:
    """A value whose texts that are paths below the home folder begin with `~`; lists and mappings are gone through.

    Example:
    ```python
    >>> shorten_home({"dataset_name": os.path.expanduser("~/train.jsonl"), "max_steps": 5})
    {'dataset_name': '~/train.jsonl', 'max_steps': 5}
    ```
    """
    home = home_folder()
    if home is None:
        return value

    def shorten(text: str) -> str:
        is_below = text == home or text.startswith(home + os.sep)
        return "~" + text[len(home) :] if is_below else text

    return _map_texts(shorten, value)


def expand_home(value: Any) -> Any:
    """What [`shorten_home`] has shortened, as it was; on another machine, below the home folder there."""
    return _map_texts(lambda text: os.path.expanduser(text) if text == "~" or text.startswith(TILDE) else text, value)


def hide_home(text: object) -> str:
    """A text for people, in which the home folder is `~` wherever it stands."""
    home = home_folder()
    return str(text) if home is None else str(text).replace(home + os.sep, TILDE)


def command_without_secrets(words: Sequence[str]) -> str:
    """A command line for a shell, with dots for tokens, and with `~` for the home folder where a shell expands it."""
    shown, hides = [], False
    for word in words:
        name, equals, _ = word.partition("=")
        is_option = name.startswith("--") and is_secret(name[2:].replace("-", "_"))
        if hides:
            shown.append("...")
        elif is_option and equals:
            shown.append(f"{name}=...")
        else:
            short = shorten_home(word)
            shown.append(short if short != word and shlex.quote(word) == word else shlex.quote(word))
        hides = is_option and not equals
    return " ".join(shown)


def _map_texts(change: Callable[[str], str], value: Any) -> Any:
    if isinstance(value, str):
        return change(value)
    if isinstance(value, Mapping):
        return {name: _map_texts(change, item) for name, item in value.items()}
    return [_map_texts(change, item) for item in value] if isinstance(value, list | tuple) else value
