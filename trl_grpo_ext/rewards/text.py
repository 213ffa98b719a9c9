"""A completion, in any of the forms in which trainers pass one, to its text."""

from collections.abc import Mapping, Sequence
from typing import Any


def completion_to_text(completion: Any) -> str:
    """Return the text of one completion.

    Args:
        completion (`str`, `list[dict]`, `dict` or `None`):
            A plain string; a list of messages, of which the last assistant message counts (messages without a role
            are taken for the assistant's); a single message; or `None`. A message's content is a string, a list of
            parts (those of type `"text"` are joined), or `None`.

    Returns:
        `str`:
            The text, `""` where there is none. Never raises.
    """
    if isinstance(completion, str):
        return completion
    if isinstance(completion, Mapping):
        return _content_to_text(completion.get("content"))
    if isinstance(completion, Sequence):
        for message in reversed(completion):
            if isinstance(message, Mapping) and message.get("role", "assistant") == "assistant":
                return _content_to_text(message.get("content"))
    return ""


def _content_to_text(content: Any) -> str:
    if isinstance(content, str):
        return content
    if isinstance(content, Sequence):
        return "".join(map(_part_to_text, content))
    return ""


def _part_to_text(part: Any) -> str:
    if isinstance(part, Mapping):
        part = part.get("text") if part.get("type", "text") == "text" else None
    return part if isinstance(part, str) else ""
