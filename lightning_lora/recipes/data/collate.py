"""Collates rows of unequal length into one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from lightning_lora.recipes.tasks.base import IGNORED, lengths_for_flash

FILL = {"attention_mask": 0, "token_type_ids": 0, "position_ids": 0, "labels": IGNORED}
"""Input -> its value in padding. `input_ids` get the tokenizer's padding token. Position 0 starts a new example."""


@dataclass(frozen=True)
class PadRows:
    """Pads each 1-d input to the longest row of the batch, and stacks numbers. It is a class so that it can be
    pickled."""

    pad_token_id: int
    side: Literal["left", "right"] = "right"

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        return {name: self._stack(name, [torch.as_tensor(row[name]) for row in rows]) for name in rows[0]}

    def _stack(self, name: str, values: list[Tensor]) -> Tensor:
        if values[0].ndim == 0:
            return torch.stack(values)
        longest = max(map(len, values))
        fill = self.pad_token_id if name == "input_ids" else FILL[name]
        return torch.stack(
            [
                pad(value, (0, longest - len(value)) if self.side == "right" else (longest - len(value), 0), value=fill)
                for value in values
            ]
        )


class PadPacked(PadRows):
    """PadRows for rows that hold several examples each. It adds the examples' lengths, for flash attention."""

    def __call__(self, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        batch = super().__call__(rows)
        return {**batch, **lengths_for_flash(batch["position_ids"])}
