"""One low-rank update of an adapted layer: its numbers, its factors, and the names under which a module holds them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lightning_lora.engine.low_rank import singular_values
from lightning_lora.engine.storage import shape_of

if TYPE_CHECKING:
    from lightning_lora.engine.layers.base import Adapter

FACTORS = ("lora_A", "lora_B")
"""The names under which a module holds its A and its B."""
START = ("lora_A0", "lora_B0")
"""Those of the frozen A and B that an initialiser began with, where B A was not zero: the update leaves them out."""
MAGNITUDE = "lora_magnitude_vector"
BIAS = "lora_B_bias"
TENSORS = (*FACTORS, *START, MAGNITUDE, BIAS)


@dataclass(frozen=True)
class AdapterSpec:
    """The numbers of one adapted layer."""

    rank: int
    alpha: float
    scale: float
    dropout: float = 0.0
    rank_dropout: float = 0.0
    module_dropout: float = 0.0
    keeps_precision: bool = True
    """A and B stay in float32 when the model is cast to a narrower dtype (master weights)."""
    parameters: Mapping[str, AdapterSpec] = field(default_factory=dict)
    """The numbers of each of its parameters, where parameters are adapted and not what the module computes."""


@dataclass(frozen=True, eq=False)
class Pair:
    """One low-rank update: the parameter that it changes, and its factors as they are just now."""

    name: str
    """That of the module, or of the parameter where the module has several that are adapted."""
    module: Adapter
    parameter: str
    spec: AdapterSpec
    suffix: str
    """What the names of its tensors end in."""

    @property
    def A(self) -> nn.Parameter:
        factor: nn.Parameter = getattr(self.module, f"lora_A{self.suffix}")
        return factor

    @property
    def B(self) -> nn.Parameter:
        factor: nn.Parameter = getattr(self.module, f"lora_B{self.suffix}")
        return factor

    def singular_values(self) -> Tensor:
        """Those of the update scale * B A, the largest first, in float64, without a gradient.

        `rank` of them and more: where an initialiser left a frozen start, or the module has groups or experts, which
        are blocks of one matrix. DoRA's magnitudes do not enter.
        """
        with torch.no_grad():
            A, B = self.module.matrices(self.parameter)
            return abs(self.spec.scale) * singular_values(B, A)

    @property
    def is_fresh(self) -> bool:
        """Whether its update is zero as at the start: a factor is, or both are as they are in its frozen start."""
        A0, B0 = (self.module._buffers.get(name + self.suffix) for name in START)
        if self.A.is_meta:
            return False  # nothing yet
        if A0 is None or B0 is None:
            return not bool(self.A.any()) or not bool(self.B.any())
        return self.A.equal(A0) and self.B.equal(B0)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the parameter that it changes."""
        weight = self.module._parameters.get(self.parameter)
        return shape_of(weight) if weight is not None else (self.B.shape[0], self.A.shape[1])
