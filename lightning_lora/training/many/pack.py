"""A pack: the adapters that one run trains, each with its config, seed and learning rate."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_lora.checked import number, whole
from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.several import Several
from lightning_lora.errors import ConfigError, listed
from lightning_lora.training.many.kept import Kept

Metrics = dict[str, dict[str, float]]
"""Adapter -> metric -> value."""


@dataclass(frozen=True)
class Member:
    """One adapter of a pack."""

    config: LoRAConfig
    lr: float | None = None
    """Its learning rate, where it is not the optimizer's."""
    seed: int | None = None
    """The seed that A is drawn with; None: the run's own random numbers, the same for all such adapters."""


def members(given: Mapping[str, Any]) -> dict[str, Member]:
    """Check what a MultiLoRACallback was given. Raises ConfigError, which names the adapter."""
    if not isinstance(given, Mapping) or not given:
        raise ConfigError(
            "MultiLoRACallback takes a dict of adapters, each a LoRAConfig or a dict of its fields with lr and seed: "
            f'{{"r4": {{"rank": 4, "lr": 1e-3}}, "r16": LoRAConfig(rank=16)}}, not {given!r:.100}.'
        )
    return {_checked_name(name): _member(name, one) for name, one in given.items()}


def _checked_name(name: Any) -> str:
    if not isinstance(name, str) or not re.fullmatch(r"[^/\\\x00-\x1f.][^/\\\x00-\x1f]*", name):
        raise ConfigError(
            f"An adapter is called {name!r}: its name becomes that of a folder and a part of its metrics' names, so it "
            "is a text without slashes that does not begin with a dot."
        )
    return name


def _member(name: str, given: Any) -> Member:
    fields = {} if isinstance(given, LoRAConfig) else dict(given) if isinstance(given, Mapping) else None
    if fields is None:
        raise ConfigError(f"Adapter {name!r} is a LoRAConfig or a dict of its fields, not a {type(given).__name__}.")
    lr, seed = fields.pop("lr", None), fields.pop("seed", None)
    try:
        config = given if isinstance(given, LoRAConfig) else LoRAConfig(**fields)
        lr = None if lr is None else number("lr", lr, above=0)
        seed = None if seed is None else whole("seed", seed, least=0)
    except ConfigError as error:
        raise ConfigError(f"Adapter {name!r}: {error}") from None
    if config.alora_invocation_tokens:
        raise ConfigError(f"Adapter {name!r} is an activated LoRA (alora_invocation_tokens): train it by itself.")
    return Member(config, lr, seed)


@dataclass
class Pack:
    """The state of a run that trains several adapters."""

    members: Mapping[str, Member]
    several: Several
    active: list[str]
    """The adapters that still train."""
    factors: dict[str, float] = field(default_factory=dict)
    """Adapter -> its learning rate as a multiple of the optimizer's."""
    metrics: Metrics = field(default_factory=dict)
    """The latest validation metrics of each adapter."""
    history: list[tuple[int, Metrics]] = field(default_factory=list)
    """Optimizer step -> the validation metrics of that step, in the order of the steps."""
    owners: dict[int, str] = field(default_factory=dict)
    """id(trained parameter) -> its adapter."""
    parameters: dict[str, list[Tensor]] = field(default_factory=dict)
    """Adapter -> its trained parameters."""
    kept: Kept = field(init=False)
    """What the module keeps for each adapter beside weights and buffers."""
    turn: str | None = None
    """The adapter that a manual step trains just now; None where a step trains all that are active."""

    def __post_init__(self) -> None:
        self.kept = Kept(self.several)

    @contextmanager
    def seeded(self, name: str) -> Iterator[None]:
        """Inside, torch draws from the adapter's own seed, if it has one."""
        seed = self.members[name].seed
        if seed is None:
            yield
            return
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            yield

    def check(self, name: str) -> str:
        """Raise ConfigError unless `name` is one of the adapters."""
        if name not in self.members:
            raise ConfigError(f"No adapter is called {name!r}: the run has {listed(map(repr, self.members))}.")
        return name
