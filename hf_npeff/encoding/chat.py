"""Conversations: both schemas of the ecosystem's data sets, through a tokenizer's chat template.

A causal language model predicts what comes next. So the assistant's turn is opened, or, if the conversation ends
with the assistant, its last message is continued. A second turn is never opened.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from hf_npeff.encoding.column_names import SYSTEMS
from hf_npeff.encoding.record import ModelNeeds
from hf_npeff.encoding.values import as_python, at

_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "assistant": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool",
}  # fmt: skip
"""Roles in data sets that say "from" and "value", as ShareGPT does → those of chat templates."""
_MESSAGE_KEYS = 4
"""The most keys of a message: role, content, and for example a name, tool calls or a weight."""


def is_conversation(value: Any) -> bool:
    """Whether it is a list of messages, each with role and content, or with from and value."""
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(m, Mapping) and ("role" in m or ("from" in m and "value" in m)) for m in value)
    )


def is_single_message(value: Any) -> bool:
    """Whether it is a message and not an example: it has role and content, or from and value, and little else."""
    if not isinstance(value, Mapping):
        return False
    for role, content in (("role", "content"), ("from", "value")):
        if role in value and content in value and len(value) <= _MESSAGE_KEYS:
            return isinstance(value[role], str) and value[role].lower() in _ROLES
    return False


def messages_of(value: Any) -> list[dict[str, Any]]:
    """Messages with role and content.

    Raises:
        ValueError: if it is not a conversation, or a role is unknown.
    """
    value = as_python(value)
    if not is_conversation(value):
        raise ValueError(f"expected a list of messages with role and content, but got {str(value)[:80]!r}")
    messages = []
    for message in value:
        if "role" not in message:
            role = _ROLES.get(str(message["from"]).lower())
            if role is None:
                raise ValueError(f"a message is from {message['from']!r}, which is not one of {', '.join(_ROLES)}")
            message = {"role": role, "content": message["value"]}
        messages.append(_without_none(message))
    return messages


def conversation_of(record: Mapping[str, Any], columns: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The messages of a row, and the other arguments of its template.

    Args:
        record: the row.
        columns: the columns of the messages, and those beside them: the system message (`SYSTEMS`), tools, documents,
            chat_template_kwargs.

    Raises:
        ValueError: if the messages are not a conversation, the tools are not a list, or there are two system messages.
    """
    messages = messages_of(at(record, columns[0]))
    arguments: dict[str, Any] = {}
    for name in columns[1:]:
        value = as_python(record.get(name))
        if value is None or value == "" or value == []:
            continue
        if name in SYSTEMS:
            if messages[0]["role"] == "system" and messages[0].get("content") != value:
                raise ValueError(f"the column {name!r} and the conversation's own system message differ")
            if messages[0]["role"] != "system":
                messages = [{"role": "system", "content": str(value)}, *messages]
            continue
        if isinstance(value, str):
            value = json.loads(value)
        if name == "chat_template_kwargs":
            arguments |= _without_none(value)
        elif not isinstance(value, list):
            raise ValueError(f"the column {name!r} must have a list, but it has a {type(value).__name__}")
        else:
            arguments[name] = [_without_none(each) for each in value]
    return messages, arguments


def turn_of(messages: Sequence[Mapping[str, Any]], needs: ModelNeeds) -> dict[str, bool]:
    """How a template ends a conversation: `add_generation_prompt` and `continue_final_message`."""
    ends_with_assistant = messages[-1]["role"] == "assistant"
    opened = needs.generates and not ends_with_assistant
    continued = needs.continues and ends_with_assistant and needs.positions not in ("labels", "all")
    return {"add_generation_prompt": opened, "continue_final_message": continued}


def as_lines(messages: Sequence[Mapping[str, Any]]) -> str:
    """A conversation as people read it, with a line for each message."""
    return "\n".join(f"{m['role']}: {_content(m.get('content'))}" for m in messages)


def _content(content: Any) -> str:
    if isinstance(content, list):
        return " ".join(str(part.get("text", f"[{part.get('type')}]")) for part in content if isinstance(part, Mapping))
    return "" if content is None else str(content)


def _without_none(value: Any) -> Any:
    """A dictionary without the keys that Arrow fills with None because another row has them."""
    if isinstance(value, Mapping):
        return {key: _without_none(v) for key, v in value.items() if v is not None}
    return [_without_none(v) for v in value] if isinstance(value, list) else value
