"""nn.Linear and everything derived from it; and the Linear whose weight its parent reads without calling it."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.engine import fused
from lightning_lora.engine.layers.base import BIAS, FACTORS, Adapter, AdapterSpec, has_own_forward, kept_columns
from lightning_lora.engine.storage import is_plain
from lightning_lora.errors import AdapterStateError, TargetError

_PLAIN = frozenset(("weight", "bias", *FACTORS))


class LinearLoRA(Adapter, adapts=nn.Linear):
    """A is (rank, in), B is (out, rank)."""

    lora_known_forward: ClassVar[Any] = nn.Linear.forward
    """It multiplies by the weight, adds the bias, and does nothing else."""
    lora_is_plain: ClassVar[bool]
    """Whether it computes by nothing but its weight, bias and factors, where nn.Module keeps them."""

    @staticmethod
    def shapes(module: nn.Linear, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.in_features), (module.out_features, rank)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        is_own = [getattr(cls, name) is getattr(Adapter, name) for name in ("combine", "factors", "matrix")]
        finds = getattr(cls, "__getattr__", None) is nn.Module.__getattr__
        cls.lora_is_plain = finds and all(is_own) and not any(hasattr(cls, name) for name in _PLAIN)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # (..., in) -> (..., out)
        cls: Any = type(self)
        own: Any = self._parameters
        spec = self.lora
        if (
            cls.lora_is_plain
            and cls.base_class.forward is cls.lora_known_forward
            and self.lora_names == FACTORS
            and own.keys() >= _PLAIN
            and not (spec.rank_dropout or spec.module_dropout or args or kwargs)
        ):  # as below, without nn.Module's lookups, which take a small layer as long as a product
            A, B = own["lora_A"], own["lora_B"]
            return fused.linear(x, own["weight"], own["bias"], A, B, spec.scale, spec.dropout if self.training else 0.0)
        if cls.combine is not Adapter.combine or BIAS in self.lora_names:
            return super().forward(x, *args, **kwargs)
        A, B = self.factors()
        dropout = self.lora.dropout if self.training else 0.0
        W = self._parameters.get("weight")
        is_known = cls.base_class.forward is cls.lora_known_forward and not (args or kwargs)
        if is_known and W is not None and self.weight is W:
            b: Any = self.bias
            return fused.linear(x, self.matrix(self, W), b, A, B, self.lora.scale, dropout)
        base: Tensor = super(Adapter, self).forward(x, *args, **kwargs)
        return fused.add_update(base, x, A, B, self.lora.scale, dropout)

    def update(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        update = fused.update(x, *self.factors(), self.lora.dropout if self.training else 0.0)
        return update + getattr(self, BIAS).to(update.dtype) if BIAS in self.lora_names else update

    @staticmethod
    def multiply(x: Tensor, W: Tensor) -> Tensor:
        """x times a weight, laid out as this class does."""
        return F.linear(x, W)

    def check_mergeable(self) -> None:
        super().check_mergeable()
        cls: Any = type(self).base_class
        W = self._parameters["weight"]
        assert W is not None
        if not has_own_forward(cls) or not is_plain(W):
            return
        # A subclass may do more than multiply by its weight (scale, normalise). Tried with a change D of W's size.
        size = self.lora_A.shape[1]
        D = torch.arange(W.numel(), device=W.device).sin().view_as(W).to(W.dtype) * (W.detach().abs().amax() + 1)
        x = torch.arange(2 * size, device=W.device).cos().view(2, size).to(W.dtype)
        was_training = self.training
        self.training = False
        try:
            with torch.no_grad(), torch.autocast(W.device.type, enabled=False):
                change = self.multiply(x, D)
                expected = cls.forward(self, x) + change
                self._parameters["weight"] = nn.Parameter(W + D, requires_grad=False)
                agrees = torch.allclose(
                    cls.forward(self, x), expected, rtol=0.05, atol=0.05 * float(change.abs().amax())
                )
        finally:
            self._parameters["weight"] = W
            self.training = was_training
        if not agrees:
            raise AdapterStateError(
                f"a {cls.__name__} cannot be merged: its output is not its input times its weight, plus a bias. "
                "Use it unmerged."
            )


class WeightReadLinearLoRA(LinearLoRA):
    """A Linear whose parent reads `weight` in its own kernels: it is shown the adapted weight, W + scale * B A.

    nn.TransformerEncoderLayer's fast path does so with linear1 and linear2. Called, the layer computes as any Linear;
    read, it gives a weight that requires grad, which also keeps the fast path out of training.
    """

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        if has_own_forward(type(module)):
            raise TargetError(
                "its parent reads its weight without calling it, and its class has a forward of its own: which of the "
                "two holds cannot be known. Leave it out with exclude_modules"
            )

    replaces = ("weight", "bias")

    @property
    def weight(self) -> Tensor:
        return self.adapted_weight(dropped=True).to(self.dense_weight().dtype)

    @property
    def bias(self) -> Tensor | None:
        base, mine = self._parameters["bias"], self._parameters.get(BIAS)
        if mine is None:
            return base
        update = self.lora.scale * mine
        return update.to(self.dense_weight().dtype) if base is None else (base + update).to(base.dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.combine(F.linear(x, self.dense_weight(), self._parameters["bias"]), self.update(x))


class OutProjectionLoRA(WeightReadLinearLoRA, adapts=NonDynamicallyQuantizableLinear):
    """nn.MultiheadAttention's out_proj, which is only ever read, never called, and others like it (see `only_reads`):
    dropout is on the columns of A, one draw for all tokens of a forward."""

    def factors(self, parameter: str = "weight", *, dropped: bool = True) -> tuple[Tensor, Tensor]:
        A, B = super().factors(parameter, dropped=dropped)
        return (A * kept_columns(self.lora, A) if dropped and self.training and self.lora.dropout else A), B

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return F.linear(x, self.weight, self.bias)
