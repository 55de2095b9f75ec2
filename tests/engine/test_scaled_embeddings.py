"""Embeddings with a forward of their own: the update is scaled as their rows are, or they are refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from cases import randomise
from torch import Tensor, nn

from lightning_lora.engine import LoRAConfig, inject, merge
from lightning_lora.errors import TargetError

IDS = torch.tensor([[3, 1, 3], [0, 4, 2]])


class Table(nn.Embedding):
    """`embed_scale` is a number, as in BART, and not a buffer, as in Gemma."""

    def __init__(self) -> None:
        super().__init__(9, 4, dtype=torch.float64)
        self.embed_scale: Any = 3.0


class Times(Table):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) * self.embed_scale


class Plus(Table):
    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids) + self.embed_scale


class Counts(nn.Embedding):
    def __init__(self) -> None:
        super().__init__(9, 4, padding_idx=8, dtype=torch.float64)
        self.calls = 0

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(ids)


class Shifted(nn.Embedding):
    """Learned positions, as in BART and OPT."""

    def __init__(self) -> None:
        super().__init__(9, 4, dtype=torch.float64)

    def forward(self, ids: Tensor) -> Tensor:
        return super().forward(ids + 2)


CONFIGS: dict[str, dict[str, Any]] = {
    "rank": {"target_modules": ["0"]},
    "rows": {"target_modules": ["1"], "trainable_token_indices": {"0": [1, 3]}},
}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [Table, Times, Counts])
def test_the_update_is_scaled_as_the_class_scales_its_rows_and_not_as_an_attribute_says(kind: Any, config: str):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(4, 4, dtype=torch.float64))
    base = model(IDS)
    inject(model, LoRAConfig(rank=2, **CONFIGS[config]))
    randomise(model)
    adapted = model(IDS)
    assert not torch.allclose(adapted, base)
    merge(model)
    # float64: sums of a few terms.
    torch.testing.assert_close(model(IDS), adapted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("kind", [Plus, Shifted])
def test_one_that_gives_other_numbers_is_refused_and_adapted_by_its_parameter(kind: Any, config: str):
    torch.manual_seed(0)
    model = nn.Sequential(kind(), nn.Linear(4, 4, dtype=torch.float64))
    with pytest.raises(TargetError, match="which does not return the rows of its input"):
        inject(model, LoRAConfig(rank=2, **CONFIGS[config]))
    inject(model, LoRAConfig(rank=2, target_modules=[], target_parameters=["0.weight"]))
    randomise(model)
    adapted = model(IDS)
    merge(model)
    torch.testing.assert_close(model(IDS), adapted, rtol=0, atol=1e-12)
