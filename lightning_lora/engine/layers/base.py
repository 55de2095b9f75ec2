"""A layer is adapted by swapping its class, so it keeps its identity, its weight, its hooks and its state-dict keys.

`Adapter` is the mixin that all geometries share. A geometry says what A and B are for one kind of layer:

    class LinearLoRA(Adapter, adapts=nn.Linear):
        def update(self, x): ...

`swap` gives the module the class `LoRALinear(LinearLoRA, Linear)`. A subclass of
nn.Linear, quantized or otherwise derived, is found through its parents and keeps its own forward.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn

from lightning_lora.engine import fused, shown, switch
from lightning_lora.engine.layers.whole import original
from lightning_lora.engine.storage import can_be_dense, dense, is_plain, is_wrapper, shape_of
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

NOT_GIVEN: Any = object()
"""In place of an input that was given by its name."""
_INSIDE: ContextVar[dict[int, dict[Any, Tensor] | None] | None] = ContextVar("lora_inside", default=None)
"""The layers whose own forward runs here, by identity, each with what it has read so far, or None if it is off."""


def _asking(forward: Any) -> Any:
    """`forward` of a geometry, as an adapted layer runs it: where its adapter is off, the module's own runs."""

    @functools.wraps(forward)
    def asking(self: Any, *args: Any, **kwargs: Any) -> Any:
        if switch.used and switch.is_off(self):
            return self.bare_forward(*args, **kwargs)
        return forward(self, *args, **kwargs)

    asking.lora_asks = True  # type: ignore[attr-defined]
    return asking


@functools.lru_cache(maxsize=256)
def _name_of_input(cls: Any) -> str:
    """What `cls` calls the first argument of its forward."""
    return list(inspect.signature(cls.forward).parameters)[1]


class Adapter(_Host):
    """What every adapted layer is, beside its own class: `isinstance(module, Adapter)` tells which ones are ours."""

    geometries: ClassVar[dict[type[nn.Module], type[Adapter]]] = {}
    mixin: ClassVar[Any]
    base_class: ClassVar[type[nn.Module]]

    lora: AdapterSpec
    lora_names: tuple[str, ...]
    """The names under which it holds the tensors of its adapter."""
    lora_path: str
    """Its name in the model, for messages."""
    lora_by_weight: ClassVar[bool] = False
    """Whether its own forward reads the adapted weight, and no update is added to what it computes."""
    lora_is_inside: bool = False
    """Whether its own forward runs just now, in code that is being compiled (elsewhere `_INSIDE` says so)."""
    lora_is_bare: bool = False
    """Whether it does so with its adapter off."""
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815
    lora_A0: Tensor  # noqa: N815
    lora_B0: Tensor  # noqa: N815

    def __init_subclass__(cls, adapts: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if adapts is not None:
            Adapter.geometries[adapts] = cls
        if "forward" in vars(cls) and not hasattr(cls.forward, "lora_asks"):
            cls.forward = _asking(cls.forward)  # type: ignore[method-assign]

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

    def forward(self, input: Any = NOT_GIVEN, *args: Any, **kwargs: Any) -> Any:
        if input is NOT_GIVEN:
            input, kwargs = self.given_by_name(kwargs)
        if switch.used and switch.is_off(self):
            return self.bare_forward(input, *args, **kwargs)
        base = self.base_forward(input, *args, **kwargs)
        return base if self.lora_by_weight else self.combine(base, self.update(input))

    forward.lora_asks = True  # type: ignore[attr-defined]

    def base_forward(self, *args: Any, **kwargs: Any) -> Any:
        """What the module's own class computes, in which it reads its own weight (see `read_attribute`)."""
        return self._own_forward(False, args, kwargs)

    def bare_forward(self, *args: Any, **kwargs: Any) -> Any:
        """The same without its adapter, also where the class reads the adapted weight."""
        return self._own_forward(True, args, kwargs)

    def _own_forward(self, is_bare: bool, args: Any, kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            self.lora_is_inside, self.lora_is_bare = True, is_bare
            try:
                return super().forward(*args, **kwargs)
            finally:
                self.lora_is_inside = False
        # What is read is computed once in a forward: a mixture of experts reads its stack once for each expert.
        token = _INSIDE.set({**(_INSIDE.get() or {}), id(self): None if is_bare else {}})
        try:
            return super().forward(*args, **kwargs)
        finally:
            _INSIDE.reset(token)

    def given_by_name(self, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        """The input, where it was given by the name that the module's own class has for it, and all else."""
        own_class: Any = type(self).base_class
        name = _name_of_input(own_class)
        if name not in kwargs:
            raise TypeError(f"{type(self).__name__}.forward() misses its argument {name!r}.")
        return kwargs[name], {key: value for key, value in kwargs.items() if key != name}

    def __prepare_scriptable__(self) -> Any:
        """torch.jit.script asks for it."""
        raise AdapterStateError(
            f"{self.lora_path!r} is adapted, and TorchScript reads the code of a class, which an adapted one has not: "
            "call merge(model) first, or use torch.jit.trace or torch.compile."
        )

    # Reads of a weight or a bias by its name, from outside of the layer or by its own class.

    def read_attribute(self, name: str) -> Any:
        """What `self.<name>` gives: to the module's own forward the base's own, unless it is adapted by its weight; to
        all others the adapted one (see shown.py)."""
        own = self.own(name)
        reads: dict[Any, Tensor] | None = None
        is_inside = self.__dict__.get("lora_is_inside", False)
        is_bare = is_inside and self.lora_is_bare
        if not torch.compiler.is_compiling():
            inside = _INSIDE.get() or {}
            reads = inside.get(id(self))
            is_inside, is_bare = id(self) in inside, reads is None
        # Inside of its own forward it was asked before.
        if is_bare if is_inside else switch.used and switch.is_off(self):
            own = original(self, name, own)
            if own is None and name != "bias":
                raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
            return own
        if (is_inside and not self.lora_by_weight) or not self._adapts(name):
            return own
        if own is not None and not is_plain(own) and not is_wrapper(own):
            return own  # its numbers are no weight for one who does not know how they are stored
        if own is not None and self._awaits(own):
            return own  # while weights are loaded into a model that was adapted on the meta device
        if is_inside:
            if reads is None:
                return self.value_read(name)
            # What was computed without a graph is no answer for one who needs it (activation checkpointing).
            key = name, torch.is_grad_enabled(), torch.is_inference_mode_enabled()
            if key not in reads:
                reads[key] = self.value_read(name)
            return reads[key]
        if own is None and name != "bias":
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        if own is None:
            return self.value_read(name)
        is_drawn = self.lora_by_weight and self.training and self._drops(name)
        leaves = self.shown_leaves()
        return shown.show(self, name, own, leaves, is_drawn=is_drawn, to_kernels=self.lora_to_kernels)

    lora_to_kernels: ClassVar[bool] = False
    """Whether its reader hands the weight to kernels that do not ask what they are given."""

    def value_read(self, name: str) -> Any:
        """The adapted weight or bias, in the base's own precision. Raises AdapterStateError where it has none."""
        if name == "bias":
            bias, mine = self.own("bias"), self._parameters.get(BIAS)
            if mine is None:
                return bias
            update = self.lora.scale * mine
            return update.to(self.dense_weight().dtype) if bias is None else (bias + update).to(bias.dtype)
        self.check_shown(name)
        return self.adapted_weight(name, dropped=self.lora_by_weight).to(self.dense_weight(name).dtype)

    def check_shown(self, name: str) -> None:
        """Raise AdapterStateError where no weight of the base's shape computes what this layer does."""

    def shown_leaves(self) -> tuple[Tensor, ...]:
        """The tensors that an adapted weight depends on, and that may be trained."""
        return tuple(p for p in self._parameters.values() if p is not None)

    def _adapts(self, name: str) -> bool:
        return name in (self.lora.parameters or ("weight",)) or (name == "bias" and BIAS in self.lora_names)

    def _drops(self, name: str) -> bool:
        spec = self.lora.parameters.get(name, self.lora)
        return bool(spec.dropout or spec.rank_dropout or spec.module_dropout)

    def _awaits(self, own: Tensor) -> bool:
        return not own.is_meta and any(getattr(self, name).is_meta for name in self.lora_names)

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
        """The base's own weight or bias: its parameter, or a plain attribute (in replicas of nn.DataParallel, after
        pruning), or what its class computes in its place (parametrizations)."""
        p: Tensor | None = self._parameters.get(parameter)
        if p is not None:
            return p
        p = self.__dict__.get(parameter, self._buffers.get(parameter))
        if p is None and parameter not in self._parameters:
            computed = getattr(type(self).base_class, parameter, None)
            p = computed.__get__(self, type(self)) if computed is not None else None
        return p

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
        shown.forget(self)
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
