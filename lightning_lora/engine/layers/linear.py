"""nn.Linear and everything derived from it; and Linears whose parent reads their weight without calling them."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from lightning_lora.engine import fused, switch
from lightning_lora.engine.layers.base import NOT_GIVEN, Adapter, has_own_forward
from lightning_lora.engine.layers.by_weight import ByWeight, adds_its_update, by_weight
from lightning_lora.engine.layers.cell import FEW_POSITIONS, Cell, Factors, OwnAdapters, copy_scaled
from lightning_lora.engine.layers.pair import BIAS, FACTORS
from lightning_lora.engine.layers.reads import Reading, keeps_attributes
from lightning_lora.engine.weights import can_be_dense, dense, is_plain, is_wrapper

# A gradient for layers whose kernels pass none to their input: 4-bit weights that bitsandbytes has rearranged for a
# CPU, and torchao's weights that round the input as well (Int8DynamicActivation..., for example).
#
# Without it, adapters below such a layer would silently train on a part of their gradient. The input gets the gradient
# of a layer that rounds nothing: G W, with the dequantized W (straight-through).


def straight_through(module: nn.Module, x: Tensor, forward: Callable[[], Tensor]) -> Tensor:
    """Run `forward`, that of `module` on x, and supply the gradients of x and of the bias that it does not pass."""
    weight = module._parameters.get("weight")
    bias: Any = module._parameters.get("bias")
    is_trained = bias is not None and bias.requires_grad
    if not torch.is_grad_enabled() or not (x.requires_grad or is_trained):
        return forward()
    if is_trained:  # detached, so that y.requires_grad tells whether x gets a gradient
        module._parameters["bias"] = bias.detach()
    try:
        y = forward()
    finally:
        if is_trained:
            module._parameters["bias"] = bias
    if x.requires_grad and not y.requires_grad and can_be_dense(weight):
        y = _StraightThrough.apply(y, x, module, weight)
    return y + (bias - bias.detach()).to(y.dtype) if is_trained else y


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, module: nn.Module, weight: Tensor) -> Tensor:
        ctx.module, ctx.weight = module, weight
        # y in the same memory, but not as a view: autograd refuses to change a view in place (nn.ReLU(inplace=True)).
        if torch.compiler.is_compiling():
            return y.clone()
        return y.new_empty(0).set_(y.untyped_storage(), y.storage_offset(), y.size(), y.stride())

    @staticmethod
    def backward(ctx: Any, G: Tensor) -> tuple[None, Tensor, None, None]:
        return None, G @ dense(ctx.module, ctx.weight).to(G.dtype), None, None


_PLAIN = frozenset(("weight", "bias", *FACTORS))


class LinearLoRA(Adapter, adapts=nn.Linear):
    """A is (rank, in), B is (out, rank)."""

    lora_known_forward: ClassVar[Any] = nn.Linear.forward
    """A forward that multiplies by the weight, adds the bias, and does nothing else."""
    lora_is_plain: ClassVar[bool]
    """True if weight, bias, A and B, taken from nn.Module's own dicts, determine the output."""

    @staticmethod
    def shapes(module: nn.Linear, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        return (rank, module.in_features), (module.out_features, rank)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        is_own = [getattr(cls, name) is getattr(Adapter, name) for name in ("combine", "factors", "matrix")]
        finds = getattr(cls, "__getattr__", None) is nn.Module.__getattr__
        hidden = any(hasattr(getattr(cls, "base_class", None), name) for name in _PLAIN)
        cls.lora_is_plain = finds and all(is_own) and not hidden and keeps_attributes(cls)

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
            and type(own["weight"]) is nn.Parameter
            and not (spec.rank_dropout or spec.module_dropout or args or kwargs)
        ):  # the same as below, without nn.Module's lookups: for a small layer they take as long as a product
            A, B = own["lora_A"], own["lora_B"]
            p = spec.dropout if self.training else 0.0
            return fused.linear(input, own["weight"], own["bias"], A, B, spec.scale, p)
        if cls.combine is not Adapter.combine or BIAS in self.lora_names:
            return super().forward(input, *args, **kwargs)
        A, B = self.factors()
        p = spec.dropout if self.training else 0.0
        is_known = cls.base_class.forward is cls.lora_known_forward and not (args or kwargs)
        if is_known and keeps_attributes(cls) and not _is_wrapped(self):  # a wrapper may pass no gradient on
            W, b = self.own("weight"), self.own("bias")
            assert W is not None
            return fused.linear(input, self.matrix(self, W), b, A, B, spec.scale, p)
        base: Tensor = self.base_forward(input, *args, **kwargs)
        return fused.add_update(base, input, A, B, spec.scale, p)

    forward.lora_asks = True  # type: ignore[attr-defined]

    def own_forward(self, is_bare: bool, args: Any, kwargs: Any) -> Any:
        run = functools.partial(super().own_forward, is_bare, args, kwargs)
        return straight_through(self, args[0], run) if _is_wrapped(self) else run()

    def update(self, x: Tensor) -> Tensor:  # (..., in) -> (..., out)
        update = fused.update(x, *self.factors(), self.lora.dropout if self.training else 0.0)
        return update + getattr(self, BIAS).to(update.dtype) if BIAS in self.lora_names else update

    lora_by_position = True

    @staticmethod
    def inputs_of(module: Any, x: Tensor) -> Tensor:
        return x.reshape(-1, x.shape[-1])

    @classmethod
    def way_for(cls, module: Any, reading: Reading) -> type[Adapter]:
        geometry: Any = cls
        if not cls.lora_by_weight:
            if reading.at_times:
                return OutProjectionLoRA
            geometry = FastPathLinearLoRA if reading.weight_alone else cls
        if not has_own_forward(type(module)):
            return geometry
        W = module._parameters.get("weight")
        # The layers of libraries that quantize multiply by the dequantized weight; some quantize it when it is moved.
        if W is not None and (not is_plain(W) or type(W) is not nn.Parameter):
            return geometry
        if W is None or not adds_its_update(module, geometry.multiply, geometry.shapes(module, 1)[0][1]):
            return by_weight(geometry)
        return geometry

    @staticmethod
    def multiply(x: Tensor, W: Tensor) -> Tensor:
        """The product of x and a weight that is laid out as in this class."""
        return F.linear(x, W)


MANY_ROWS = 16
"""With at least so many rows of x, and always in 16 bits, A x^T takes up to a third less time than x A^T."""


class LinearCell(Cell, serves=LinearLoRA):
    """nn.Linear, what derives from it, and transformers' Conv1D."""

    def shapes(self, rank: int) -> tuple[tuple[int, ...], ...]:
        size: int = self.geometry.shapes(self.module, rank)[0][1]
        return (rank, size), (rank, self.out), (self.out,), (self.out,)

    def store(self, slot: int, A: Tensor, B: Tensor, scale: float) -> None:
        self.A[slot, : A.shape[0]].copy_(A)
        copy_scaled(self.B[slot, : A.shape[0]], B.T, scale)

    def one(self, slot: int, rank: int) -> Factors:
        return self.A[slot : slot + 1, :rank].mT, self.B[slot : slot + 1, :rank]

    def add_one(self, base: Tensor, x: Tensor, factors: Factors) -> Tensor:
        # As a batch of one matrix, the shape of a single row: to view it otherwise takes a third of a product's time.
        A, B = factors
        shape = x.shape
        is_one = len(shape) == 3 and shape[0] == 1
        if not is_one:
            x = x.reshape(1, -1, shape[-1])
        if x.shape[1] >= MANY_ROWS or base.dtype.itemsize < 4:
            t = torch.bmm(A.mT, x.mT).mT  # the long side is last, where kernels are faster
        else:
            t = torch.bmm(x, A)
        if self._is_free(base):
            (base if is_one else base.view(1, -1, self.out)).baddbmm_(t, B)
            return base
        return base + torch.bmm(t, B).view(base.shape)

    def add_rows(self, base: Tensor, x: Tensor, rows: OwnAdapters) -> Tensor:
        # The beams and tokens of a row lie together: to the routing they are one row with more positions.
        x = x.reshape(rows.count, -1, x.shape[-1])
        groups = rows.groups(positions=x.shape[1])
        A, B = rows.factors(self, base.dtype, groups)
        if groups is not None:
            update = torch.bmm(torch.bmm(groups.gathered(x), A.transpose(1, 2)), B)
            update = groups.scattered(update).view(base.shape)
            return base.add_(update) if self._is_free(base) else base + update
        if 1 < x.shape[1] < FEW_POSITIONS:
            t = torch.bmm(x, A.mT)
        else:  # A is read as it is stored: for one position this is a matrix times a vector
            t = torch.bmm(A, x.mT).mT
        if self._is_free(base):
            base.view(rows.count, -1, self.out).baddbmm_(t, B)
            return base
        return base + torch.bmm(t, B).view(base.shape)


def _is_wrapped(module: nn.Module) -> bool:
    weight = module._parameters.get("weight")
    return weight is not None and is_wrapper(weight)


class FastPathLinearLoRA(LinearLoRA):
    """A Linear that its parent calls, except on a fast path, where the parent hands the weight to a kernel."""

    lora_to_kernels = True


class OutProjectionLoRA(ByWeight, LinearLoRA, adapts=NonDynamicallyQuantizableLinear):
    """nn.MultiheadAttention's out_proj, and other Linears whose parent reads the weight and may never call the layer
    (see plan.py)."""

    lora_to_kernels = True


# transformers' Conv1D: GPT-2's linear layer, whose weight is stored transposed, (in, out).


class Conv1DLoRA(LinearLoRA):
    """A is (rank, in), B is (out, rank), as for a Linear."""

    lora_known_forward = None  # known once transformers is imported

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        features_in, features_out = module.weight.shape
        return (rank, features_in), (features_out, rank)

    @staticmethod
    def multiply(x: Tensor, W: Tensor) -> Tensor:
        return x @ W

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        return W.T

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        return M.T


def register_conv1d() -> type[nn.Module] | None:
    """Register Conv1D if transformers' module that defines it was imported: else no model can contain a Conv1D."""
    module = sys.modules.get("transformers.pytorch_utils")
    if module is None:
        return None
    Adapter.geometries.setdefault(module.Conv1D, Conv1DLoRA)
    Conv1DLoRA.lora_known_forward = module.Conv1D.forward
    return module.Conv1D
