"""A conversation into token ids, with a mask of what the assistant says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import DataError
from lightning_lora.training.tasks.base import IGNORED

PLAIN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if not loop.first -%}{{ '\n\n' }}{%- endif -%}"
    "{%- if message['role'] == 'system' -%}{{ message['content'] }}"
    "{%- elif message['role'] == 'user' -%}{{ '### Instruction:\n' + message['content'] }}"
    "{%- else -%}{{ '### Response:\n' + message['content'] + eos_token }}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '\n\n### Response:\n' }}{%- endif -%}"
)
"""For base models, whose tokenizer has no template of its own."""

Messages = list[dict[str, Any]]


def template_of(tokenizer: PreTrainedTokenizerBase, template: str | None) -> str:
    """The chat template to use: `template`, "plain", or the tokenizer's own. Raises DataError if it has none."""
    if template == "plain":
        return PLAIN_TEMPLATE
    if template is not None:
        return template
    own = tokenizer.chat_template
    if not own:
        raise DataError(
            "This model's tokenizer has no chat template. Give chat_template: plain for the package's own one, "
            "or Jinja text."
        )
    return own["default"] if isinstance(own, dict) else own


@dataclass
class ChatEncoder:
    """Encode one row of a dataset; an object so that `datasets` can pickle it, and know it again in its cache.

    Gives `input_ids`, `labels` and `attention_mask` (tokens,), cut at `max_length`, the `length` before that, and how
    many tokens are `learned`. With `prompts`, the `input_ids` before the last answer, with the head of an answer.
    """

    tokenizer: PreTrainedTokenizerBase
    max_length: int
    system_prompt: str | None
    messages_column: str | None
    prompt_column: str
    response_column: str
    prompts: bool

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        messages = self._messages(row)
        if self.prompts:
            while messages and messages[-1]["role"] == "assistant":
                messages.pop()
            ids = self._ids(self._render(messages, prompt=True))
            return {"input_ids": ids[-self.max_length :]}  # the end of a long prompt is what is to be answered
        ids, labels = self._tokenise(self._pieces(messages))
        length, labels = len(ids), labels[: self.max_length]
        ids = ids[: self.max_length]
        # The first token has nothing before it that could predict it.
        learned = sum(label != IGNORED for label in labels[1:])
        mask = [1] * len(ids)
        return {"input_ids": ids, "labels": labels, "attention_mask": mask, "length": length, "learned": learned}

    def _messages(self, row: dict[str, Any]) -> Messages:
        if self.messages_column is not None:
            messages = row[self.messages_column]
            if not isinstance(messages, list) or not all(
                isinstance(message, dict) and {"role", "content"} <= message.keys() for message in messages
            ):
                raise DataError(
                    f"Column {self.messages_column!r} must hold lists of messages with role and content, but there is "
                    f"{messages!r:.120}"
                )
            # `datasets` fills what one message lacks and another has with None, which templates print.
            messages = [{name: value for name, value in message.items() if value is not None} for message in messages]
        else:
            texts = {"user": row[self.prompt_column]}
            if not self.prompts:
                texts["assistant"] = row[self.response_column]
            for text in texts.values():
                if not isinstance(text, str):
                    raise DataError(f"A prompt or response is not text but {text!r:.80}, in the row {row!r:.200}")
            messages = [{"role": role, "content": text} for role, text in texts.items()]
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

    def _render(self, messages: Messages, prompt: bool = False) -> str:
        text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        assert isinstance(text, str)
        return text

    def _pieces(self, messages: Messages) -> list[tuple[str, bool]]:
        """The conversation's text up to its last answer, in pieces, and whether each is to be learned."""
        pieces: list[tuple[str, bool]] = []
        done = ""
        for index, message in enumerate(messages):
            if message["role"] != "assistant":
                continue
            prompt = self._render(messages[:index], prompt=True)
            whole = self._render(messages[: index + 1])
            if not prompt.startswith(done) or not whole.startswith(prompt):
                raise DataError(
                    "The chat template writes earlier turns differently once later ones are there, so what the "
                    "assistant says cannot be told apart. Give another chat_template, or one answer per row: "
                    f"{prompt!r:.120}"
                )
            pieces += [(prompt[len(done) :], False), (whole[len(prompt) :], True)]
            done = whole
        return pieces

    def _tokenise(self, pieces: list[tuple[str, bool]]) -> tuple[list[int], list[int]]:
        if not self.tokenizer.is_fast:
            # Without offsets, piece by piece: as at inference, where the prompt is tokenised alone.
            parts = [(self._ids(text), learn) for text, learn in pieces]
            ids = [token for part, _ in parts for token in part]
            return ids, [token if learn else IGNORED for part, learn in parts for token in part]
        encoded = self.tokenizer(
            "".join(text for text, _ in pieces), add_special_tokens=False, return_offsets_mapping=True, verbose=False
        )
        learned_characters = [learn for text, learn in pieces for _ in text]
        ids = encoded["input_ids"]
        labels = [
            token if start < end and learned_characters[start] else IGNORED
            for token, (start, end) in zip(ids, encoded["offset_mapping"], strict=True)
        ]
        return ids, labels

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
