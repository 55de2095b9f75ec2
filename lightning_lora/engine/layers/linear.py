"""nn.Linear and everything derived from it; and the Linear whose weight its parent reads without calling it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.engine.layers.base import Adapter, AdapterSpec, has_own_forward
from lightning_lora.engine.storage import is_plain
from lightning_lora.errors import AdapterStateError, TargetError


class LinearLoRA(Adapter, adapts=nn.Linear):
    """A is (rank, in), B is (out, rank)."""

    @staticmethod
    def shapes(module: nn.Linear, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.in_features), (module.out_features, rank)

    def update(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        x = self.lora_dropout(x)
        # In the input's precision: float32 masters on a bfloat16 base compute in bfloat16; autocast casts both.
        A, B, bias = self.factors_in(x.dtype)
        return F.linear(F.linear(x, A), B, bias)

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
        if type(module).forward is not nn.Linear.forward:
            raise TargetError(
                "its parent reads its weight without calling it, and its class has a forward of its own: which of the "
                "two holds cannot be known. Leave it out with exclude_modules"
            )

    @property
    def weight(self) -> Tensor:
        return self.adapted_weight(dropped=True).to(self.dense_weight().dtype)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.combine(F.linear(x, self.dense_weight(), self._parameters["bias"]), self.update(x))


class OutProjectionLoRA(WeightReadLinearLoRA, adapts=NonDynamicallyQuantizableLinear):
    """nn.MultiheadAttention's out_proj, which is only ever read, never called."""

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        super().check(module, spec)
        if spec.dropout:
            raise TargetError(
                "the out_proj of nn.MultiheadAttention is used through its weight, where dropout on the adapter's "
                "input has no meaning: set dropout=0, or leave it out with exclude_modules=['out_proj']"
            )
