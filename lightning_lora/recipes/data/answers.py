"""Finds the assistant's answers in a conversation's text, for templates that do not mark them by {% generation %}.

The conversation is rendered up to an answer, and again with another answer in its place; comparing the texts shows
where the answer is.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, Protocol

from lightning_lora.errors import DataError

Messages = list[dict[str, Any]]
Span = tuple[int, int]

UNHEARD = "\ue000"
"""A text that occurs in no conversation: a character for private use."""
OTHER_ANSWER = {"role": "assistant", "content": UNHEARD}
QUESTION = {"role": "user", "content": UNHEARD}


class Render(Protocol):
    """The text of messages; with `prompt`, followed by the opening of the assistant's next answer."""

    def __call__(self, messages: Messages, prompt: bool = False) -> str: ...


def find_answers(
    render: Render, messages: Messages, special: Collection[str], end: str | None
) -> tuple[str, list[Span]]:
    """The text of `messages`, which end with an answer, and the span of each answer, with the token that ends it.

    `special` are the tokenizer's special tokens. If the template ends an answer by the marker of the next role (GLM),
    that token counts as the end of the answer, and is added after the last answer too. If the template writes no such
    token at all, `end`, the end-of-text token, is added instead. Raises DataError if an answer cannot be found in the
    text.
    """
    text = render(messages)
    spans: list[Span] = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        start, stop, ended = _answer(render, messages, index, text, spans[-1][1] if spans else 0, special)
        if not ended:
            mark = _token_at(text, stop, special)
            if not mark and index == len(messages) - 1:
                mark = _marker_of_next(render, messages, special) or end or ""
                if not mark:
                    raise DataError(
                        "Nothing ends an answer: the chat template writes no special token after it, and the "
                        "tokenizer has no end-of-text token. A model that learned this would never stop."
                    )
                text = text[:stop] + mark
            stop += len(mark)
        spans.append((start, stop))
    return text, spans


def _answer(
    render: Render, messages: Messages, index: int, text: str, done: int, special: Collection[str]
) -> tuple[int, int, bool]:
    """Start and end of answer `index` in `text`, and True if the template ends it. The answer before it stops at
    `done`."""
    history = messages[:index] or [QUESTION]
    before, prompt = render(history), render(history, prompt=True)
    whole, changed = render([*history, messages[index]]), render([*history, OTHER_ANSWER])
    tail = _suffix(whole, changed)
    # `start` is less than the prompt's length if the prompt opens a <think> that the answer does not have.
    start, said = in_common(prompt, whole), in_common(whole, changed)
    if start < len(before) or not text.startswith(whole):
        # Later turns change the text before the answer, or the answer itself (Qwen 3 drops thoughts): search for it.
        if start < len(before):
            before, prompt = render([QUESTION]), render([QUESTION], prompt=True)
            whole, changed = render([QUESTION, messages[index]]), render([QUESTION, OTHER_ANSWER])
            start, said = in_common(prompt, whole), in_common(whole, changed)
        leads = [changed[start : max(start, changed.rfind(UNHEARD))], whole[start:said]]
        opening = prompt[len(before) :] if prompt.startswith(before) else UNHEARD
        whole, changed = text, render([*messages[:index], OTHER_ANSWER, *messages[index + 1 :]])
        said = in_common(whole, changed)
        starts = [said - len(lead) for lead in leads if text.endswith(lead, done, said)]
        start = starts[0] if starts else text.rfind(opening, done, said) + len(opening)
        if not starts and start < len(opening):
            raise _rewritten(prompt)
    if UNHEARD not in changed:
        raise DataError(f"The chat template does not write everything that the assistant says: {changed[-120:]!r}")
    said = len(whole) - len(_suffix(whole, changed))
    stop, ended = said + len(tail.rstrip()), bool(tail.strip())
    if not ended:
        stop = said + len(tail)
    elif not text.startswith(tail.rstrip(), said):  # the last answer has another end
        stop = said + len(_token_at(text, said, special))
        if stop == said:
            raise _rewritten(prompt)
    return start, stop, ended


def _marker_of_next(render: Render, messages: Messages, special: Collection[str]) -> str:
    """The special token that would begin the message after the last one; empty if there is none."""
    role = "tool" if messages[-1].get("tool_calls") else "user"
    some = [*messages[:-1], OTHER_ANSWER]
    try:
        return _token_at(render([*some, {"role": role, "content": UNHEARD}]), len(render(some)), special)
    except DataError:  # a template that takes no such message
        return ""


def _token_at(text: str, place: int, tokens: Collection[str]) -> str:
    return max((token for token in tokens if text.startswith(token, place)), key=len, default="")


def in_common(one: Sequence[Any], other: Sequence[Any]) -> int:
    """The length of the longest common start of `one` and `other`."""
    start, end = 0, min(len(one), len(other))
    while start < end:  # binary search: comparing slices is faster than comparing items
        middle = (start + end + 1) // 2
        if one[start:middle] == other[start:middle]:
            start = middle
        else:
            end = middle - 1
    return start


def _suffix(one: str, other: str) -> str:
    return one[len(one) - in_common(one[::-1], other[::-1]) :]


def _rewritten(prompt: str) -> DataError:
    return DataError(
        "The chat template writes earlier turns differently once later ones are there, so what the assistant says "
        f"cannot be told apart. Give another chat_template, or one answer per row: {prompt!r:.120}"
    )
