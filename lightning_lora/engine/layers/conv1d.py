"""transformers' Conv1D: GPT-2's linear layer, whose weight is stored transposed, (in, out)."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.linear import LinearLoRA


class Conv1DLoRA(LinearLoRA):
    """A is (rank, in), B is (out, rank), as for a Linear."""

    lora_known_forward = None  # known once transformers is imported

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_in, features_out = module.weight.shape
        return (rank, features_in), (features_out, rank)

    @staticmethod
    def multiply(x: Tensor, W: Tensor) -> Tensor:
        return x @ W

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        return W.T

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        return M.T


def register_conv1d() -> type[nn.Module] | None:
    """Register Conv1D if transformers' module that defines it was imported: else no model can contain a Conv1D."""
    module = sys.modules.get("transformers.pytorch_utils")
    if module is None:
        return None
    Adapter.geometries.setdefault(module.Conv1D, Conv1DLoRA)
    Conv1DLoRA.lora_known_forward = module.Conv1D.forward
    return module.Conv1D
