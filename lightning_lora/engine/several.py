"""Several adapters of one model, of which the model has one at a time: `Several.use(name)` exchanges them.

`inject` adapts the model as one config says. What it changed in the model's modules is noted, and taken back, for each
config in turn; to use an adapter is to put its notes in place. So whatever `inject` can do to a module (every geometry
and variant, modules trained whole, frozen norms) holds for several adapters as for one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.forwards import listen_for_forwards
from lightning_lora.engine.inject import inject, remove
from lightning_lora.engine.layers.frozen import FrozenNorm
from lightning_lora.engine.layers.reads import forget
from lightning_lora.engine.packed import Packed, Rows, why_not_packed
from lightning_lora.engine.present import injection_of
from lightning_lora.engine.report import InjectionReport
from lightning_lora.engine.state import adapter_tensors
from lightning_lora.engine.swap import swapped_class
from lightning_lora.engine.tree import Tree, unwrapped

_ABSENT: Any = object()
_PLACES = ("_parameters", "_buffers", "__dict__")
_NOT_OURS = frozenset(("_parameters", "_buffers", "_modules", "training", "wanted_mode"))
"""Entries of a module's __dict__ that are noted elsewhere, or that `train()` sets."""


@dataclass
class _Notes:
    """What one module is with one adapter: its class, and its entries in each of `_PLACES`."""

    cls: type[nn.Module]
    held: tuple[dict[str, Any], ...]

    @classmethod
    def of(cls, module: nn.Module) -> _Notes:
        own = {key: value for key, value in module.__dict__.items() if key not in _NOT_OURS}
        return cls(type(module), (dict(module._parameters), dict(module._buffers), own))


PACK = "/"
"""In the place of an adapter's name: all of them, each on its rows."""


class Several:
    """The adapters of one model, by name. After `add`, the model has the adapter that was added last."""

    def __init__(self, model: nn.Module) -> None:
        self.model = unwrapped(model)
        self.current: str | None = None
        """The name of the adapter that the model has; None for the bare base."""
        self.reports: dict[str, InjectionReport] = {}
        self._modules = {id(m): m for m in self.model.modules()}
        self._bare = {key: _Notes.of(m) for key, m in self._modules.items()}
        self._base = [(p, p.requires_grad) for p in self.model.parameters()]
        self._of: dict[str | None, dict[int, _Notes]] = {None: {}}
        self._plans: dict[str | None, list[tuple[nn.Module, type, list[tuple[int, str, Any]]]]] = {}

    def add(self, name: str, config: LoRAConfig, *, start: bool = True) -> InjectionReport:
        """Adapt the bare model as `config` says, under `name`. Raises the errors of `inject`; nothing is changed then.

        A and B are drawn from torch's generator, as `inject` draws them.
        """
        self.use(None)
        report = inject(self.model, config, start=start)
        with self._parted_from_base():
            notes = {key: _Notes.of(m) for key, m in self._modules.items()}
        self._of[name] = {key: now for key, now in notes.items() if _differ(now, self._bare[key])}
        self.reports[name] = report
        remove(self.model)  # also puts `requires_grad` back, from which the next config may conclude what to adapt
        self._plans = {}
        self.use(name)
        return report

    @contextmanager
    def _parted_from_base(self) -> Iterator[None]:
        """Inside, the adapter has tensors of its own for what it trains whole, in the place of the base's."""
        there = dict(Tree.of(self.model).tensors)
        own = {id(there[name]): _copy_of(there[name]) for name in injection_of(self.model).trained_whole}
        places: list[tuple[dict[str, Any], str, Tensor]] = [
            (held, key, tensor)
            for module in (self._modules.values() if own else ())
            for held in (cast("dict[str, Any]", module._parameters), cast("dict[str, Any]", module._buffers))
            for key, tensor in held.items()
            if id(tensor) in own
        ]
        for held, key, tensor in places:
            held[key] = own[id(tensor)]
        try:
            yield
        finally:
            for held, key, tensor in places:
                held[key] = tensor

    def use(self, name: str | None) -> None:
        """Let the model have the adapter `name`; None gives it its bare base back."""
        if name == self.current:
            return
        for module, cls, entries in self._plan(name):
            own = module.__dict__
            if type(module) is not cls:
                mode, is_norm = own.pop("wanted_mode", module.training), isinstance(module, FrozenNorm)
                object.__setattr__(module, "__class__", cls)
                if is_norm or issubclass(cls, FrozenNorm):
                    module.train(mode)
            places = (own["_parameters"], own["_buffers"], own)
            for place, key, value in entries:
                if value is _ABSENT:
                    places[place].pop(key, None)
                else:
                    places[place][key] = value
            forget(module)
        if (name is None) is not (self.current is None):
            self._freeze(name is not None)
        self.current = name

    def _freeze(self, is_adapted: bool) -> None:
        """Freeze the base for an adapter, or make trainable again what was so before."""
        for p, was_trainable in self._base:
            p.requires_grad_(was_trainable and not is_adapted)
        if is_adapted:
            listen_for_forwards(self.model)

    @contextmanager
    def using(self, name: str | None) -> Iterator[None]:
        """Inside, the model has the adapter `name`."""
        before = self.current
        self.use(name)
        try:
            yield
        finally:
            self.use(before)

    def _plan(self, name: str | None) -> list[tuple[nn.Module, type, list[tuple[int, str, Any]]]]:
        """What to put where, in all modules that differ with any of the adapters."""
        if not self._plans:
            changed = list(dict.fromkeys(key for of in self._of.values() for key in of))
            for one, of in self._of.items():
                steps = []
                for key in changed:
                    module, bare, now = self._modules[key], self._bare[key], of.get(key, self._bare[key])
                    others = [notes[key] for notes in self._of.values() if key in notes]
                    entries = [
                        (place, entry, now.held[place].get(entry, _ABSENT))
                        for place in range(len(_PLACES))
                        for entry in _differing(bare.held[place], [o.held[place] for o in others])
                    ]
                    steps.append((module, now.cls, entries))
                self._plans[one] = steps
        return self._plans[name]

    def pack(self, rows: Rows) -> str | None:
        """Prepare for `use(PACK)`, with which the model has all adapters, each on its `rows`. Returns why that cannot
        be done, if it cannot; nothing is changed then."""
        packed: dict[int, _Notes] = {}
        names = {id(m): name for name, m in Tree.of(self.model).modules}
        for key in dict.fromkeys(key for of in self._of.values() for key in of):
            module, bare = self._modules[key], self._bare[key]
            each = {name: self._of[name].get(key, bare) for name in self.names}
            own = [
                n
                for n in each.values()
                if _differing(bare.held[0], [n.held[0]]) or _differing(bare.held[1], [n.held[1]])
            ]
            if not own:  # a frozen norm, or the root with its record
                first = next(iter(each.values()))
                if any(notes.cls is not first.cls for notes in each.values()):
                    return f"{names.get(key)!r} is frozen for some of the adapters, and not for others"
                packed[key] = first
                continue
            parts = {name: _part_of(module, notes) for name, notes in each.items()}
            for part in parts.values():
                if (reason := why_not_packed(part, names.get(key, ""))) is not None:
                    return reason
            attributes = {"pack_rows": rows, "pack_parts": parts, "pack_name": names.get(key, "")}
            cls = swapped_class("Packed", Packed, bare.cls)
            packed[key] = _Notes(cls, (*bare.held[:2], {**bare.held[2], **attributes}))
        self._of[PACK] = packed
        self._plans = {}
        return None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(name for name in self._of if name not in (None, PACK))

    def tensors(self, name: str) -> dict[str, Tensor]:
        """The live tensors of the adapter `name`, as `adapter_tensors` gives them."""
        with self.using(name):
            return adapter_tensors(self.model)

    @property
    def owners(self) -> dict[int, str]:
        """id(trained parameter) -> the name of its adapter."""
        return {
            id(p): name
            for name in self.names
            for key, notes in self._of[name].items()
            for p in notes.held[0].values()
            if p is not None and p.requires_grad and not any(p is own for own in self._bare[key].held[0].values())
        }

    @property
    def exchanged(self) -> set[tuple[int, str]]:
        """id(module) and name of the attributes, beside tensors, that `use` exchanges."""
        return {(id(m), key) for m, _, entries in self._plan(None) for place, key, _ in entries if place == 2}

    def common_buffers(self) -> list[tuple[str, nn.Module, str]]:
        """The buffers that the adapters have in common: name, module, and key in its `_buffers`."""
        own = {(key, entry) for of in self._of.values() for key, n in of.items() for entry in self._own_buffers(key, n)}
        return [
            (f"{prefix}.{entry}" if prefix else entry, module, entry)
            for prefix, module in self.model.named_modules()
            for entry in module._buffers
            if (id(module), entry) not in own
        ]

    def _own_buffers(self, key: int, notes: _Notes) -> list[str]:
        return _differing(self._bare[key].held[1], [notes.held[1]])

    @contextmanager
    def all_shown(self) -> Iterator[None]:
        """Inside, the model has the tensors of all adapters, those of the others under names like `r4.lora_A` in their
        module: `named_parameters` and `adapter_tensors` give all of them. Nothing may be computed inside."""
        shown: list[tuple[nn.Module, str]] = []
        names = {id(m): name for name, m in Tree.of(self.model).modules}
        injection, before = injection_of(self.model), []
        originals = dict(injection.originals)
        for other in self.names:
            for key, notes in self._of[other].items() if other != self.current else ():
                module, bare = self._modules[key], self._bare[key]
                own = [(n, t) for n, t in notes.held[0].items() if t is not None and t is not bare.held[0].get(n)]
                for entry, tensor in own:
                    module._parameters[f"{other}.{entry}"] = tensor
                    shown.append((module, f"{other}.{entry}"))
                if "lora_names" in module.__dict__:
                    before.append((module, module.__dict__["lora_names"]))
                    ours = tuple(f"{other}.{entry}" for entry, _ in own)
                    module.__dict__["lora_names"] = (*module.__dict__["lora_names"], *ours)
                else:
                    prefix = f"{names[key]}." if names[key] else ""
                    injection.originals.update({f"{prefix}{other}.{entry}": t for entry, t in own})
        try:
            yield
        finally:
            for module, entry in shown:
                del module._parameters[entry]
            for module, lora_names in reversed(before):
                module.__dict__["lora_names"] = lora_names
            injection.originals.clear()
            injection.originals.update(originals)


def _part_of(module: nn.Module, notes: _Notes) -> nn.Module:
    """`module` as it is with one adapter, as another object with the same tensors and children."""
    part: nn.Module = notes.cls.__new__(notes.cls)
    parameters, buffers, own = notes.held
    held = {"_parameters": dict(parameters), "_buffers": dict(buffers), "_modules": module._modules}
    part.__dict__.update({**module.__dict__, **own, **held})
    return part


def _copy_of(tensor: Tensor) -> Tensor:
    with torch.inference_mode(False), torch.no_grad():
        copy = tensor.detach().clone()
    return nn.Parameter(copy) if isinstance(tensor, nn.Parameter) else copy


def _differ(now: _Notes, bare: _Notes) -> bool:
    return now.cls is not bare.cls or any(_differing(a, [b]) for a, b in zip(bare.held, now.held))


def _differing(bare: Mapping[str, Any], others: list[dict[str, Any]]) -> list[str]:
    """The entries that are not the same object in all of them, in the order of the last ones."""
    keys = dict.fromkeys((*bare, *(key for other in others for key in other)))
    return [key for key in keys if any(other.get(key, _ABSENT) is not bare.get(key, _ABSENT) for other in others)]
