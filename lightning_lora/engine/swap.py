"""Makes the class for a class swap: a subclass with a mixin in front of the object's present class.

An object that gets such a class keeps its identity, its attributes, and all references to it. The class is made once
for each mixin and base class, as FSDP2's `fully_shard` does. The base class holds it, so both live equally long: a
class that was made in a function can be freed, with its closure. The new class cannot be imported by a name, so it
defines how its objects are pickled.
"""

from __future__ import annotations

import functools
from typing import Any

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
