"""nn.Linear and everything derived from it; and the Linear whose weight its parent reads without calling it."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.engine import fused, switch
from lightning_lora.engine.layers.base import BIAS, FACTORS, NOT_GIVEN, Adapter
from lightning_lora.engine.layers.by_weight import ByWeight

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
        hidden = any(hasattr(getattr(cls, "base_class", None), name) for name in _PLAIN)
        # A class that swapping did not make, such as a parametrization's, has attributes in front of ours.
        cls.lora_is_plain = finds and all(is_own) and not hidden and "base_class" in cls.__dict__

    def forward(self, input: Any = NOT_GIVEN, *args: Any, **kwargs: Any) -> Tensor:  # (..., in) -> (..., out)
        cls: Any = type(self)
        own: Any = self._parameters
        spec = self.lora
        if input is NOT_GIVEN:
            input, kwargs = self.given_by_name(kwargs)
        if switch.used and switch.is_off(self):
            bare: Tensor = self.bare_forward(input, *args, **kwargs)
            return bare
        if (
            cls.lora_is_plain
            and cls.base_class.forward is cls.lora_known_forward
            and self.lora_names == FACTORS
            and own.keys() >= _PLAIN
            and not (spec.rank_dropout or spec.module_dropout or args or kwargs)
        ):  # as below, without nn.Module's lookups, which take a small layer as long as a product
            A, B = own["lora_A"], own["lora_B"]
            p = spec.dropout if self.training else 0.0
            return fused.linear(input, own["weight"], own["bias"], A, B, spec.scale, p)
        if cls.combine is not Adapter.combine or BIAS in self.lora_names:
            return super().forward(input, *args, **kwargs)
        A, B = self.factors()
        dropout = self.lora.dropout if self.training else 0.0
        is_known = cls.base_class.forward is cls.lora_known_forward and not (args or kwargs)
        if is_known and "base_class" in cls.__dict__:
            W, b = self.own("weight"), self.own("bias")
            assert W is not None
            return fused.linear(input, self.matrix(self, W), b, A, B, self.lora.scale, dropout)
        base: Tensor = self.base_forward(input, *args, **kwargs)
        return fused.add_update(base, input, A, B, self.lora.scale, dropout)

    forward.lora_asks = True  # type: ignore[attr-defined]

    def update(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        update = fused.update(x, *self.factors(), self.lora.dropout if self.training else 0.0)
        return update + getattr(self, BIAS).to(update.dtype) if BIAS in self.lora_names else update

    @staticmethod
    def multiply(x: Tensor, W: Tensor) -> Tensor:
        """x times a weight, laid out as this class does."""
        return F.linear(x, W)


class FastPathLinearLoRA(LinearLoRA):
    """A Linear that its parent calls, but for a fast path in which it hands the weight to one kernel."""

    lora_to_kernels = True


class OutProjectionLoRA(ByWeight, LinearLoRA, adapts=NonDynamicallyQuantizableLinear):
    """nn.MultiheadAttention's out_proj, which is read and never called, and others like it (see bypass.py)."""

    lora_to_kernels = True
