"""Names that other libraries keep to themselves and that this package uses all the same.

A release may move such a name without a word. So each stands once, in the owner of its room (engine/torch_private.py,
training/lightning_private.py and torchmetrics_private.py, hub/hub_private.py, cli/hydra_private.py), with what it is
for. Where it is gone, the owner takes a plain path that needs no such name, or what is here raises MovedError. It never
goes on as if nothing had happened. tests/private_names checks each in the installed version.
"""

from __future__ import annotations

import pkgutil
from typing import Any

from lightning_lora.errors import MovedError

_LIBRARIES = ("torch", "lightning", "torchmetrics", "huggingface_hub", "transformers")
PURPOSES: dict[str, str] = {}
"""Path of each name that `found` and `needed` were asked for -> what it is for. The canary tests read it."""


def found(path: str, purpose: str, otherwise: Any = None) -> Any:
    """What is at `path` ("package.module:name.name"); `otherwise` where it is gone: the plain path of the caller."""
    PURPOSES[path] = purpose
    try:
        return pkgutil.resolve_name(path)
    except (ImportError, AttributeError):
        return otherwise


def needed(path: str, purpose: str) -> Any:
    """What is at `path`; where it is gone, a function that raises MovedError when it is called."""

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
    """Set attributes of an object. Raises MovedError, with none of them set, where it lacks one: to set it would do
    nothing then."""
    for name in values:
        attribute(owner, name, purpose)
    for name, value in values.items():
        setattr(owner, name, value)
