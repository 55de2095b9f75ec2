"""Instructions and answers for causal language models: the prompt is read, the answer is learned."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening

from lightning_lora.checked import closest
from lightning_lora.errors import ConfigError, DataError, listed
from lightning_lora.recipes.data.base import PadPacked, PadRows, SourceData
from lightning_lora.recipes.data.chat import ChatEncoder, template_of
from lightning_lora.recipes.data.shapes import Shape, shape_of
from lightning_lora.recipes.data.source import Source
from lightning_lora.recipes.data.text import Prompts
from lightning_lora.recipes.models import ModelSource

_DEFAULT_COLUMNS = ("messages", "prompt", "response")


class InstructionData(SourceData):
    """Conversations through the model's chat template; only what the assistant says is predicted.

    Rows have a column `messages_column` of messages (dicts of `role` and `content`), or the columns `prompt_column` and
    `response_column`. If these three settings have their defaults, rows of other common shapes are accepted too:
    instruction, input and output (alpaca), conversations (ShareGPT), prompt and completion. `system_prompt` is put
    before conversations that have none. `chat_template` is the tokenizer's own (None), "plain" (the package's, for base
    models that have none), or Jinja text.

    The template gets the columns `tools` (a list of JSON schemas, or its text) and `chat_template_kwargs`. Messages may
    have `tool_calls`, text in parts, and `weight`: an answer of weight 0 (axolotl: `train: false`) is read but not
    learned. If the template marks text by {% generation %}, that text is learned; otherwise each answer is learned,
    with the token that ends it.

    A conversation is cut at `max_length` tokens, or at the model's own context where that is less. One that has no
    answer to learn is left out. Both are counted in a warning.

    `packing` puts several conversations into a row of `max_length` tokens. They do not see each other: `position_ids`
    restart at 0 in each, which transformers' masks for eager, sdpa and flex attention take as a border; flash attention
    gets the borders as `cu_seq_lens_q` and the like. CausalLM tries its model on the first packed batch, and raises
    ConfigError if the model mixes conversations nevertheless (ALiBi, state-space and some others).

    Batches have `input_ids`, `labels` (-100 where nothing is predicted) and `attention_mask`, or, when packed,
    `position_ids`; all (rows, tokens). For predicting, they have the prompt up to the last answer, padded on the left.
    """

    def __init__(
        self,
        tokenizer: ModelSource,
        source: Source,
        messages_column: str = "messages",
        prompt_column: str = "prompt",
        response_column: str = "response",
        system_prompt: str | None = None,
        chat_template: str | None = None,
        max_length: int = 1024,
        packing: bool = False,
        batch_size: int = 8,
        num_workers: int = 0,
    ) -> None:
        super().__init__(source, batch_size, num_workers)
        if max_length < 2:
            raise ConfigError(f"max_length is {max_length}; it must be at least 2 tokens.")
        self.tokenizer = tokenizer.tokenizer()
        self.tokenizer.chat_template = template_of(self.tokenizer, chat_template)
        self.messages_column = messages_column
        self.prompt_column = prompt_column
        self.response_column = response_column
        self.system_prompt = system_prompt
        self.max_length = max_length
        self.limit = min(max_length, tokenizer.context() or max_length)
        self.packing = packing
        self.collate = (PadPacked if packing else PadRows)(self.tokenizer.pad_token_id or 0)
        self.collate_prompts = PadRows(self.tokenizer.pad_token_id or 0, side="left")

    def encode(self, rows: Any, split: str) -> Dataset:
        columns, shape = self._columns(rows.column_names, split)
        encoder = ChatEncoder(
            self.tokenizer, self.limit, self.system_prompt, *columns, split == "predict", shape, dict(rows.features)
        )
        encoded = rows.map(encoder, remove_columns=rows.column_names, desc=f"Applying the chat template to {split}")
        lengths, learned = encoded["length"], encoded["learned"]
        cut, unread = sum(length > self.limit for length in lengths), sum(encoded["unread_tools"])
        if unread:
            rank_zero_warn(f"{split}: the chat template does not write the tools that {unread} conversations have.")
        if split == "predict":
            if cut:
                rank_zero_warn(
                    f"{split}: {cut} of {len(encoded)} prompts are longer than {self._why()}; their ends are answered."
                )
            return Prompts(encoded, self.limit)
        kept = [index for index, count in enumerate(learned) if count > 0]
        if not kept:
            raise DataError(
                f"None of the {len(encoded)} {split} conversations has an answer to learn within {self._why()}; the "
                f"shortest is {min(lengths)} tokens long. Raise max_length, or see whether all have weight 0."
            )
        if cut or len(kept) < len(encoded):
            rank_zero_warn(
                f"{split}: {cut} of {len(encoded)} conversations are longer than {self._why()} and were cut; "
                f"{len(encoded) - len(kept)} have no answer to learn and were left out."
            )
        encoded = encoded.select(kept)
        if self.packing:
            return PackedRows(encoded, pack([min(lengths[index], self.limit) for index in kept], self.max_length))
        return encoded.select_columns(["input_ids", "labels", "attention_mask"])

    def _why(self) -> str:
        of_model = f", all that the model knows (max_length={self.max_length})" if self.limit < self.max_length else ""
        return f"{'max_length=' * (not of_model)}{self.limit} tokens{of_model}"

    def _columns(self, there: Sequence[str], split: str) -> tuple[tuple[str | None, str, str], Shape | None]:
        named = (self.messages_column, self.prompt_column, self.response_column)
        pair = None, self.prompt_column, self.response_column
        if self.messages_column in there:
            return named, None
        if {self.prompt_column, self.response_column} <= set(there):
            return pair, None
        shape = shape_of(there, split) if named == _DEFAULT_COLUMNS else None
        if shape is not None or (split == "predict" and self.prompt_column in there):
            return pair, shape
        meant = closest(self.messages_column, there, count=1)
        guess = f" Did you mean {meant[0]!r}?" if meant else ""
        raise DataError(
            f"The {split} data has no column {self.messages_column!r}. Its columns are: {listed(there)}.{guess} Needed "
            "are messages_column, or prompt_column and response_column. By their own names these are taken: "
            "instruction, input and output (alpaca), conversations (ShareGPT), prompt and completion."
        )


class PackedRows(Dataset):
    """Several rows as one: positions start at 0 in each, and the first token of each is not predicted."""

    def __init__(self, rows: Any, groups: list[list[int]]) -> None:
        self.rows = rows.select_columns(["input_ids", "labels"])
        self.groups = groups
        self.join = DataCollatorWithFlattening()

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        joined = self.join([self.rows[member] for member in self.groups[index]], return_tensors="pt")
        return {name: value[0] for name, value in joined.items()}


def pack(lengths: Sequence[int], room: int) -> list[list[int]]:
    """Group rows so that each group's lengths add up to at most `room`: longest first, each where it fits best."""
    groups: list[list[int]] = []
    space: list[tuple[int, int]] = []  # (tokens left, group), sorted
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        at = bisect.bisect_left(space, (lengths[index], -1))
        left, group = space.pop(at) if at < len(space) else (room, len(groups))
        if group == len(groups):
            groups.append([])
        groups[group].append(index)
        bisect.insort(space, (left - lengths[index], group))
    return groups
