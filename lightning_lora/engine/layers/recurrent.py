"""nn.LSTM, nn.GRU, nn.RNN and their cells: every weight of theirs is adapted where it is read."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from lightning_lora.engine.layers.parameters import ParameterLoRA


class CellLoRA(ParameterLoRA, adapts=RNNCellBase):
    """A cell: its weight_ih and weight_hh. The gates lie one under the other in a weight, and share its A."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"


class RecurrentLoRA(CellLoRA, adapts=nn.RNNBase):
    """All layers and directions, and the projections (proj_size). Their kernels take the list `_flat_weights`."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return tuple(name for name in module._flat_weights_names if name.startswith("weight"))

    replaces = ("_flat_weights", "_update_flat_weights", "flatten_parameters")

    @property
    def _flat_weights(self) -> list[Tensor | None]:
        base: Any = self
        return [getattr(self, name, None) for name in base._flat_weights_names]

    @_flat_weights.setter
    def _flat_weights(self, weights: list[Tensor | None]) -> None:
        # torch writes here what it read from us, adapted; what the class finds without us are the base's own.
        self.parameters_replaced(self)

    def _update_flat_weights(self) -> None:
        """What is read is never out of date."""

    def flatten_parameters(self) -> None:
        """Adapted weights are made in every forward: there is nothing to lay out in advance."""

    @staticmethod
    def parameters_replaced(module: Any) -> None:
        vars(module)["_flat_weights"] = [module._parameters.get(name) for name in module._flat_weights_names]
