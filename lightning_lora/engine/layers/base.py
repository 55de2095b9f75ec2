"""A layer is adapted by swapping its class, so it keeps its identity, its weight, its hooks and its state-dict keys.

`Adapter` is the mixin that all geometries share. A geometry says what A and B are for one kind of layer:

    class LinearLoRA(Adapter, adapts=nn.Linear):
        def update(self, x): ...

`swap` gives the module the class `LoRALinear(LinearLoRA, Linear)`. A subclass of
nn.Linear, quantized or otherwise derived, is found through its parents and keeps its own forward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine import fused
from lightning_lora.engine.storage import can_be_dense, dense, shape_of
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import AdapterStateError

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


if TYPE_CHECKING:
    _Host = nn.Module
else:
    _Host = object  # the mixin goes in front of a module's own class, which brings nn.Module


class Adapter(_Host):
    """What every adapted layer is, beside its own class: `isinstance(module, Adapter)` tells which ones are ours."""

    geometries: ClassVar[dict[type[nn.Module], type[Adapter]]] = {}
    mixin: ClassVar[Any]
    base_class: ClassVar[type[nn.Module]]

    lora: AdapterSpec
    lora_names: tuple[str, ...]
    """The names under which it holds the tensors of its adapter."""
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_A0: Tensor  # noqa: N815
    lora_B0: Tensor  # noqa: N815

    def __init_subclass__(cls, adapts: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if adapts is not None:
            Adapter.geometries[adapts] = cls

    # What a geometry defines. Its names must not be those of a class that it adapts: `check_swappable` refuses that.

    draws_b: ClassVar[bool] = False
    """Whether it is A that starts at zero, and B that is drawn."""
    replaces: ClassVar[tuple[str, ...]] = ()
    """Attributes of the module's own that it takes the place of."""
    companions: ClassVar[tuple[str, ...]] = ()
    """Names of children that are adapted whenever such a module is a target."""

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        """Raise TargetError if `module` cannot be adapted with `spec`; called before anything is changed, and once for
        all modules that differ in the values of their tensors alone."""

    @classmethod
    def check_variant(cls, module: Any, config: Any) -> None:
        """The same for what the LoRAConfig `config` asks for beside the geometry."""

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for `module`: A reads the input, B writes the output."""
        raise NotImplementedError

    @classmethod
    def shapes_of(cls, module: Any, parameter: str, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The same for one of its parameters."""
        return cls.shapes(module, rank)

    @staticmethod
    def parameters_of(module: Any) -> tuple[str, ...]:
        """The parameters that stand for `module` as a target, where it is they that are adapted."""
        return ()

    @staticmethod
    def suffix_of(parameter: str) -> str:
        """What the names of the tensors end in that adapt `parameter`."""
        return ""

    @staticmethod
    def dimensions_after_channels(module: Any) -> int:
        """How many dimensions of an output come after its channels."""
        return 0

    @staticmethod
    def matrix(module: Any, W: Tensor) -> Tensor:
        """A weight of `module` as the matrix (out, in) that B A changes; a view where that is possible."""
        return W

    @staticmethod
    def from_matrix(module: Any, M: Tensor) -> Tensor:
        """Undo `matrix`."""
        return M

    @classmethod
    def by_output(cls, module: Any, W: Tensor) -> Tensor:
        """A weight of `module` with its last dimension along the weights of one output."""
        return cls.matrix(module, W)

    @classmethod
    def from_output(cls, module: Any, M: Tensor) -> Tensor:
        """Undo `by_output`."""
        return cls.from_matrix(module, M)

    def update(self, x: Tensor) -> Tensor:
        """B A x for a layer input x, without the scale; shaped as the layer's output."""
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise AdapterStateError if this layer's update cannot be written as a change of its parameters."""
        weight = self._parameters.get("weight")
        if not can_be_dense(weight):
            raise AdapterStateError(
                f"a {type(self).base_class.__name__} cannot be merged: its weight is quantized in an unknown way, or "
                "computed from other parameters. Use the adapter unmerged, or load the base in full precision."
            )
        if self._parameters.get(BIAS) is not None and self._parameters.get("bias") is None:
            raise AdapterStateError("it has no bias that could take in that of B (lora_bias). Use it unmerged.")

    def shares_with(self, other: nn.Module) -> bool:
        """Whether `other`, which shares its weight, is adapted with it: then they share what is merged, too."""
        return False

    def swapped_in(self) -> None:
        """Called when the module has got its adapter, and its class."""

    def swapped_out(self) -> None:
        """Called before it loses them."""

    # What all of them share.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.combine(super().forward(x, *args, **kwargs), self.update(x))

    def combine(self, base: Tensor, update: Tensor) -> Tensor:
        """The adapted output from the base's output and the unscaled update."""
        update, scale = update.to(base.dtype), self.lora.scale
        # torch 2.13's inductor fuses torch.add with B's product and loses the alpha.
        return base + scale * update if torch.compiler.is_compiling() else torch.add(base, update, alpha=scale)

    def lora_dropout(self, x: Tensor) -> Tensor:
        return fused.dropout(x, self.lora.dropout) if self.lora.dropout and self.training else x

    def factors(self, parameter: str = "weight", *, dropped: bool = True) -> tuple[Tensor, Tensor]:
        """A and B as they enter the update: with what is `dropped` in this forward, if it trains, and with the frozen
        start, if there is one, as further ranks: s (B A - B0 A0) = s [B - B0, B0] [A; A - A0], which is zero bit for
        bit at the start, and exact also where B A and B0 A0 are all but equal."""
        A: Tensor = self.lora_A
        B: Tensor = self.lora_B
        if "lora_A0" in self._buffers:
            A0, B0 = self.lora_A0.to(A.dtype), self.lora_B0.to(B.dtype)
            A, B = torch.cat([A, A - A0]), torch.cat([B - B0, B0], dim=1)
        if dropped and self.training:
            A = A * kept_ranks(self.lora, A) if self.lora.rank_dropout or self.lora.module_dropout else A
        return A, B

    def factors_in(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor | None]:
        """A, B and B's bias, if it has one, as they enter the update in this forward, in `dtype`."""
        A, B = self.factors()
        return A.to(dtype), B.to(dtype), getattr(self, BIAS).to(dtype) if BIAS in self.lora_names else None

    def delta_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        """scale * B A, shaped as the layer's weight, in the precision of the factors (float32 at least)."""
        A, B = self.factors(parameter, dropped=dropped)
        dtype = torch.promote_types(A.dtype, torch.float32)
        product = B.flatten(1).to(dtype) @ A.flatten(1).to(dtype)
        # In place, since fresh memory costs more than the product; but a DTensor may have to be laid out anew.
        scaled = product.mul_(self.lora.scale) if type(product) is Tensor else self.lora.scale * product
        return self.from_matrix(self, scaled)

    def adapted_weight(self, parameter: str = "weight", *, dropped: bool = False) -> Tensor:
        """The weight with the adapter in it, in float32 or wider, whatever autocast says."""
        W = self.dense_weight(parameter)
        with without_autocast(W):
            delta = self.delta_weight(parameter, dropped=dropped)
            fits = delta.stride() == W.stride() and delta.dtype == torch.promote_types(delta.dtype, W.dtype)
            in_place = fits and type(delta) is Tensor and not torch.is_grad_enabled()
            return delta.add_(W) if in_place else W + delta

    def dense_weight(self, parameter: str = "weight") -> Tensor:
        """The base's own weight, in floating point."""
        W = self.own(parameter)
        assert W is not None
        return dense(self, W)

    def own(self, parameter: str) -> Tensor | None:
        """A parameter of the base's, past what a class computes in its place. A replica that nn.DataParallel makes has
        none: it holds them as plain attributes."""
        p: Tensor | None = self._parameters.get(parameter)
        return self.__dict__.get(parameter) if p is None else p

    def merged_parameters(self) -> dict[str, Tensor]:
        """The values with which the layer's own parameters take the adapter in, each in its own precision."""
        merged = {"weight": self.adapted_weight().to(self.dense_weight().dtype)}
        mine, bias = self._parameters.get(BIAS), self._parameters.get("bias")
        if mine is not None and bias is not None:
            merged["bias"] = (bias + self.lora.scale * mine.to(torch.float32)).to(bias.dtype)
        return merged

    def merged_attributes(self) -> dict[str, Any]:
        """The layer's attributes that change with them."""
        return {}

    def merged_shape(self) -> tuple[int, ...] | None:
        """The shape of its merged weight, where that is another one."""
        return None

    @staticmethod
    def parameters_replaced(module: Any) -> None:
        """Called where merging has put another parameter into `module`, for a class that keeps them elsewhere too."""

    def lora_pairs(self, name: str) -> tuple[Pair, ...]:
        """Its low-rank updates; `name` is the module's."""
        return (Pair(name, self, "weight", self.lora, ""),)

    def lora_trained(self, pair: Pair) -> list[Tensor]:
        """The tensors of one of its updates that are trained."""
        own = (name for name in self.lora_names if name.removesuffix(pair.suffix) in TENSORS)
        return [t for name in own if (t := getattr(self, name)).requires_grad]

    def extra_repr(self) -> str:
        mine = f"rank={self.lora.rank}, scale={self.lora.scale:g}"
        theirs = super().extra_repr()
        return f"{theirs}, {mine}" if theirs else mine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        own = [getattr(self, name) for name in self.lora_names]
        ours = {id(t) for p in own for t in (p, p.grad) if t is not None}

        def move(t: Tensor) -> Tensor:
            moved = fn(t)
            if id(t) not in ours:
                return moved
            if t.is_meta and not moved.is_meta:  # to_empty: not what lay in memory, but zeros, for `start_adapters`
                return moved.zero_()
            # `module.to(torch.bfloat16)`, which Lightning's bf16-true does after injection, must not round A and B.
            too_narrow = self.lora.keeps_precision and moved.dtype.itemsize < torch.float32.itemsize
            return t.to(moved.device, torch.float32) if too_narrow else moved

        return super()._apply(move, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        # A base checkpoint, which knows nothing of A and B, loads strictly after injection as well as before it.
        ours = {prefix + name for name in self.lora_names}
        is_base_checkpoint = ours.isdisjoint(state_dict)
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, found, *rest)
        missing.extend(key for key in found if not (is_base_checkpoint and key in ours))


def without_autocast(t: Tensor) -> AbstractContextManager[Any]:
    """Computing with `t` in its own precision. There is no autocast on the meta device to turn off."""
    return nullcontext() if t.is_meta else torch.autocast(t.device.type, enabled=False)


def kept_ranks(spec: AdapterSpec, A: Tensor, dim: int = 0) -> Tensor:
    """A factor for each row of A (of each matrix of a stack, where its rows are dimension `dim`): 0 where it is dropped
    in this forward, and such that the mean is 1."""
    whole, each = spec.module_dropout, spec.rank_dropout
    keep = torch.rand(spec.rank, device=A.device, dtype=torch.float32) >= each
    keep = keep & (torch.rand(1, device=A.device, dtype=torch.float32) >= whole)
    keep = keep.repeat(A.shape[dim] // spec.rank)  # a frozen start goes with the ranks that began as it
    return (keep.to(A.dtype) / ((1 - each) * (1 - whole))).view(-1, *(1,) * (A.dim() - dim - 1))


def kept_columns(spec: AdapterSpec, A: Tensor) -> Tensor:
    """The same for the columns of A, where its input cannot be dropped out of because only a weight is read."""
    return F.dropout(torch.ones_like(A[..., :1, :]), spec.dropout)


def geometry_of(cls: type[nn.Module]) -> type[Adapter] | None:
    """The geometry registered for `cls` or for its nearest parent; None where no layer of that kind can be adapted."""
    for parent in cls.__mro__:
        if parent in Adapter.geometries:
            return Adapter.geometries[parent]
    return None


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether `cls` computes in another way than the class that its geometry is registered for, by itself: not what a
    swap has put in front of it."""
    cls = cls.__dict__.get("base_class", cls)
    known = next(parent for parent in cls.__mro__ if parent in Adapter.geometries)
    return cls.forward is not known.forward


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapted layers of `model` with their names; a layer registered under several names comes once."""
    found: Any = Tree.of(model).of_classes(is_adapter)
    yield from found


def is_adapter(cls: type[nn.Module]) -> bool:
    """Whether modules of that class are adapted layers."""
    return issubclass(cls, Adapter)


def pairs(model: nn.Module) -> Iterator[Pair]:
    """The low-rank updates of `model`: one for each adapted layer, or for each parameter of it that is adapted."""
    for name, module in adapters(model):
        yield from module.lora_pairs(name)
