"""Give an object one more behaviour by giving it another class: a mixin in front of the class that it has.

The object keeps its identity, its attributes and whatever refers to it. The class is made once for each pair of mixin
and base class, as FSDP2's `fully_shard` does, and kept by the base class, so that it lives as long: a class that a
function made goes away with all that it closes over. Since it has no importable name, it brings the way to pickle its
objects.
"""

from __future__ import annotations

import functools
from typing import Any

REMEMBERED = "_lora_remembered"


class Remembered(dict[Any, Any]):
    """What is known of the class whose attribute this is; pickled with it, as cloudpickle does, it is empty."""

    def __reduce__(self) -> Any:
        return Remembered, ()


def remembered(cls: Any) -> dict[Any, Any]:
    """Where to keep what was found out about `cls`, for as long as it lives: thousands of layers have few classes."""
    known = cls.__dict__.get(REMEMBERED)
    if known is None:
        known = Remembered()
        setattr(cls, REMEMBERED, known)
    return known


def swapped_class(prefix: str, mixin: Any, base_class: Any, reads: tuple[str, ...] = ()) -> Any:
    """The subclass of `base_class` with `mixin` (or a tuple of them) in front, named `prefix` and the base's name.

    It knows the two as its attributes `mixin` and `base_class`. An attribute named in `reads` is what the mixin's
    method `read_attribute` gives for the name.
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
