"""A layer is adapted by swapping its class, so it keeps its identity, its weight, its hooks and its state-dict keys.

`Adapter` is the mixin that all geometries share. A geometry says what A and B are for one kind of layer:

    class LinearLoRA(Adapter, adapts=nn.Linear):
        def update(self, x): ...

`swap` gives the module the class `LoRALinear(LinearLoRA, Linear)`. A subclass of
nn.Linear, quantized or otherwise derived, is found through its parents and keeps its own forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lightning_lora.engine.swap import swapped_class
from lightning_lora.errors import AdapterStateError, TargetError

FACTORS = ("lora_A", "lora_B")
"""The names under which a module holds its A and its B."""


@dataclass(frozen=True)
class AdapterSpec:
    """The numbers of one adapted layer."""

    rank: int
    alpha: float
    scale: float
    dropout: float = 0.0
    keeps_precision: bool = True
    """A and B stay in float32 when the model is cast to a narrower dtype (master weights)."""


if TYPE_CHECKING:
    _Host = nn.Module
else:
    _Host = object  # the mixin goes in front of a module's own class, which brings nn.Module


class Adapter(_Host):
    """What every adapted layer is, beside its own class: `isinstance(module, Adapter)` tells which ones are ours."""

    geometries: ClassVar[dict[type[nn.Module], type[Adapter]]] = {}
    mixin: ClassVar[type[Adapter]]
    base_class: ClassVar[type[nn.Module]]

    lora: AdapterSpec
    lora_A: nn.Parameter  # noqa: N815
    lora_B: nn.Parameter  # noqa: N815

    def __init_subclass__(cls, adapts: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if adapts is not None:
            Adapter.geometries[adapts] = cls

    # What a geometry defines.

    @classmethod
    def check(cls, module: Any, spec: AdapterSpec) -> None:
        """Raise TargetError if `module` cannot be adapted with `spec`; called before anything is changed."""

    @staticmethod
    def shapes(module: Any, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """The shapes of A and B for `module`: A reads the input, B writes the output."""
        raise NotImplementedError

    @staticmethod
    def initialise(A: Tensor, B: Tensor, init: Callable[[Tensor], object]) -> None:
        """Fill fresh factors so that the update starts at zero."""
        init(A)
        nn.init.zeros_(B)

    def update(self, x: Tensor) -> Tensor:
        """B A x for a layer input x, without the scale; shaped as the layer's output."""
        raise NotImplementedError

    def check_mergeable(self) -> None:
        """Raise AdapterStateError if this layer's update cannot be written as a change of its weight."""

    def delta_weight(self) -> Tensor:
        """scale * B A, shaped as the layer's weight, in the precision of the factors (float32 at least)."""
        raise NotImplementedError

    # What all of them share.

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.combine(super().forward(x, *args, **kwargs), self.update(x))

    def combine(self, base: Tensor, update: Tensor) -> Tensor:
        """The adapted output from the base's output and the unscaled update."""
        # Not torch.add(..., alpha=scale): torch 2.13's inductor fuses it with B's product and loses the alpha.
        return base + self.lora.scale * update.to(base.dtype)

    def lora_dropout(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.lora.dropout, self.training) if self.lora.dropout else x

    def factors(self) -> tuple[Tensor, Tensor]:
        """A and B, float32 or wider."""
        A, B = self.lora_A, self.lora_B
        dtype = torch.promote_types(A.dtype, torch.float32)
        return A.to(dtype), B.to(dtype)

    def extra_repr(self) -> str:
        mine = f"rank={self.lora.rank}, scale={self.lora.scale:g}"
        theirs = super().extra_repr()
        return f"{theirs}, {mine}" if theirs else mine

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        if not self.lora.keeps_precision:
            return super()._apply(fn, recurse)
        own = [self._parameters[name] for name in FACTORS]
        ours = {id(t) for p in own if p is not None for t in (p, p.grad) if t is not None}

        def keep_precision(t: Tensor) -> Tensor:
            # `module.to(torch.bfloat16)`, which Lightning's bf16-true does after injection, must not round A and B.
            moved = fn(t)
            too_narrow = id(t) in ours and moved.dtype.itemsize < torch.float32.itemsize
            return t.to(moved.device, torch.float32) if too_narrow else moved

        return super()._apply(keep_precision, recurse)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing: list[str], *rest: Any
    ) -> None:
        # A base checkpoint, which knows nothing of A and B, loads strictly after injection as well as before it.
        is_base_checkpoint = not any(prefix + name in state_dict for name in FACTORS)
        found: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, found, *rest)
        ours = {prefix + name for name in FACTORS}
        missing.extend(key for key in found if not (is_base_checkpoint and key in ours))


def geometry_of(cls: type[nn.Module]) -> type[Adapter] | None:
    """The geometry registered for `cls` or for its nearest parent; None where no layer of that kind can be adapted."""
    return next((Adapter.geometries[parent] for parent in cls.__mro__ if parent in Adapter.geometries), None)


def has_own_forward(cls: type[nn.Module]) -> bool:
    """Whether `cls` computes in another way than the class that its geometry is registered for."""
    known = next(parent for parent in cls.__mro__ if parent in Adapter.geometries)
    return cls.forward is not known.forward


_TAKE_OFF = "take them off with accelerate.hooks.remove_hook_from_module(model, recurse=True)"


def _is_wrapped(module: nn.Module) -> bool:
    """Whether something put another forward on the instance; accelerate, undone, leaves the class's own there."""
    forward = module.__dict__.get("forward")
    is_own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", 0) is type(module).forward
    return forward is not None and not is_own


def check_swappable(module: nn.Module, name: str) -> None:
    """Raise TargetError if swapping the class of `module` would not reach its forward, or would clash with it."""
    if _is_wrapped(module):
        raise TargetError(
            f"{name!r} has a forward of its own on the instance, as accelerate's hooks put there, which an adapter "
            f"would never see. Adapt the model first and add hooks after, or {_TAKE_OFF}."
        )
    taken = [attribute for attribute in (*FACTORS, "lora") if hasattr(module, attribute)]
    if taken:
        raise TargetError(f"{name!r} ({type(module).__name__}) already has an attribute {taken[0]!r} of its own.")


def swap(module: Any, geometry: Any, spec: AdapterSpec, A: nn.Parameter, B: nn.Parameter) -> None:
    """Make `module` an adapted layer, in place."""
    base_class: Any = type(module)
    module.__dict__.pop("forward", None)  # the class's own, by check_swappable, bound: it would hide the next class's
    module.register_parameter("lora_A", A)
    module.register_parameter("lora_B", B)
    module.__dict__["lora"] = spec
    module.__class__ = swapped_class("LoRA", geometry, base_class)


def swap_back(module: Adapter) -> Callable[[], None]:
    """Undo `swap`: the class that the module had, no factors, its weight untouched. Returns what swaps it again."""
    module_: Any = module
    geometry, spec, A, B = type(module).mixin, module.lora, module.lora_A, module.lora_B
    module_.__dict__.pop("forward", None)
    module_.__class__ = type(module).base_class
    for name in FACTORS:
        del module_._parameters[name]
    del module_.__dict__["lora"]
    return functools.partial(swap, module_, geometry, spec, A, B)


def check_removable(model: nn.Module) -> None:
    """Raise AdapterStateError if `swap_back` would fail on a layer of `model`."""
    for name, module in adapters(model):
        cls = type(module)
        if "base_class" not in cls.__dict__:
            # Parametrizations swap classes as well; taking ours out from under theirs would take theirs too.
            raise AdapterStateError(
                f"{name!r} changed its class to {cls.__name__} after it was adapted (a parametrization, for example). "
                "Undo that first, then remove or merge the adapter."
            )
        if _is_wrapped(module):
            raise AdapterStateError(
                f"{name!r} was given a forward on the instance after it was adapted, as accelerate's hooks do, which "
                f"calls the adapted one: {_TAKE_OFF}, then remove or merge the adapter."
            )


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """The adapted layers of `model` with their names; a layer registered under several names comes once."""
    for name, module in model.named_modules():
        if isinstance(module, Adapter):
            yield name, module
