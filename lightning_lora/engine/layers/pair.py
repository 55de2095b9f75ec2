"""A pair (A, B), which adapts one weight: its rank and scale, its tensors, and their names in the module."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import AdapterSpec
from lightning_lora.engine.low_rank import singular_values
from lightning_lora.engine.weights import shape_of

FACTORS = ("lora_A", "lora_B")
"""The names under which a module holds its A and its B."""
START = ("lora_A0", "lora_B0")
"""The names of the frozen start A0 and B0. A module has it where the initialiser gives B A other than zero: the update
is then s (B A - B0 A0) x, which starts at zero."""
MAGNITUDE = "lora_magnitude_vector"
"""The name of DoRA's m, one number for each output."""
BIAS = "lora_B_bias"
"""The name of the bias of B (lora_bias), one number for each output."""
TENSORS = (*FACTORS, *START, MAGNITUDE, BIAS)


@dataclass(frozen=True, eq=False)
class Pair:
    """The factors A and B of one parameter. `A` and `B` are looked up in the module each time they are asked for."""

    name: str
    """The name of the module; of the parameter where single parameters are adapted (`target_parameters`, an LSTM)."""
    module: Any
    """The adapted layer, an `Adapter`."""
    parameter: str
    spec: AdapterSpec
    suffix: str
    """The end of the names of the pair's tensors in the module: `lora_A<suffix>`, `lora_B<suffix>`."""

    @property
    def A(self) -> nn.Parameter:
        factor: nn.Parameter = getattr(self.module, f"lora_A{self.suffix}")
        return factor

    @property
    def B(self) -> nn.Parameter:
        factor: nn.Parameter = getattr(self.module, f"lora_B{self.suffix}")
        return factor

    def singular_values(self) -> Tensor:
        """The singular values of the update's matrix scale * B A, the largest first, in float64, without a gradient.

        Their number is the rank; it is larger with a frozen start, and with groups or experts, which count as blocks of
        one matrix. DoRA's magnitudes are left out.

        >>> import torch
        >>> from lightning_lora.engine import LoRAConfig, inject, pairs
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> _ = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> (pair,) = pairs(model)
        >>> pair.singular_values().tolist()  # untrained: B is zero
        [0.0, 0.0]
        """
        with torch.no_grad():
            A, B = self.module.matrices(self.parameter)
            return abs(self.spec.scale) * singular_values(B, A)

    @property
    def is_fresh(self) -> bool:
        """True if the update is still zero, so untrained: A or B is zero, or both equal their frozen start."""
        A0, B0 = (self.module._buffers.get(name + self.suffix) for name in START)
        if self.A.is_meta:
            return False  # it has no values yet
        if A0 is None or B0 is None:
            return not bool(self.A.any()) or not bool(self.B.any())
        return self.A.equal(A0) and self.B.equal(B0)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the adapted parameter."""
        weight = self.module._parameters.get(self.parameter)
        return shape_of(weight) if weight is not None else (self.B.shape[0], self.A.shape[1])


def as_blocks(A: Tensor, B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """A (n, r, in) and B (n, out, r) of a pair, for every geometry: n products B A, which change n blocks of a weight.

    A stack of n matrices, such as experts, has `rank` ranks in each; n groups of a convolution share the `rank` ranks
    of the pair; all others have one block."""
    count = A.shape[0] // max(1, rank)
    if count > 1:
        return A.unflatten(0, (count, rank)), B.unflatten(1, (rank, count)).permute(2, 0, 1)
    groups = rank // B.shape[1]
    # A kernel counts as inputs of A, or, where the convolution is transposed, as outputs of B.
    return A.flatten(1).unflatten(0, (groups, -1)), B.unflatten(0, (groups, -1)).movedim(2, -1).flatten(1, -2)


def from_blocks(A: Tensor, B: Tensor, like_A: Tensor, like_B: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Undo `as_blocks`, maybe with more or fewer ranks in each block: A and B laid out as `like_A` and `like_B` are,
    which have `rank` ranks."""
    is_stack = like_A.shape[0] > rank
    if is_stack:
        return A.flatten(0, 1), B.permute(1, 2, 0).flatten(1)
    kernel = like_B.shape[2:]
    B = B.unflatten(1, (-1, *kernel)).movedim(-1, 2).flatten(0, 1)
    return A.flatten(0, 1).reshape(-1, *like_A.shape[1:]), B


def kept_ranks(spec: AdapterSpec, A: Tensor, dim: int = 0) -> Tensor:
    """Draw this forward's dropout of ranks: a factor for each row of A, 0 if the row is dropped, else above 1 so that
    the mean is 1. `dim` is the dimension of A that counts its rows (1 for a stack of matrices)."""
    whole, each = spec.module_dropout, spec.rank_dropout
    keep = torch.rand(spec.rank, device=A.device, dtype=torch.float32) >= each
    keep = keep & (torch.rand(1, device=A.device, dtype=torch.float32) >= whole)
    keep = keep.repeat(A.shape[dim] // spec.rank)  # a rank of the frozen start is dropped with the trained rank
    return (keep.to(A.dtype) / ((1 - each) * (1 - whole))).view(-1, *(1,) * (A.dim() - dim - 1))
