"""Plain text for causal language models: tokenised once, packed into blocks of one size."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from datasets import Features, Sequence, Value
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data.base import PadRows, SourceData
from lightning_lora.recipes.data.source import Source, require_columns
from lightning_lora.recipes.models import ModelSource


class TextData(SourceData):
    """All texts joined, with an end-of-text token after each, and cut into blocks of `block_size` tokens.

    Each text is encoded by `tokenizer(text)`, for example with a beginning-of-text token. Empty texts are left out and
    counted in a warning. Only the last block of a split is padded. No token is left out, except when one token alone
    would make the last block. A block may hold the end of one text and the start of another, and attention crosses that
    border. Batches have `input_ids`, `labels` and `attention_mask` (batch_size, block_size).

    For predicting, each text is a prompt (its first `prompt_length` tokens), padded on the left.
    """

    def __init__(
        self,
        tokenizer: ModelSource,
        source: Source,
        text_column: str = "text",
        block_size: int = 256,
        batch_size: int = 16,
        num_workers: int = 0,
        prompt_length: int = 64,
    ) -> None:
        super().__init__(source, batch_size, num_workers)
        if block_size < 2 or prompt_length < 1:
            raise ConfigError(f"block_size {block_size} must be at least 2, prompt_length {prompt_length} at least 1.")
        context = tokenizer.context()
        for name, length in (("block_size", block_size), ("prompt_length", prompt_length)):
            if context is not None and length > context:
                raise ConfigError(
                    f"{name} is {length}, and the model reads at most {context} tokens. Give {name}={context} or less."
                )
        self.tokenizer = tokenizer.tokenizer()
        self.text_column = text_column
        self.block_size = block_size
        self.prompt_length = prompt_length
        self.collate = PadRows(self.tokenizer.pad_token_id or 0)
        self.collate_prompts = PadRows(self.tokenizer.pad_token_id or 0, side="left")

    def encode(self, rows: Any, split: str) -> Dataset:
        require_columns(rows, [self.text_column], split, "text_column")
        ids = rows.map(
            tokenise_texts,
            batched=True,
            batch_size=100,
            remove_columns=rows.column_names,
            fn_kwargs={
                "tokenizer": self.tokenizer,
                "column": self.text_column,
                "ends": split != "predict",
            },
            # Given here, since it cannot be inferred from a first batch of empty texts.
            features=Features({"input_ids": Sequence(Value("int32"))}),
            desc=f"Tokenising {split}",
        )
        left_out = len(rows) - len(ids)
        if left_out and len(ids):
            rank_zero_warn(f"{split}: {left_out} of {len(rows)} texts are empty or missing, and were left out.")
        if split == "predict":
            if len(ids) == 0:
                raise DataError(f"The texts in column {self.text_column!r} are all empty: nothing to continue.")
            return Prompts(ids, self.prompt_length)
        blocks = Blocks(flat_tokens(ids), self.block_size)
        if len(blocks) == 0:
            raise DataError(f"The {split} texts in column {self.text_column!r} are all empty.")
        return blocks


class Blocks(Dataset):
    """Consecutive pieces of one long row of tokens; the last piece may be shorter, but has at least two tokens."""

    def __init__(self, tokens: Tensor, block_size: int) -> None:
        self.tokens = tokens
        self.block_size = block_size

    def __len__(self) -> int:
        whole, rest = divmod(len(self.tokens), self.block_size)
        # In a block of a single token there is nothing to predict.
        return whole + (rest > 1)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        ids = self.tokens[index * self.block_size : (index + 1) * self.block_size].long()
        return {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}


class Prompts(Dataset):
    """The first `length` tokens of each row."""

    def __init__(self, rows: Any, length: int) -> None:
        self.rows = rows
        self.length = length

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        ids = torch.tensor(self.rows[index]["input_ids"][: self.length])
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def tokenise_texts(
    batch: dict[str, list[str | None]], tokenizer: PreTrainedTokenizerBase, column: str, ends: bool
) -> dict[str, list[list[int]]]:
    """Token ids of each text that is not empty. With `ends`, the end-of-text token comes last; otherwise it is left
    out."""
    texts = [text for text in batch[column] if text]
    if not texts:
        return {"input_ids": []}
    for text in texts:
        if not isinstance(text, str):
            raise DataError(f"Column {column!r} must hold text, but there is {type(text).__name__}: {text!r:.80}")
    # verbose=False: no warning about texts longer than the model's context, since they are cut into blocks.
    encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
    end = tokenizer.eos_token_id
    if end is not None:  # some tokenizers write it themselves
        encoded = [ids[:-1] if ids[-1:] == [end] else ids for ids in encoded]
    return {"input_ids": [[*ids, end] for ids in encoded] if ends and end is not None else encoded}


def flat_tokens(rows: Any) -> Tensor:
    """All `input_ids` of a `datasets.Dataset` as one int32 tensor (tokens,), without going through Python lists."""
    column = rows.with_format("arrow")[:]["input_ids"]
    parts = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in getattr(column, "chunks", [column])]
    return torch.from_numpy(np.concatenate([part.astype(np.int32) for part in parts] or [np.empty(0, np.int32)]))
