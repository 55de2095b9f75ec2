"""Common shapes of conversation datasets, recognised by the names of their columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lightning_lora.errors import DataError, listed

Row = dict[str, Any]
Message = dict[str, Any]

ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "assistant", "bot", "model", "bing", "bard"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation"), "tool"),
    "function_call": "function_call",
}
"""Speaker in ShareGPT or LLaMA-Factory -> role in a chat template."""


class Shape(NamedTuple):
    """A kind of row, and the function that turns it into messages."""

    name: str
    asked: tuple[str, ...]
    """Columns that hold the question, or the whole conversation."""
    answered: tuple[str, ...]
    """Columns that hold the answer; not needed for predicting."""
    messages: Callable[[Row], list[Message]]


def shape_of(columns: Collection[str], split: str) -> Shape | None:
    """The shape of rows with these columns; None if no known shape fits. Raises DataError if several fit."""
    found = [s for s in SHAPES if {*s.asked, *(s.answered if split != "predict" else ())} <= set(columns)]
    if len(found) > 1:
        shapes = listed(f"{s.name} ({', '.join([*s.asked, *s.answered])})" for s in found)
        raise DataError(
            f"The {split} data has the columns of several shapes: {shapes}. Say which to take: messages_column, or "
            "prompt_column and response_column."
        )
    return found[0] if found else None


def _alpaca(row: Row) -> list[Message]:
    """Columns `instruction`, `input` (the text it is about) and `output`; maybe `system`, and `history` (earlier
    turns)."""
    asked = _text(row, "instruction")
    if row.get("input"):
        asked = f"{asked}\n\n{_text(row, 'input')}"
    said = [("system", _text(row, "system"))] if row.get("system") else []
    for turn in row.get("history") or []:
        if not isinstance(turn, (list, tuple)) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise DataError(f"history holds pairs of what was asked and answered, and not {turn!r:.120}")
        said += [("user", turn[0]), ("assistant", turn[1])]
    said.append(("user", asked))
    if row.get("output") is not None:
        said.append(("assistant", _text(row, "output")))
    return [{"role": role, "content": text} for role, text in said]


def _sharegpt(row: Row) -> list[Message]:
    """Column `conversations`: messages in any form that `as_message` reads. `system` may be a column of its own."""
    messages = [as_message(message, "conversations", ()) for message in _list(row, "conversations")]
    if row.get("system") and not any(message["role"] == "system" for message in messages):
        messages.insert(0, {"role": "system", "content": _text(row, "system")})
    return messages


def as_message(message: Message, column: str, roles: Collection[str]) -> Message:
    """A message of ShareGPT or LLaMA-Factory as a message of a chat template. If its role is one of `roles`, it is
    returned as it is.

    A function_call, whose text is JSON, becomes an assistant's message with tool_calls.
    """
    if message.get("role") in roles:
        return message
    who, said = ("from", "value") if message.get("from") is not None else ("role", "content")
    role, content = ROLES.get(str(message.get(who)).lower()), message.get(said)
    if role is None or not isinstance(content, str):
        raise DataError(
            f"A message of {column} has {who} (one of {listed(ROLES, 99)}) and {said} (a text), and not "
            f"{message!r:.120}"
        )
    rest = {key: value for key, value in message.items() if key not in (who, said)}
    if role == "function_call":
        try:
            calls = json.loads(str(content))
            calls = [{name: call[name] for name in ("name", "arguments")} for call in _several(calls)]
        except (ValueError, TypeError, KeyError):
            raise DataError(f"A function_call is JSON with name and arguments, and not {content!r:.120}") from None
        calls = [{"type": "function", "function": call} for call in calls]
        return {**rest, "role": "assistant", "content": "", "tool_calls": calls}
    return {**rest, "role": role, "content": content}


def _several(calls: Any) -> list[Any]:
    return calls if isinstance(calls, list) else [calls]


def _completion(row: Row) -> list[Message]:
    """`prompt` and `completion`: texts, or lists of messages."""
    messages = []
    for column, role in (("prompt", "user"), ("completion", "assistant")):
        if isinstance(row.get(column), list):
            # The assistant's answers inside the prompt are not learned.
            given = {"weight": 0} if column == "prompt" else {}
            messages += [{**given, **m, "role": str(m.get("role"))} for m in _list(row, column)]
        elif row.get(column) is not None or column == "prompt":
            messages.append({"role": role, "content": _text(row, column)})
    return messages


SHAPES = (
    Shape("alpaca", ("instruction",), ("output",), _alpaca),
    Shape("sharegpt", ("conversations",), (), _sharegpt),
    Shape("prompt and completion", ("prompt",), ("completion",), _completion),
)


def _text(row: Row, column: str) -> str:
    if not isinstance(row.get(column), str):
        raise DataError(f"{column} must be text, but there is {row.get(column)!r:.80}, in the row {row!r:.200}")
    return row[column]


def _list(row: Row, column: str) -> list[Row]:
    messages = row.get(column)
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise DataError(f"{column} must be a list of messages, but there is {messages!r:.120}")
    return messages
