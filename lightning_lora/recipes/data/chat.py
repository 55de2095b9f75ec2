"""Encodes a conversation as token ids and labels: only the assistant's answers are learned.

transformers renders the text (`apply_chat_template`, with tools). If the template marks answers by {% generation %},
transformers says which parts are answers. This module adds the rest: the answers of other templates, the weight of a
message, and errors that name the row.
"""

from __future__ import annotations

import bisect
import copy
import json
import re
from dataclasses import dataclass, field
from typing import Any

import jinja2
from datasets import LargeList, List
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from lightning_lora.errors import DataError
from lightning_lora.recipes.data.answers import UNHEARD, Messages, Span, find_answers, in_common
from lightning_lora.recipes.data.shapes import ROLES, Shape, as_message
from lightning_lora.recipes.tasks.base import IGNORED

PLAIN_TEMPLATE = (
    "{%- if tools -%}{{ raise_exception('the plain template has no tools') }}{%- endif -%}"
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ '\n\n' }}{%- endif -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] }}"
    "{%- elif message['role'] == 'assistant' and not message['tool_calls'] -%}"
    "{{ '### Response:\n' + message['content'] + eos_token }}"
    "{%- else -%}{{ raise_exception('the plain template has no tools, and no role ' + message['role']) }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\n### Response:\n' }}{%- endif -%}"
)
"""The template for base models, whose tokenizer has none."""
LEARNED_OR_NOT = ("train", "training", "loss")
"""Keys of a message in axolotl and ms-swift that say what OpenAI's `weight` says: if the message is learned."""
GENERATION = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
"""The tag by which a template marks what the assistant says."""


def template_of(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str | dict[str, str]:
    """The chat template to use: `template` itself, the package's ("plain"), or the tokenizer's (None).

    If the tokenizer has several templates, transformers takes the one named tool_use for rows that have tools. The
    plain template starts with the beginning-of-text token if the tokenizer puts that before every text. Raises
    DataError if `template` is None and the tokenizer has none.
    """
    if template == "plain":
        first = tokenizer("a")["input_ids"][:1]
        begins = tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id]
        return ("{{- bos_token -}}" if begins else "") + PLAIN_TEMPLATE
    if template is not None:
        return template
    if not tokenizer.chat_template:
        raise DataError(
            "This model's tokenizer has no chat template. Give chat_template: plain for the package's own one, "
            "or Jinja text."
        )
    return tokenizer.chat_template


@dataclass
class ChatEncoder:
    """Encodes one row of a dataset. It is an object so that `datasets` can pickle it, and recognise it in its cache.

    Returns `input_ids`, `labels` and `attention_mask` (tokens,), cut at `max_length`; `length`, the number of tokens
    before the cut; `learned`, the number of learned tokens; and `unread_tools`, True if the template ignores the row's
    tools. With `prompts`, the `input_ids` are those of the conversation before the last answer, with the opening of an
    answer; a long prompt loses its start.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    system_prompt: str | None
    messages_column: str | None
    prompt_column: str
    response_column: str
    prompts: bool
    shape: Shape | None = None
    features: dict[str, Any] = field(default_factory=dict)
    """The features of the rows. Where one struct has a key and another does not, `datasets` fills the gap with None."""

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        row = {name: _unfilled(value, self.features.get(name)) for name, value in row.items()}
        chat = _Chat(self.tokenizer, row)
        messages = self._messages(chat, row)
        unread = chat.tools is not None and not chat.reads_tools(messages)
        if self.prompts:
            while messages[-1]["role"] == "assistant":
                messages.pop()
            ids = self._ids(chat.render(messages, prompt=True))
            cut = ids[-self.max_length :]  # the end of a long prompt has the question
            return {"input_ids": cut, "length": len(ids), "learned": 0, "unread_tools": unread}
        while messages[-1]["role"] != "assistant":
            messages.pop()
        ids, labels = self._tokenise(*self._answers(chat, messages))
        length, labels = len(ids), labels[: self.max_length]
        ids = ids[: self.max_length]
        # The first token has nothing before it that could predict it.
        learned = sum(label != IGNORED for label in labels[1:])
        of_tokens = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
        return {**of_tokens, "length": length, "learned": learned, "unread_tools": unread}

    def _messages(self, chat: _Chat, row: dict[str, Any]) -> Messages:
        if self.shape is not None:
            given = self.shape.messages(row)
        elif self.messages_column is not None:
            given = row[self.messages_column]
            if not isinstance(given, list) or not all(_is_message(message) for message in given):
                raise DataError(
                    f"Column {self.messages_column!r} must hold lists of messages with role and content (or from and "
                    f"value), but there is {given!r:.120}"
                )
            known = chat.roles_of(given)
            given = [as_message(message, self.messages_column, known) for message in given]
        else:
            texts = {"user": row[self.prompt_column]}
            if not self.prompts:
                texts["assistant"] = row[self.response_column]
            for text in texts.values():
                if not isinstance(text, str):
                    raise DataError(f"A prompt or response is not text but {text!r:.80}, in the row {row!r:.200}")
            given = [{"role": role, "content": text} for role, text in texts.items()]
        messages = [chat.as_template_has_it(message) for message in given]
        if self.system_prompt is not None and (not messages or messages[0]["role"] != "system"):
            messages = [{"role": "system", "content": self.system_prompt}, *messages]
        if not any(message["role"] == "user" for message in messages) or (
            not self.prompts and not any(message["role"] == "assistant" for message in messages)
        ):
            roles = [message["role"] for message in messages]
            raise DataError(
                f"A conversation needs a user and an assistant; this one has the roles {roles}: {row!r:.200}"
            )
        return messages

    def _answers(self, chat: _Chat, messages: Messages) -> tuple[str, list[Span]]:
        """The conversation's text, and the spans of it that are learned."""
        weights = [message.pop("weight", 1) for message in messages if message["role"] == "assistant"]
        for index, message in enumerate(messages):
            if message.get("tool_calls"):
                without = {name: value for name, value in message.items() if name != "tool_calls"}
                if chat.render(messages[: index + 1]) == chat.render([*messages[:index], {"content": "", **without}]):
                    raise DataError(f"The chat template does not write the tool_calls of {message!r:.200}")
        if GENERATION.search(chat.template):
            text, spans = chat.render_marked(messages)
            if 0 in weights and len(spans) != len(weights):
                raise DataError(
                    f"The chat template marks {len(spans)} parts of {len(weights)} answers by {{% generation %}}, so "
                    "which of them have weight 0 is not known."
                )
        else:
            special = {*self.tokenizer.all_special_tokens}
            special |= {token.content for token in self.tokenizer.added_tokens_decoder.values() if token.special}
            text, spans = find_answers(chat.render, messages, special, self.tokenizer.eos_token)
        return text, [span for span, weight in zip(spans, weights) if weight] if 0 in weights else spans

    def _tokenise(self, text: str, spans: list[Span]) -> tuple[list[int], list[int]]:
        if self.tokenizer.is_fast:
            encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            ids, places = encoded["input_ids"], encoded["offset_mapping"]
        else:
            # A slow tokenizer has no offsets. Count tokens instead: a span starts after the tokens of the text before
            # it, and ends with those of the text up to its end.
            ids = self._ids(text)
            places = [(index, index + 1) for index in range(len(ids))]
            spans = [(self._count(text[:start], ids), self._count(text[:stop], ids)) for start, stop in spans]
        starts, ends = [start for start, _ in places], [end for _, end in places]
        labels = [IGNORED] * len(ids)
        for start, stop in spans:  # all tokens with a character in the span
            of_span = slice(bisect.bisect_right(ends, start), bisect.bisect_left(starts, stop))
            labels[of_span] = ids[of_span]
        return ids, labels

    def _count(self, text: str, ids: list[int]) -> int:
        """The number of tokens at the start of `ids` that encode `text`, the beginning of their text."""
        return in_common(self._ids(text), ids)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


class _Chat:
    """Renders messages by the chat template, with the row's `tools` and `chat_template_kwargs`."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, row: dict[str, Any]) -> None:
        self.tokenizer = tokenizer
        self.tools: Any = _parsed(row.get("tools")) or None
        if isinstance(self.tools, list):
            self.tools = [_parsed(tool) for tool in self.tools]
        if self.tools is not None and not (
            isinstance(self.tools, list) and all(isinstance(tool, dict) for tool in self.tools)
        ):
            raise DataError(f"tools must be a list of JSON schemas, but there is {self.tools!r:.120}")
        if row.get("functions"):
            raise DataError("The column functions is of an older format. Give tools, and tool_calls in the messages.")
        self.options = _parsed(row.get("chat_template_kwargs")) or {}
        self.arguments_as_text = False
        self.template: str = tokenizer.get_chat_template(tools=self.tools)

    def render(self, messages: Messages, prompt: bool = False) -> str:
        return self._rendered(messages, add_generation_prompt=prompt)[0]

    def render_marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """The text, and the spans that the template marks by {% generation %} (transformers:
        `return_assistant_tokens_mask`)."""
        return self._rendered(messages, return_assistant_tokens_mask=True)

    def _rendered(self, messages: Messages, **options: Any) -> tuple[str, list[Span]]:
        """Renders as `apply_chat_template` does, but also returns the spans of the text that its mask is made from."""
        options |= {**self.tokenizer.special_tokens_map, **self.options}
        try:
            given = _arguments_as_text(messages) if self.arguments_as_text else messages
            rendered: Any = render_jinja_template([given], tools=self.tools, chat_template=self.template, **options)
        except (jinja2.TemplateError, TypeError, ValueError, AttributeError, KeyError) as error:
            if not self.arguments_as_text and any("tool_calls" in message for message in messages):
                self.arguments_as_text = True  # some templates (DeepSeek) accept only the older form
                try:
                    return self._rendered(messages, **options)
                except DataError:
                    self.arguments_as_text = False
            raise self._refused(error, messages) from error
        (text,), spans = rendered
        return text, spans[0] if spans else []

    def as_template_has_it(self, message: dict[str, Any]) -> dict[str, Any]:
        """`message` in the form of transformers' templates: the arguments of tool calls are dicts, the content is one
        text if the template does not read parts, and `weight` says if it is learned."""
        message = {name: value for name, value in message.items() if value is not None}
        for name in (name for name in ("weight", *LEARNED_OR_NOT) if name in message):
            if isinstance(message[name], str) or message[name] not in (0, 1):
                raise DataError(f"The {name} of a message is 0 or 1, and not {message[name]!r}: {message!r:.200}")
        if any(name in message for name in LEARNED_OR_NOT):
            given = [message.pop(name) for name in LEARNED_OR_NOT if name in message]
            if message.get("role") != "assistant" and any(given):
                raise DataError(f"Only what the assistant says can be learned, and this is not: {message!r:.200}")
            message["weight"] = int(all(given) and message.get("weight", 1))
        if message.get("train_detail"):
            raise DataError(f"Parts of a message cannot be left out (train_detail); give train: {message!r:.200}")
        calls = [{**call} for call in message.get("tool_calls") or []]
        for call in calls:
            of_call = call["function"] = {**call.get("function", {})} if "function" in call else call
            if isinstance(_parsed(of_call.get("arguments")), dict):
                of_call["arguments"] = _parsed(of_call["arguments"])
        if calls:
            message["tool_calls"] = calls
        parts = message.get("content")
        if isinstance(parts, list):
            texts = [part if isinstance(part, str) else part.get("text") for part in parts]
            if not all(isinstance(text, str) for text in texts):
                raise DataError(f"Only parts that are text can be read here: {message!r:.200}")
            if not self._reads_parts():
                message["content"] = "".join(texts)
        return message

    def roles_of(self, messages: Messages) -> set[Any]:
        """The roles that the template gets unchanged: those of chat templates, and any in `messages` that is not in
        ROLES."""
        known = {"system", "user", "assistant", "tool", *(["observation"] if "observation" in self.template else [])}
        return known | {message.get("role") for message in messages} - ROLES.keys() - {None}

    def reads_tools(self, messages: Messages) -> bool:
        """True if the text changes when the tools are left out. A template that fails without tools reads them."""
        without = copy.copy(self)
        without.tools = None
        try:
            return self.render(messages) != without.render(messages)
        except DataError:
            return True

    def _reads_parts(self) -> bool:
        """True if the template writes a list of text parts in the same way as one text."""
        part = {"type": "text", "text": UNHEARD}
        try:
            texts = [self.render([{"role": "user", "content": content}]) for content in ([part], UNHEARD)]
        except DataError:
            return False
        return texts[0] == texts[1]

    def _refused(self, error: Exception, messages: Messages) -> DataError:
        hint = ""
        if "eos_token" in str(error) or "bos_token" in str(error):
            hint = " The tokenizer has no such token: set it, or give another chat_template."
        said = " ".join(str(error).split())
        return DataError(f"The chat template refuses a conversation: {said}.{hint} It is {messages!r:.300}")


def _arguments_as_text(messages: Messages) -> Messages:
    """`messages` with the arguments of tool calls as JSON text, as OpenAI has them."""
    changed = copy.deepcopy(messages)
    for call in (call for message in changed for call in message.get("tool_calls", [])):
        of_call = call.get("function", call)
        if not isinstance(of_call.get("arguments"), str):
            of_call["arguments"] = json.dumps(of_call.get("arguments"), ensure_ascii=False)
    return changed


def _is_message(message: Any) -> bool:
    if not isinstance(message, dict):
        return False
    return {"role", "content"} <= message.keys() or {"from", "value"} <= message.keys() or "tool_calls" in message


def _parsed(value: Any) -> Any:
    """The value of a JSON text; anything else is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _unfilled(value: Any, feature: Any) -> Any:
    """`value` without the Nones that Arrow fills into structs. The Nones of JSON columns stay: they are in the data."""
    if isinstance(feature, dict) and isinstance(value, dict):
        return {name: _unfilled(of, feature.get(name)) for name, of in value.items() if of is not None}
    if isinstance(feature, (List, LargeList)) and isinstance(value, list):
        return [_unfilled(of, feature.feature) for of in value]
    return value
