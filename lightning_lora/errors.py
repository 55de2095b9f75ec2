"""Every error that a user can cause, as one tree.

    LightningLoRAError
    ├── ConfigError (ValueError)            a setting that is not valid: rank 0, a misspelt key, alpha NaN
    ├── TargetError (ValueError)            a pattern that matches nothing, a module that cannot be adapted
    ├── AdapterStateError (RuntimeError)    adapters where there must be none, none where there must be some
    ├── AdapterFormatError (ValueError)     a folder or a state dict that is not an adapter of this model
    ├── BankError (RuntimeError)            a bank that has no such adapter, no room, or is used by others just now
    ├── BaseMismatchError (ValueError)      an adapter that was trained on another base
    ├── CheckpointError (RuntimeError)      a checkpoint that is truncated, foreign, or could not be written
    ├── TrainingError (RuntimeError)        a training set-up under which adapters would silently not train
    ├── DataError (ValueError)              data that is missing, empty or malformed
    ├── HubError (RuntimeError)             a request to the Hub that failed
    │   ├── HubAccessError                  no token, a wrong one, or one that may not do this
    │   ├── HubNotFoundError                no such repository or revision, or one that this token may not see
    │   ├── HubIntegrityError               content that is not what the Hub announced
    │   └── HubUnavailableError             no network, no answer in time, or a fault of the server: try again
    ├── MissingExtraError (ImportError)     a feature whose optional dependency is not installed
    └── MovedError (RuntimeError)           a private name of a library that its installed version does not have

A message says what was seen, where, and what to try. A call that raises one of these leaves the model, the files and
the Hub as they were.
"""

from __future__ import annotations

from collections.abc import Iterable

__all__ = [
    "AdapterFormatError",
    "AdapterStateError",
    "BankError",
    "BaseMismatchError",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "HubAccessError",
    "HubError",
    "HubIntegrityError",
    "HubNotFoundError",
    "HubUnavailableError",
    "LightningLoRAError",
    "MissingExtraError",
    "MovedError",
    "TargetError",
    "TrainingError",
]


class LightningLoRAError(Exception):
    """The root of the tree: `except LightningLoRAError` catches all that this package raises on purpose."""


class ConfigError(LightningLoRAError, ValueError):
    """A setting that is not valid."""


class TargetError(LightningLoRAError, ValueError):
    """A pattern that matches nothing, or a module that cannot be adapted."""


class AdapterStateError(LightningLoRAError, RuntimeError):
    """The model has adapters where there must be none, or none where there must be some."""


class AdapterFormatError(LightningLoRAError, ValueError):
    """A folder or a state dict that is not an adapter of this model."""


class BankError(LightningLoRAError, RuntimeError):
    """The bank has no such adapter, no room for it, or is used by others just now."""


class BaseMismatchError(LightningLoRAError, ValueError):
    """An adapter that was trained on another base model."""


class CheckpointError(LightningLoRAError, RuntimeError):
    """A checkpoint that is truncated, foreign, or could not be written."""


class TrainingError(LightningLoRAError, RuntimeError):
    """A training set-up under which adapters would silently not train."""


class DataError(LightningLoRAError, ValueError):
    """Data that is missing, empty or malformed."""


class HubError(LightningLoRAError, RuntimeError):
    """A request to the Hub failed, and asking again would not help."""


class HubAccessError(HubError):
    """No token, a wrong one, or one that may not do what was asked."""


class HubNotFoundError(HubError):
    """No such repository, revision or file, or this token may not see it: the Hub does not distinguish these cases."""


class HubIntegrityError(HubError):
    """The content that arrived is not what the Hub announced; it was not kept."""


class HubUnavailableError(HubError):
    """No network, no answer in time, or a fault of the server. Another try may succeed."""

    retry_after: float | None = None
    """Seconds to wait before the next try, if the server gave them."""


class MissingExtraError(LightningLoRAError, ImportError):
    """A feature whose optional dependency is not installed."""

    def __init__(self, feature: str, package: str, extra: str, command: str | None = None) -> None:
        """`command` is the command that installs the package, where the extra alone does not install it."""
        super().__init__(
            f"{feature} needs the package {package!r}, which is not installed. "
            f"Install it with: " + (command or f"pip install 'lightning-lora[{extra}]'")
        )
        self._arguments = (feature, package, extra, command)

    def __reduce__(self) -> tuple[type[MissingExtraError], tuple[str, str, str, str | None]]:
        return type(self), self._arguments


class MovedError(LightningLoRAError, RuntimeError):
    """The installed version of a library lacks a private name that a feature needs, and there is no other way."""

    def __init__(self, name: str, purpose: str) -> None:
        """`name` is the dotted path of the missing name, `purpose` says what it is used for."""
        from importlib import metadata  # takes 10 ms

        library = name.partition(".")[0]
        try:
            version = metadata.version({"hydra": "hydra-core"}.get(library, library))
        except metadata.PackageNotFoundError:
            version = "(of an unknown version)"
        super().__init__(
            f"{library} {version} has no {name}, by which lightning_lora {purpose}: install an earlier version of "
            f"{library}, or a later one of lightning_lora."
        )
        self._arguments = (name, purpose)

    def __reduce__(self) -> tuple[type[MovedError], tuple[str, str]]:
        return type(self), self._arguments


def listed(names: Iterable[str], most: int = 8) -> str:
    """`names` for a message: all where they are few, else the first `most` and how many more there are."""
    names = list(names)
    shown = ", ".join(names[:most])
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"
