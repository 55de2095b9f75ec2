"""nn.LSTM, nn.GRU, nn.RNN and their cells: each of their weights is adapted where it is read."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from lightning_lora.engine.layers.parameters import ParameterLoRA
from lightning_lora.engine.layers.whole import FlatWeights, lay_flat


class CellLoRA(ParameterLoRA, adapts=RNNCellBase):
    """Adapts weight_ih and weight_hh of a cell. A weight holds the matrices of all gates, so these share one A."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"


class RecurrentLoRA(FlatWeights, CellLoRA, adapts=nn.RNNBase):
    """Adapts the weights of all layers and directions, and the projections (proj_size)."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))

    replaces = ("_flat_weights", "_update_flat_weights", "flatten_parameters")

    @staticmethod
    def parameters_replaced(module: Any) -> None:
        lay_flat(module)
