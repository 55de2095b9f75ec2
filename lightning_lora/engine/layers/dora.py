"""DoRA: trains the magnitude and the direction of a weight separately, for every geometry."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.layers.base import Adapter
from lightning_lora.engine.layers.pair import MAGNITUDE, Pair
from lightning_lora.engine.weights import can_be_dense, fill, is_own, is_quantized, whole, without_autocast
from lightning_lora.errors import TargetError


class DoRA(Adapter):
    """A variant of a geometry: W' = m (W + s B A) / ||W + s B A|| (Liu et al. 2024, arXiv:2402.09353, equation 5).

    The norm is taken over the weights of each output, so m (`lora_magnitude_vector`) has one number for each output; it
    starts as the norm of W. No gradient passes through the norm (section 4.3). With g = m / ||W + s B A|| an output is
    g (W x + s B A x) + b: as in plain LoRA, dropout is on the input of A alone.

    An output whose weights are all zero has no direction: there g is 1, as in plain LoRA. Its value is the base's, and
    B gets its gradient. After B's first step the weights have a direction, and m learns their norm from 0.
    """

    lora_magnitude_vector: nn.Parameter

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        weight = module._parameters.get("weight")
        if weight is not None and not can_be_dense(weight):
            raise TargetError(
                f"use_dora needs its weight as plain numbers, and a weight of {weight.dtype} that is stored like this "
                "cannot be dequantized: train it without DoRA, or leave it out with exclude_modules"
            )

    def combine(self, base: Tensor, update: Tensor) -> Tensor:
        g = (
            self.gain().to(base.dtype).view(-1, *(1,) * (self.lora_B.dim() - 2))
        )  # an output's channels come before its size
        bias = self.own("bias")  # also if it is parametrized: g scales the output without the bias
        linear = base if bias is None else base - bias.to(base.dtype).view(g.shape)
        # Not g * linear + bias: a fresh adapter, whose g is 1, must not change a bit.
        return super().combine(base + (g - 1) * linear, g * update.to(base.dtype))

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        fresh = self._fresh_pairs()
        given = {p: state_dict.get(prefix + MAGNITUDE + p.suffix) for p in fresh}
        of_base = [p for p in fresh if is_own(given[p], getattr(self, MAGNITUDE + p.suffix))]
        super()._load_from_state_dict(state_dict, prefix, *rest)
        self._measure(of_base)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        before = [is_quantized(p) for p in self._parameters.values() if p is not None]
        super()._apply(fn, recurse)
        if before != [is_quantized(p) for p in self._parameters.values() if p is not None]:  # bitsandbytes quantized it
            self._measure(self._fresh_pairs())
        return self

    def _fresh_pairs(self) -> list[Pair]:
        return [pair for pair in self.lora_pairs("") if pair.is_fresh]

    @torch.no_grad()
    def _measure(self, pairs: list[Pair]) -> None:
        """Set m to the norm of the present W."""
        for pair in pairs:
            m = getattr(self, MAGNITUDE + pair.suffix)
            fill(m, output_norms(self, self, whole(self.dense_weight(pair.parameter))))

    def gain(self) -> Tensor:
        """g, one number for each output, in float32 or wider."""
        with torch.no_grad():
            norm = output_norms(self, self, super().adapted_weight())
        return gains(self.lora_magnitude_vector, norm)

    def adapted_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        V = self.by_output(self, super().adapted_weight(parameter, dropped=dropped))
        norm = output_norms(self, self, V.detach(), is_by_output=True)
        m: Tensor = getattr(self, MAGNITUDE + self.suffix_of(parameter))
        return self.from_output(self, gains(m, norm)[..., None] * V)


def gains(m: Tensor, norm: Tensor) -> Tensor:
    """g = m / ||W + s B A||, and 1 where that norm is 0."""
    is_zero = norm == 0
    return torch.where(is_zero, 1.0, m.to(norm.dtype) / torch.where(is_zero, 1.0, norm))


def dora_update(W: Tensor, A: Tensor, B: Tensor, scale: float, magnitude: Tensor) -> Tensor:
    """The change that DoRA makes to a weight: m (W + s B A) / ||W + s B A|| - W, in float64.

    W is (out, in), A (r, in), B (out, r), magnitude (out,). The change has full rank in general, since all rows of W
    are rescaled except those that are zero once adapted.
    """
    W = W.double()
    adapted = W + scale * B.double() @ A.double()
    return gains(magnitude.double(), adapted.norm(dim=1))[:, None] * adapted - W


def output_norms(geometry: Any, module: Any, W: Tensor, *, is_by_output: bool = False) -> Tensor:
    """||W|| over the weights of each output of `module`, in float32 or wider. W has the shape of the module's weight,
    or that of `geometry.by_output` if `is_by_output`."""
    with without_autocast(W):
        M = W if is_by_output else geometry.by_output(module, W)
        return torch.linalg.vector_norm(M.to(torch.promote_types(M.dtype, torch.float32)), dim=-1)
