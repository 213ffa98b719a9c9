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

    Example:
    ```python
    >>> completion_to_text([{"role": "assistant", "content": "14"}])
    '14'
    ```
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


def conversation_to_text(messages: Any) -> str:
    """A prompt or completion as people read it: of several messages each with its role, and with its tool calls.

    Args:
        messages (`str`, `list[dict]`, `dict` or `None`):
            As in [`completion_to_text`].

    Returns:
        `str`:
            The text, `""` where there is none. Never raises.
    """
    if isinstance(messages, str):
        return messages
    if isinstance(messages, Mapping):
        messages = [messages]
    if not isinstance(messages, Sequence):
        return ""
    messages = [message for message in messages if isinstance(message, Mapping)]
    texts = [_message_to_text(message) for message in messages]
    if len(texts) == 1:
        return texts[0]
    return "\n\n".join(f"{message.get('role', '')}: {text}" for message, text in zip(messages, texts, strict=True))


def _message_to_text(message: Mapping[str, Any]) -> str:
    calls = message.get("tool_calls")
    called = [f"[calls {_call_to_text(call)}]" for call in calls] if isinstance(calls, list | tuple) else []
    content = _content_to_text(message.get("content"))
    return "\n".join([content, *called] if content or not called else called)


def _call_to_text(call: Any) -> str:
    function = call.get("function", call) if isinstance(call, Mapping) else call
    if not isinstance(function, Mapping):
        return str(function)
    return f"{function.get('name', '')}({function.get('arguments', '')})"


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
