"""Turns a module into an adapted layer and back, in place, by a swap of its class; all checks come first."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.layers.base import Adapter, is_adapter
from lightning_lora.engine.layers.pair import BIAS, FACTORS, AdapterSpec
from lightning_lora.engine.layers.reads import Reads
from lightning_lora.engine.reads import forget
from lightning_lora.engine.swap import REMEMBERED, remembered, swapped_class
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import check_unsharded
from lightning_lora.errors import AdapterStateError, TargetError

_TAKE_OFF = "take them off with accelerate.hooks.remove_hook_from_module(model, recurse=True)"


def _is_wrapped(module: nn.Module) -> bool:
    """True if the instance has a forward other than its class's (accelerate, once undone, leaves the class's own)."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    is_own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", 0) is type(module).forward
    return not is_own


def check_swappable(module: nn.Module, name: str, mixin: type = Adapter) -> None:
    """Raise TargetError if a class swap would not change the forward of `module`, or would hide its attributes."""
    if _is_wrapped(module):
        raise TargetError(
            f"{name!r} has a forward of its own on the instance, as accelerate's hooks put there, and it would bypass "
            f"the adapter. Adapt the model first and add hooks after, or {_TAKE_OFF}."
        )
    taken = _taken(module, _own_names(mixin))
    if taken is not None:
        raise TargetError(
            f"{name!r} ({type(module).__name__}) already has an attribute {taken!r} of its own, which the adapter "
            "needs. Rename it, or leave the module out with exclude_modules."
        )


def _taken(module: nn.Module, names: frozenset[str]) -> str | None:
    """One of `names` that `module` has as an attribute, or None. A class is searched once: models have thousands of
    modules and few classes."""
    cls: Any = type(module)
    if cls.__getattr__ is not nn.Module.__getattr__:  # it may answer for any name
        return next((name for name in names if hasattr(module, name)), None)
    for own in (module.__dict__, module._parameters, module._buffers, module._modules):
        if not names.isdisjoint(own):
            return min(names.intersection(own))
    return _taken_by_class(cls, names)


def _taken_by_class(cls: type, names: frozenset[str]) -> str | None:
    known = remembered(cls)
    if names not in known:
        known[names] = min((name for name in names if hasattr(cls, name)), default=None)
    found: str | None = known[names]
    return found


def _own_names(mixin: type) -> frozenset[str]:
    """The names that the mixin adds to nn.Module. A class that uses one of them would get ours in place of its own."""
    known = remembered(mixin)
    if _OWN not in known:
        known[_OWN] = _find_own_names(mixin)
    found: frozenset[str] = known[_OWN]
    return found


_OWN = "own names"


def _find_own_names(mixin: type) -> frozenset[str]:
    geometry: Any = mixin
    defined = (name for cls in mixin.__mro__ if issubclass(cls, Reads) for name in vars(cls))
    ours = (n for n in defined if not hasattr(nn.Module, n) and n not in geometry.replaces and n != REMEMBERED)
    return frozenset((*FACTORS, "lora", *ours))


def swap(module: Any, mixin: Any, spec: AdapterSpec, tensors: Mapping[str, Tensor], path: str = "") -> None:
    """Make `module`, called `path` in its model, an adapted layer, in place.

    `mixin` is a geometry, or a tuple of variants and a geometry; `tensors` are the adapter's parameters and buffers by
    name."""
    base_class: Any = type(module)
    own = module.__dict__
    # A read of these attributes gives the adapted value. A user's own layer type may have no weight.
    reads = tuple(spec.parameters) or (
        ("weight",) if "weight" in own["_parameters"] or hasattr(module, "weight") else ()
    )
    reads = (*reads, "bias") if BIAS in tensors else reads
    own.pop("forward", None)  # the base class's forward, bound (see check_swappable): it would hide the new class's
    for name, tensor in tensors.items():  # not register_parameter, which would repeat checks of `check_swappable`
        own["_parameters" if isinstance(tensor, nn.Parameter) else "_buffers"][name] = tensor
    own["lora"], own["lora_names"], own["lora_path"] = spec, tuple(tensors), path
    # Not nn.Module's __setattr__, which looks for parameters and takes longer than the rest of `swap`.
    object.__setattr__(module, "__class__", swapped_class("LoRA", mixin, base_class, reads))
    module.swapped_in()


def swap_back(module: Adapter) -> Callable[[], None]:
    """Undo `swap`: the module gets its class back and loses its adapter; its weight is not touched. Returns a function
    that swaps it again."""
    cls: Any = type(module)
    own = module.__dict__
    spec, names, path = own["lora"], own["lora_names"], own["lora_path"]
    module.swapped_out()
    own.pop("forward", None)
    object.__setattr__(module, "__class__", cls.base_class)
    tensors: dict[str, Tensor] = {}
    for name in names:
        held = own["_parameters"]
        if name not in held:
            held = own["_buffers"] if name in own["_buffers"] else own
        tensors[name] = held.pop(name)
    del own["lora"], own["lora_names"], own["lora_path"]
    forget(module)
    return functools.partial(swap, module, cls.mixin, spec, tensors, path)


def check_removable(model: nn.Module, tree: Tree | None = None) -> None:
    """Raise AdapterStateError if `swap_back` would fail on a layer of `model`; `tree` is Tree.of(model), if known."""
    tree = tree or Tree.of(model)
    check_unsharded(
        model,
        "To remove or merge its adapter, save it (save_adapter, in every process), and load it into a model that is "
        "not sharded.",
        tree,
    )
    if switch.is_open(frozenset(id(module) for _, module in tree.modules)):
        raise AdapterStateError(
            f"The adapters of {type(model).__name__} are switched off just now: leave `with disabled(model)` first, in "
            "every thread and task."
        )
    changed = {cls for cls in tree.classes if is_adapter(cls) and "base_class" not in cls.__dict__}
    for name, module in tree.of_classes(is_adapter):
        if type(module) in changed:
            # A parametrization swaps the class as well: putting the base class back would remove it too.
            raise AdapterStateError(
                f"{name!r} changed its class to {type(module).__name__} after it was adapted (a parametrization, for "
                "example). Undo that first, then remove or merge the adapter."
            )
        if _is_wrapped(module):
            raise AdapterStateError(
                f"{name!r} was given a forward on the instance after it was adapted, as accelerate's hooks do, which "
                f"calls the adapted one: {_TAKE_OFF}, then remove or merge the adapter."
            )
