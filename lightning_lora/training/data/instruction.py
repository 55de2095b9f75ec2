"""Instructions and answers for causal language models: the prompt is read, the answer is learned."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from typing import Any

from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from transformers import DataCollatorWithFlattening

from lightning_lora.errors import ConfigError, DataError, closest, listed
from lightning_lora.training.data.base import SourceData
from lightning_lora.training.data.chat import ChatEncoder, template_of
from lightning_lora.training.data.collate import PadPacked, PadRows
from lightning_lora.training.data.shapes import Shape, shape_of
from lightning_lora.training.data.source import Source
from lightning_lora.training.data.text import Prompts
from lightning_lora.training.models import ModelSource

_MESSAGES = "messages"
_DEFAULT_COLUMNS = (_MESSAGES, "prompt", "response")


class InstructionData(SourceData):
    """Conversations through the model's chat template; only what the assistant says is predicted.

    Rows have a column `messages_column` of messages (dicts of `role` and `content`), or the columns `prompt_column`
    and `response_column`. Where these names are as they are by default, rows of another common shape are taken too:
    instruction, input and output (alpaca), conversations (ShareGPT), prompt and completion. `system_prompt` is put
    before conversations that have none. `chat_template` is the tokenizer's own (None), "plain" (the package's, for base
    models that have none), or Jinja text.

    A conversation is cut at `max_length` tokens. One whose answers are cut away whole teaches nothing and is left out,
    with a warning that counts them.

    `packing` puts several conversations into a row of `max_length` tokens. They do not see each other: `position_ids`
    start again at each, which transformers' masks for eager, sdpa and flex attention take as a border, and
    `cu_seq_lens_q` and the like say the same to flash attention. CausalLM tries its model on the first packed batch,
    and refuses one that mixes conversations all the same (ALiBi, state-space and some others).

    Batches have `input_ids`, `labels` (-100 where nothing is predicted) and `attention_mask`, or, when packed,
    `position_ids`; all (rows, tokens). For predicting, the prompt up to the last answer, padded on the left.
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
        self.packing = packing
        self.collate = (PadPacked if packing else PadRows)(self.tokenizer.pad_token_id or 0)
        self.collate_prompts = PadRows(self.tokenizer.pad_token_id or 0, side="left")

    def encode(self, rows: Any, split: str) -> Dataset:
        columns = self._columns(rows.column_names, split)
        if isinstance(columns, Shape):
            rows = rows.map(_AsMessages(columns), remove_columns=rows.column_names, desc=f"Reading {split}")
            columns = _MESSAGES, "", ""
        encoder = ChatEncoder(self.tokenizer, self.max_length, self.system_prompt, *columns, prompts=split == "predict")
        encoded = rows.map(encoder, remove_columns=rows.column_names, desc=f"Applying the chat template to {split}")
        if split == "predict":
            return Prompts(encoded, self.max_length)
        lengths, learned = encoded["length"], encoded["learned"]
        kept = [index for index, count in enumerate(learned) if count > 0]
        cut = sum(length > self.max_length for length in lengths)
        if not kept:
            raise DataError(
                f"None of the {len(encoded)} {split} conversations has an answer within max_length={self.max_length} "
                f"tokens; the shortest is {min(lengths)} long. Raise max_length."
            )
        if cut or len(kept) < len(encoded):
            rank_zero_warn(
                f"{split}: {cut} of {len(encoded)} conversations are longer than max_length={self.max_length} tokens "
                f"and were cut; {len(encoded) - len(kept)} have no answer left and were left out."
            )
        encoded = encoded.select(kept)
        if self.packing:
            return PackedRows(encoded, pack([min(lengths[index], self.max_length) for index in kept], self.max_length))
        return encoded.select_columns(["input_ids", "labels", "attention_mask"])

    def _columns(self, there: Sequence[str], split: str) -> tuple[str | None, str, str] | Shape:
        named = (self.messages_column, self.prompt_column, self.response_column)
        pair = None, self.prompt_column, self.response_column
        if self.messages_column in there:
            return named
        if {self.prompt_column, self.response_column} <= set(there):
            return pair
        shape = shape_of(there, split) if named == _DEFAULT_COLUMNS else None
        if shape is not None:
            return shape
        if split == "predict" and self.prompt_column in there:
            return pair
        meant = closest(self.messages_column, there, count=1)
        guess = f" Did you mean {meant[0]!r}?" if meant else ""
        raise DataError(
            f"The {split} data has no column {self.messages_column!r}. Its columns are: {listed(there)}.{guess} Needed "
            "are messages_column, or prompt_column and response_column. By their own names these are taken: "
            "instruction, input and output (alpaca), conversations (ShareGPT), prompt and completion."
        )


class _AsMessages:
    """A row of a shape as its messages; an object so that `datasets` can pickle it, and know it again in its cache."""

    def __init__(self, shape: Shape) -> None:
        self.shape = shape

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {_MESSAGES: self.shape.messages(row)}


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
