"""Adapts parameters of any module where they are read: the module's forward sees P + s B A in place of P."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.rnn import RNNCellBase

from lightning_lora.engine.inits import INITS
from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.by_weight import kept_columns
from lightning_lora.engine.layers.frozen import FlatWeights, lay_flat
from lightning_lora.engine.layers.pair import MAGNITUDE, START, AdapterSpec, Pair, kept_ranks
from lightning_lora.engine.torch_private import flat_weights
from lightning_lora.engine.tree import name_in
from lightning_lora.engine.weights import is_plain, without_autocast
from lightning_lora.errors import AdapterStateError, TargetError


class ParameterLoRA(Adapter):
    """A parameter (out, in) has an A (rank, in) and a B (out, rank). A stack of n matrices (n, out, in), such as the
    experts of a mixture, has an A (n rank, in), read as (n, rank, in), and a B (out, rank n), read as (out, rank, n):
    the layout of PEFT's target_parameters. If the module has `is_transposed = True`, its stacks are (n, in, out).

    The inputs that a parameter is multiplied by are not known here, so dropout zeroes columns of A: a feature is
    dropped for the whole forward, in all tokens. The mean is that of dropout on the input.
    """

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        for name in spec.parameters:
            P = module._parameters.get(name)
            if P is None:
                raise TargetError(
                    f"its {name} is computed from other parameters (by weight norm, for example), so no update can be "
                    "added to it: leave it out"
                )
            if P.dim() < 2:
                raise TargetError(
                    f"its {name} is no matrix, so it has no low rank: train it whole, with bias= or modules_to_save"
                )
            if P.dim() > 3:
                raise TargetError(f"its {name} is neither a matrix nor a stack of matrices: name its module instead")
            if not is_plain(P):
                raise TargetError(
                    f"its {name} holds quantized weights ({P.dtype}), so no update can be added to it: leave it out"
                )

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        if config.lora_bias:
            raise TargetError(
                "lora_bias has no meaning for a parameter, which has no output of its own: leave one of the two out"
            )
        if INITS[config.init].reads("inputs"):
            raise TargetError(
                f"init={config.init!r} measures the inputs of a layer, and the inputs of a parameter are not known: "
                "choose another init, or leave the parameter out"
            )

    @staticmethod
    def suffix_of(parameter: str) -> str:
        return f"_{parameter}"

    @classmethod
    def shapes_of(cls, module: Any, parameter: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        P = cls.matrix(module, module._parameters[parameter])
        count = len(P) if P.dim() == 3 else 1
        return (count * rank, P.shape[-1]), (P.shape[-2], rank * count)

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:  # (out, in) or (n, out, in)
        return W.mT if W.dim() == 3 and _is_transposed(module) else W

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        return M.mT if M.dim() == 3 and _is_transposed(module) else M

    lora_by_weight = True

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.base_forward(*args, **kwargs)

    def value_read(self, name: str) -> Tensor:
        """The adapted parameter P + s B A (rescaled by DoRA), in P's dtype."""
        P = self.dense_weight(name)
        if MAGNITUDE + self.suffix_of(name) in self.lora_names:
            return self.adapted_weight(name, dropped=True).to(P.dtype)
        A, B = self.factors(name)
        A, B = A.to(P.dtype), (self.lora.parameters[name].scale * B).to(P.dtype)
        if P.dim() == 2:
            with without_autocast(P):
                return torch.addmm(P, B, A)
        left, right = (A.mT, B.mT) if _is_transposed(self) else (B, A)
        with without_autocast(P):  # baddbmm makes no second tensor of the stack's size
            return torch.baddbmm(P, left, right)

    def factors(self, parameter: str = "weight", *, dropped: bool = True) -> tuple[Tensor, Tensor]:
        """A (rank, in) and B (out, rank), or for a stack A (n, rank, in) and B (n, out, rank)."""
        suffix, P = self.suffix_of(parameter), self.dense_weight(parameter)
        A, B = getattr(self, "lora_A" + suffix), getattr(self, "lora_B" + suffix)
        pairs = [(A, B)]
        if "lora_A0" + suffix in self._buffers:  # a frozen start: s [B - B0, B0] [A; A - A0]
            A0, B0 = (getattr(self, name + suffix).to(t.dtype) for name, t in zip(START, (A, B)))
            pairs = [(A, B - B0), (A - A0, B0)]
        if P.dim() == 3:
            n = len(P)
            pairs = [(A.unflatten(0, (n, -1)), B.unflatten(1, (-1, n)).permute(2, 0, 1)) for A, B in pairs]
        A, B = pairs[0] if len(pairs) == 1 else (torch.cat(t, dim) for t, dim in zip(zip(*pairs), (-2, -1)))
        spec = self.lora.parameters[parameter]
        if dropped and self.training:
            A = A * kept_ranks(spec, A, A.dim() - 2) if spec.rank_dropout or spec.module_dropout else A
            A = A * kept_columns(A[..., :1, :], spec.dropout) if spec.dropout else A
        return A, B

    def matrices(self, parameter: str = "weight") -> tuple[Tensor, Tensor]:
        return self.factors(parameter, dropped=False)

    def delta_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        A, B = self.factors(parameter, dropped=dropped)
        dtype = torch.promote_types(A.dtype, torch.float32)
        return self.from_matrix(self, self.lora.parameters[parameter].scale * (B.to(dtype) @ A.to(dtype)))

    def check_mergeable(self) -> None:
        for name in self.lora.parameters:
            P = self._parameters.get(name)
            if P is None or not is_plain(P):
                raise AdapterStateError(f"its {name} is quantized or computed from others. Use the adapter unmerged.")

    def merged_parameters(self) -> dict[str, Tensor]:
        return {name: self.adapted_weight(name).to(self.dense_weight(name).dtype) for name in self.lora.parameters}

    def lora_pairs(self, name: str) -> tuple[Pair, ...]:
        return tuple(
            Pair(name_in(name, parameter), self, parameter, spec, self.suffix_of(parameter))
            for parameter, spec in self.lora.parameters.items()
        )

    def extra_repr(self) -> str:
        each = (f"{name}: rank={spec.rank}, scale={spec.scale:g}" for name, spec in self.lora.parameters.items())
        return ", ".join(filter(None, (type(self).base_class.extra_repr(self), *each)))


def _is_transposed(module: Any) -> bool:
    return bool(getattr(module, "is_transposed", False))


class BilinearLoRA(ParameterLoRA, adapts=nn.Bilinear):
    """Its weight (out, in1, in2) is a stack of matrices, one for each output; each of them has a low-rank update."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return ("weight",)

    @classmethod
    def by_output(cls, module: Any, W: Tensor) -> Tensor:
        return W.flatten(1)

    @classmethod
    def from_output(cls, module: Any, M: Tensor) -> Tensor:
        return M.unflatten(1, (module.in1_features, module.in2_features))


# nn.MultiheadAttention: its input projections are parameters of its own, its output projection is a child.


class MultiheadAttentionLoRA(ParameterLoRA, adapts=nn.MultiheadAttention):
    """Adapts the packed in_proj_weight (3 embed, embed) by one pair, so that q, k and v share A (as in PEFT); or, where
    kdim or vdim differ, each of q_proj_weight, k_proj_weight and v_proj_weight; and out_proj."""

    companions = ("out_proj",)
    lora_to_kernels = True

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        if module._parameters.get("in_proj_weight") is not None:
            return ("in_proj_weight",)
        return ("q_proj_weight", "k_proj_weight", "v_proj_weight")


# nn.LSTM, nn.GRU, nn.RNN and their cells: each of their weights is adapted where it is read.


class CellLoRA(ParameterLoRA, adapts=RNNCellBase):
    """Adapts weight_ih and weight_hh of a cell. A weight holds the matrices of all gates, so these share one A."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return "weight_ih", "weight_hh"


class RecurrentLoRA(FlatWeights, CellLoRA, adapts=nn.RNNBase):
    """Adapts the weights of all layers and directions, and the projections (proj_size)."""

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        return tuple(name for name in flat_weights(module) if name.startswith("weight"))

    replaces = ("_flat_weights", "_update_flat_weights", "flatten_parameters")

    @staticmethod
    def parameters_replaced(module: Any) -> None:
        lay_flat(module)
