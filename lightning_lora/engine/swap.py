"""Swaps the class of an object for a subclass with a mixin in front of it, and swaps it back.

The object keeps its identity, its attributes, and all references to it. The class is made once for each mixin and base
class, as FSDP2's `fully_shard` does. The base class holds it, so both live equally long: a class that was made in a
function can be freed, with its closure. The new class cannot be imported by a name, so it defines how its objects are
pickled.
"""

from __future__ import annotations

import functools
import inspect
from typing import TYPE_CHECKING, Any

from torch import nn

from lightning_lora.errors import TargetError

if TYPE_CHECKING:
    Host = nn.Module
else:
    Host = object
"""The base class of mixins: a mixin goes in front of a module's own class, which brings nn.Module."""

TAKE_OFF_HOOKS = "take them off with accelerate.hooks.remove_hook_from_module(model, recurse=True)"


def swap(thing: Any, prefix: str, mixin: Any, reads: tuple[str, ...] = ()) -> None:
    """Give `thing` the class that `swapped_class` makes of its own."""
    _forget_bound_forward(thing)
    # Not nn.Module's __setattr__, which looks for parameters and takes longer than the rest of a swap.
    object.__setattr__(thing, "__class__", swapped_class(prefix, mixin, type(thing), reads))


def swap_back(thing: Any) -> None:
    """Undo `swap`."""
    _forget_bound_forward(thing)
    object.__setattr__(thing, "__class__", type(thing).base_class)


def read_also(thing: Any, reads: tuple[str, ...]) -> None:
    """Let `thing`, which has a swapped class, answer reads of these attributes as well."""
    cls = type(thing)
    prefix = cls.__name__.removesuffix(cls.base_class.__name__)
    object.__setattr__(thing, "__class__", swapped_class(prefix, cls.mixin, cls.base_class, (*cls.reads, *reads)))


def is_swapped(cls: Any) -> bool:
    """True if `swap` has made `cls`. False if another class was put in front of that since, as a parametrization does:
    `swap_back` would undo that as well."""
    return "base_class" in cls.__dict__


def is_wrapped(module: nn.Module) -> bool:
    """True if the instance has a forward other than its class's, as accelerate's hooks put there."""
    forward = module.__dict__.get("forward")
    if forward is None:
        return False
    is_own = getattr(forward, "__self__", None) is module and getattr(forward, "__func__", 0) is type(module).forward
    return not is_own


def _forget_bound_forward(thing: Any) -> None:
    # accelerate, once undone, leaves the class's own forward on the instance, where it would hide the new class's.
    if not is_wrapped(thing):
        thing.__dict__.pop("forward", None)


def check_swappable(name: str, module: nn.Module, mixin: Any) -> None:
    """Raise TargetError if a swap of `module`, called `name`, with `mixin` (or a tuple of them) would not change its
    forward, or would hide its attributes."""
    what = f"{name!r} ({type(module).__name__})"
    if is_wrapped(module):
        raise TargetError(
            f"{what}: it has a forward of its own on the instance, as accelerate's hooks put there, which would bypass "
            f"the adapter: adapt the model first and add hooks after, or {TAKE_OFF_HOOKS}."
        )
    for one in mixin if isinstance(mixin, tuple) else (mixin,):
        if (taken := _taken(module, _own_names(one))) is not None:
            raise TargetError(
                f"{what}: it already has an attribute {taken!r} of its own, which the adapter needs: rename that, or "
                "leave the module out with exclude_modules."
            )


def _taken(module: nn.Module, names: frozenset[str]) -> str | None:
    """One of `names` that `module` has as an attribute, or None."""
    cls: Any = type(module)
    if cls.__getattr__ is not nn.Module.__getattr__:  # it may answer for any name
        return next((name for name in names if hasattr(module, name)), None)
    for own in (module.__dict__, module._parameters, module._buffers, module._modules):
        if not names.isdisjoint(own):
            return min(names.intersection(own))
    known = remembered(cls)  # models have thousands of modules and few classes
    if names not in known:
        known[names] = min((name for name in names if hasattr(cls, name)), default=None)
    found: str | None = known[names]
    return found


def _own_names(mixin: Any) -> frozenset[str]:
    """The names that a mixin adds to nn.Module's, but for those that it overrides on purpose. A class that uses one of
    them would get ours in place of its own."""
    known = remembered(mixin)
    if "own names" not in known:
        classes = mixin.__mro__[:-1]
        attributes = {name for cls in classes for name in vars(cls)}
        instances = {name for cls in classes for name in inspect.get_annotations(cls) if name.startswith("lora")}
        known["own names"] = frozenset(
            (attributes | instances).difference(dir(nn.Module), mixin.replaces, (REMEMBERED,))
        )
    names: frozenset[str] = known["own names"]
    return names


def name_of_input(cls: Any) -> str:
    """The name of the first argument of `cls.forward`, after self."""
    known = remembered(cls)
    if "input" not in known:
        known["input"] = list(inspect.signature(cls.forward).parameters)[1]
    name: str = known["input"]
    return name


REMEMBERED = "_lora_remembered"


class Remembered(dict[Any, Any]):
    """A cache on a class. It is pickled (cloudpickle pickles classes) as an empty one."""

    def __reduce__(self) -> Any:
        return Remembered, ()


def remembered(cls: Any) -> dict[Any, Any]:
    """The cache for facts about `cls`, which lives as long as `cls`: thousands of layers have few classes."""
    known = cls.__dict__.get(REMEMBERED)
    if known is None:
        known = Remembered()
        setattr(cls, REMEMBERED, known)
    return known


def swapped_class(prefix: str, mixin: Any, base_class: Any, reads: tuple[str, ...] = ()) -> Any:
    """The subclass of `base_class` with `mixin` (or a tuple of them) in front, named `prefix` and the base's name.

    It has `mixin` and `base_class` as attributes. Each attribute named in `reads` is a property that calls the mixin's
    `read_attribute(name)`.
    """
    known, key = remembered(base_class), (prefix, mixin, reads)
    found = known.get(key)
    if found is None:
        found = known[key] = _class_of(prefix, mixin, base_class, reads)
    return found


def _class_of(prefix: str, mixin: Any, base_class: Any, reads: tuple[str, ...]) -> Any:
    namespace = {
        **{name: _property(name) for name in reads},
        "__module__": base_class.__module__,
        "__doc__": base_class.__doc__,
        "__reduce_ex__": functools.partialmethod(_reduce, prefix),
        "mixin": mixin,
        "base_class": base_class,
        "reads": reads,
    }
    mixins = mixin if isinstance(mixin, tuple) else (mixin,)
    return type(f"{prefix}{base_class.__name__}", (*mixins, base_class), namespace)


def _reduce(self: Any, prefix: str, protocol: Any) -> Any:
    cls = type(self)
    _, (_, *arguments), *rest = cls.base_class.__reduce_ex__(self, 2)
    return (_remake, (prefix, cls.mixin, cls.base_class, cls.reads, *arguments), *rest)


def _remake(prefix: str, mixin: Any, base_class: Any, reads: tuple[str, ...], *arguments: Any) -> Any:
    cls = swapped_class(prefix, mixin, base_class, reads)
    return cls.__new__(cls, *arguments)


def _property(name: str) -> Any:
    def read(self: Any) -> Any:
        return self.read_attribute(name)

    def write(self: Any, value: Any) -> None:  # not called for a Parameter, which nn.Module keeps elsewhere
        self.__dict__[name] = value

    def delete(self: Any) -> None:
        del self.__dict__[name]

    return property(read, write, delete)
