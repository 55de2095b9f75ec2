"""Access to private names of other libraries, which this package uses all the same.

A release of a library may move a private name without notice. So each name is written once, with its purpose, in
the module for its library (engine/torch_private.py; training/lightning_private.py, torchmetrics_private.py and
many/rounds_private.py; format/transformers_private.py; hub/hub_private.py; cli/hydra_private.py). If the name is gone,
that module uses another way that needs no private name, or the functions here raise MovedError; a missing name is never
ignored.
tests/private_names checks each name in the installed version.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from lightning_lora.errors import MovedError

_LIBRARIES = ("torch", "lightning", "torchmetrics", "huggingface_hub", "transformers")
PURPOSES: dict[str, str] = {}
"""Path of each name that `found` and `needed` were asked for -> what it is for. The canary tests read it."""


def found(path: str, purpose: str, otherwise: Any = None) -> Any:
    """The object at `path` ("package.module:name.name"). If it is gone, `otherwise`: what the caller uses instead."""
    PURPOSES[path] = purpose
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return otherwise


def needed(path: str, purpose: str) -> Any:
    """The object at `path`. If it is gone, a function that raises MovedError when it is called."""

    def gone(*_: Any, **__: Any) -> Any:
        raise MovedError(path.replace(":", "."), purpose)

    return found(path, purpose, gone)


def attribute(owner: Any, name: str, purpose: str) -> Any:
    """The attribute of an object. Raises MovedError where it has none."""
    try:
        return getattr(owner, name)
    except AttributeError:
        classes = (owner if isinstance(owner, type) else type(owner)).__mro__
        cls = next((c for c in classes if c.__module__.partition(".")[0] in _LIBRARIES), classes[0])  # not a user's own
        raise MovedError(f"{cls.__module__}.{cls.__qualname__}.{name}", purpose) from None


def replace(owner: Any, purpose: str, **values: Any) -> None:
    """Set attributes of an object. Raises MovedError, and sets none of them, if the object lacks one: setting a new
    attribute would have no effect."""
    for name in values:
        attribute(owner, name, purpose)
    for name, value in values.items():
        setattr(owner, name, value)
