"""How a canary names what moved, and how a test takes a name away."""

from __future__ import annotations

import pkgutil
from importlib import metadata
from typing import Any

import pytest


def moved(name: str) -> str:
    """What a canary says of a name that is gone."""
    library = name.partition(".")[0].partition(":")[0]
    return f"{library} {metadata.version({'hydra': 'hydra-core'}.get(library, library))} has moved {name}"


def take_away(monkeypatch: pytest.MonkeyPatch, *paths: str) -> None:
    """Have `found` not find what is at `paths`."""
    there = pkgutil.resolve_name

    def resolve(path: str) -> Any:
        if path in paths:
            raise AttributeError(path)
        return there(path)

    monkeypatch.setattr(pkgutil, "resolve_name", resolve)
