"""nn.LSTM, nn.GRU, nn.RNN and their cells: every weight of theirs is adapted where it is read."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.modules.rnn import RNNCellBase

from lightning_lora.engine.layers.parameters import ParameterLoRA
from lightning_lora.engine.layers.whole import FlatWeights, lay_flat


class CellLoRA(ParameterLoRA, adapts=RNNCellBase):
    """A cell: its weight_ih and weight_hh. The gates lie one under the other in a weight, and share its A."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"


class RecurrentLoRA(FlatWeights, CellLoRA, adapts=nn.RNNBase):
    """All layers and directions, and the projections (proj_size). Their kernels take the list `_flat_weights`."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))

    replaces = ("_flat_weights", "_update_flat_weights", "flatten_parameters")

    @staticmethod
    def parameters_replaced(module: Any) -> None:
        lay_flat(module)
