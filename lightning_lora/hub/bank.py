"""AdapterBank: the engine's bank, filled from folders, from the Hub, from state dicts and from models."""

from __future__ import annotations

import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypedDict, TypeVar

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_lora.engine import LoRAConfig, adapters
from lightning_lora.engine.bank import USUAL_RANK, Bank, LayerFactors, Store
from lightning_lora.engine.layers import FACTORS
from lightning_lora.engine.layers.pair import BIAS, MAGNITUDE, START
from lightning_lora.engine.state import adapter_tensors, compare_bases, describe_base
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.weights import can_be_dense, dense
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.format import peft
from lightning_lora.format.folder import CONFIG, Header
from lightning_lora.format.inspection import opened
from lightning_lora.format.layout import adapter_root, member, place_of
from lightning_lora.format.matching import Fit, fit
from lightning_lora.hub.adapters import only_injection
from lightning_lora.hub.address import local_path
from lightning_lora.hub.pull import Pulling, adapter_folder
from lightning_lora.hub.store import DiskStore

T = TypeVar("T")


@dataclass(frozen=True)
class _Part:
    """The keys of a file that belong to one layer."""

    A: str
    B: str
    scale: float
    magnitude: str | None
    bias: str | None

    def factors(self, tensors: Any) -> LayerFactors:
        magnitude, bias = (None if key is None else tensors[key] for key in (self.magnitude, self.bias))
        return LayerFactors(tensors[self.A], tensors[self.B], self.scale, magnitude, bias)


@dataclass(frozen=True)
class _Whole:
    """A linear layer that was trained whole, such as a head. W' x + b' = W x + b + (W' - W) x + (b' - b), so it is an
    update of rank min(in, out)."""

    layer: nn.Linear
    weight: str
    bias: str | None

    def factors(self, tensors: Any) -> LayerFactors:
        W, b = self.layer._parameters["weight"], self.layer._parameters["bias"]
        assert W is not None
        change = _less(tensors[self.weight], dense(self.layer, W))
        one = torch.eye(min(change.shape), dtype=change.dtype, device=change.device)
        A, B = (change, one) if change.shape[0] <= change.shape[1] else (one, change)
        return LayerFactors(A, B, 1.0, None, None if self.bias is None or b is None else _less(tensors[self.bias], b))


class BankSettings(TypedDict, total=False):
    """Arguments that a function which makes an AdapterBank passes on to it."""

    max_rank: int
    target_modules: str | list[str]
    exclude_modules: str | list[str] | None
    dtype: torch.dtype | None
    host_capacity: int | None
    disk: str | os.PathLike[str] | None


class AdapterBank(Bank):
    """Hundreds of adapters on one base that runs: `with bank.use("legal"): model(...)`, or row by row.

    Row by row, the first dimension of each layer's input is the rows. `use` and `rows_inside` accept another layout
    where you declare it; where nobody does, an error names the layer.

    The model's targeted layers are swapped in place; `close` swaps them back. An adapter takes a row of one slab of
    memory, so adding and using one costs the same however many there are. `capacity` of them have a slot beside the
    model. Up to `host_capacity` others wait in the processor's memory (no limit by default), and further ones in files
    in the folder `disk`, those unused for longest first. They come back when they are used, or earlier, by `prefetch`.
    `plan` says how much memory the slots take; it is checked against what is free.
    """

    def _store(self, disk: str | os.PathLike[str] | Store | None) -> Store | None:
        return DiskStore(local_path(disk)) if isinstance(disk, str | os.PathLike) else super()._store(disk)

    @cached_property
    def _fits(self) -> dict[Any, tuple[Fit, dict[str, _Part | _Whole]]]:
        return {}

    @cached_property
    def _bases(self) -> dict[tuple[int, ...], dict[str, Any]]:
        return {}

    @classmethod
    def from_folders(
        cls,
        model: nn.Module,
        folders: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str],
        capacity: int = 64,
        *,
        check_base: bool = True,
        ignore_fields: Collection[str] = (),
        **settings: Unpack[BankSettings],
    ) -> AdapterBank:
        """A bank with all these adapters in it, for all layers that they adapt and their largest rank.

        `folders` are adapter folders by name, or one folder that holds them, each under its own name. `settings` are
        those of AdapterBank. Raises as AdapterBank and `add` do; `model` is then as it was.
        """
        named = _named_folders(folders)
        modules, rank = _adapted(model, named, ignore_fields, settings.get("max_rank"))
        targets = "|".join(map(re.escape, modules))  # as a list, "fc" would mean every module that ends so
        own: BankSettings = {"max_rank": rank, "target_modules": targets}
        bank = cls(model, min(capacity, len(named)), **own | settings)
        try:
            for name, folder in named.items():
                bank.add(name, folder, check_base=check_base, ignore_fields=ignore_fields)
        except BaseException:
            bank.close()
            raise
        return bank

    def add(
        self,
        name: str,
        adapter: str | os.PathLike[str] | Mapping[str, Tensor] | nn.Module,
        *,
        revision: str | None = None,
        config: LoRAConfig | None = None,
        replace: bool = False,
        check_base: bool = True,
        ignore_fields: Collection[str] = (),
        **pulling: Unpack[Pulling],
    ) -> None:
        """Add an adapter: a folder in PEFT's format, "user/name" on the Hub (at `revision`; further arguments are those
        of `pull_adapter`), a state dict of PEFT's keys or of `adapter_state_dict` (with its `config`), or a model that
        has adapters, such as one that was just trained. Fields of a folder's config that are not known here, and are
        not empty, are ignored where `ignore_fields` names them. A linear head that was trained whole is an update of
        rank min(in, out): it is served where the bank has that layer as a target and room for that rank.

        With `replace` it replaces an adapter of the same name; batches that run with the old one end as they began.
        Raises AdapterFormatError for what does not fit the model or the bank, BaseMismatchError where it was trained on
        another base (unless `check_base=False`), BankError where there is no room or the name is taken, and the errors
        of `pull_adapter`. The bank is then as it was.
        """
        if not replace:
            self.check_new(name)  # before anything is fetched
        if pulling and isinstance(adapter, nn.Module | Mapping):
            raise TypeError(f"{listed(pulling)}: these arguments are for an adapter on the Hub or in a folder.")
        if isinstance(adapter, nn.Module):
            factors = self._of_model(adapter)
        elif isinstance(adapter, Mapping):
            factors = self._of_state_dict(adapter, config)
        else:
            factors = self._of_folder(adapter, revision, check_base, ignore_fields, pulling)
        self.put(name, factors, replace=replace)

    def _of_folder(
        self,
        source: str | os.PathLike[str],
        revision: str | None,
        check_base: bool,
        ignore_fields: Collection[str],
        pulling: Pulling,
    ) -> dict[str, LayerFactors]:
        folder = adapter_folder(source, revision, ignore_fields=ignore_fields, **pulling)
        with opened(folder, ignore_fields) as (config, file):
            plan, parts = self._parts(config, file.header, str(folder))
            if check_base and "base_fingerprint" in file.header.note:
                heads = [part.layer for part in parts.values() if isinstance(part, _Whole)]
                self._check_base(file.header.note, plan.root, heads, str(folder))
            return _read(plan, parts, file)

    def _of_state_dict(self, tensors: Mapping[str, Tensor], config: LoRAConfig | None) -> dict[str, LayerFactors]:
        if config is None:
            raise ConfigError("A state dict does not say its scale: give its config=LoRAConfig(...) too.")
        foreign = [str(key) for key, value in tensors.items() if not isinstance(value, Tensor)]
        if foreign or not tensors:
            raise AdapterFormatError(f"The state dict holds {listed(foreign) or 'nothing'}, which is no tensor.")
        if not all(key.startswith(peft.PREFIX) for key in tensors):
            tensors = self._as_peft(tensors)
        plan, parts = self._parts(config, Header.of(tensors), "The state dict")
        return _read(plan, parts, tensors)

    def _as_peft(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A state dict with the engine's names, renamed to PEFT's, which are relative to the root."""
        prefix, root = adapter_root(self.model)
        embeddings = {name for name, module in Tree.of(root).modules if isinstance(module, nn.Embedding)}
        inside = _inside(prefix, tensors)
        return {peft.tensor_key(n, {n.rpartition(".")[0]}, embeddings): value for n, value in inside.items()}

    def _of_model(self, model: nn.Module) -> dict[str, LayerFactors]:
        _, injection = only_injection(model)
        _check_acts_everywhere(injection.config, "The model")
        prefix, _ = adapter_root(model)
        tensors, adapted = _inside(prefix, adapter_tensors(model)), _inside(prefix, dict(adapters(model)))
        place = place_of(self.model, adapted.keys(), prefix)
        ours, root = place or adapter_root(self.model)
        keys = {name: name for name in tensors if name.rpartition(".")[2] not in START}
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        factors = {}
        for relative, parts in _by_module(keys, shapes, root, self.max_rank, "The model").items():
            name = member(ours, relative)
            if relative not in adapted:
                factors[name] = _whole(submodule(root, relative), parts).factors(tensors)
                continue
            module = adapted[relative]
            A, B = module.factors(dropped=False)
            magnitude, bias = (getattr(module, part, None) for part in (MAGNITUDE, BIAS))
            factors[name] = LayerFactors(A.detach(), B.detach(), module.lora.scale, magnitude, bias)
        return factors

    def _parts(self, config: LoRAConfig, header: Header, where: str) -> tuple[Fit, dict[str, _Part | _Whole]]:
        """How the file fits the model, and the keys of each layer. Files of the same kind are matched once."""
        key = _kind(config, header)
        found = self._fits.get(key)
        if found is None:
            plan = _fitting(self.model, config, header, where)
            if len(self._fits) >= 64:
                self._fits.clear()
            self._fits[key] = found = (plan, self._layers(plan, config))
        return replace(found[0], where=where), found[1]

    def _layers(self, plan: Fit, config: LoRAConfig) -> dict[str, _Part | _Whole]:
        names = {id(cell.module): name for name, cell in self._cells.items()}
        layers: dict[str, _Part | _Whole] = {}
        for module, parts in _parts_in(plan, self.max_rank).items():
            target = submodule(plan.root, module)
            name = names.get(id(target), module)
            if "weight" in parts:
                layers[name] = _whole(target, parts)
                continue
            A, B, magnitude, bias = (parts.get(part) for part in _PARTS)
            assert A is not None
            assert B is not None, "`fit` has found both"
            layers[name] = _Part(A, B, config.scale_of(module), magnitude, bias)
        return layers

    def _check_base(self, note: Mapping[str, Any], root: nn.Module, heads: list[nn.Linear], where: str) -> None:
        key = (id(root), *map(id, heads))
        if key not in self._bases:  # read once: the weights do not change while the bank serves
            self._bases[key] = describe_base(self.model, root, without=heads)
        compare_bases(note, self._bases[key], what=f"The adapter in {where}", model=type(root).__name__)


def _inside(prefix: str, named: Mapping[str, T]) -> dict[str, T]:
    """`named` by its names relative to the module called `prefix`."""
    return {name.removeprefix(f"{prefix}.") if prefix else name: value for name, value in named.items()}


_PARTS = (*FACTORS, MAGNITUDE, BIAS)
_NOT_SERVED = (
    "{what} has {names}. A bank serves low-rank updates of its layers and linear heads that were trained whole, not "
    "other modules_to_save, biases or tokens, nor parameters that a layer has beside its weight: use load_adapter for "
    "this one."
)
_TOO_WIDE = (
    "{what} has {name}, which was trained whole. A bank serves it as an update of rank {rank}, and has max_rank="
    "{max_rank}: make the bank with max_rank={rank} (its memory grows with it), or use load_adapter for this one."
)


def _parts_in(plan: Fit, max_rank: int) -> dict[str, dict[str, str]]:
    keys = {name: key for name, (key, *_) in plan.sources.items()}
    return _by_module(keys, plan.shapes, plan.root, max_rank, plan.where, plan.kept)


def _by_module(
    keys: Mapping[str, str],
    shapes: Mapping[str, tuple[int, ...]],
    root: nn.Module,
    max_rank: int,
    what: str,
    refused: Iterable[str] = (),
) -> dict[str, dict[str, str]]:
    """Module of `root` -> name of a part of its adapter ("lora_A") -> its key. Raises AdapterFormatError for parts that
    a bank has no place for."""
    modules: dict[str, dict[str, str]] = {}
    for name, key in keys.items():
        module, _, last = name.rpartition(".")
        modules.setdefault(module, {})[last] = key
    refused = list(refused)
    for module, parts in modules.items():
        if parts.keys() <= {"weight", "bias"} and "weight" in parts and _is_head(submodule(root, module)):
            rank = min(shapes[parts["weight"]])
            if rank > max_rank:
                raise AdapterFormatError(_TOO_WIDE.format(what=what, name=module, rank=rank, max_rank=max_rank))
        else:
            refused += [f"{module}.{part}" for part in parts if part not in _PARTS]
    if refused:
        raise AdapterFormatError(_NOT_SERVED.format(what=what, names=listed(refused)))
    return modules


def _whole(layer: nn.Module, parts: Mapping[str, str]) -> _Whole:
    assert isinstance(layer, nn.Linear)
    return _Whole(layer, parts["weight"], parts.get("bias"))


def _is_head(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Linear) and layer._parameters.get("weight") is not None and can_be_dense(layer.weight)


def _less(trained: Tensor, base: Tensor) -> Tensor:
    """trained - base, in float32 at least."""
    dtype = torch.promote_types(torch.promote_types(trained.dtype, base.dtype), torch.float32)
    return trained.detach().to(base.device, dtype) - base.detach().to(dtype)


def _named_folders(folders: Mapping[str, str | os.PathLike[str]] | str | os.PathLike[str]) -> dict[str, Path]:
    if isinstance(folders, Mapping):
        named = {name: local_path(folder) for name, folder in folders.items()}
    else:
        place = local_path(folders)
        if not place.is_dir():
            raise AdapterFormatError(f"There is no folder {str(place)!r}, in which adapters would lie.")
        named = {path.name: path for path in sorted(place.iterdir()) if (path / CONFIG).is_file()}
        if not named and (place / CONFIG).is_file():
            raise AdapterFormatError(f"{str(place)!r} is an adapter itself: give the folder that it lies in.")
    if not named:
        raise AdapterFormatError(f"There are no adapters in {str(folders)!r}: each is a folder with {CONFIG}.")
    return named


def _adapted(
    model: nn.Module, named: Mapping[str, Path], ignore_fields: Collection[str], max_rank: int | None
) -> tuple[list[str], int]:
    """The modules of `model` that the adapters in these folders adapt, and their largest rank. A head trained whole
    counts with its own rank; one larger than `max_rank`, or than usual where that is None, is refused."""
    names = {id(module): name for name, module in Tree.of(model).modules}
    plans: dict[Any, Fit] = {}
    rank = 1
    for folder in named.values():
        with opened(folder, ignore_fields) as (config, file):
            header = file.header
        if (kind := _kind(config, header)) in plans:
            continue
        plans[kind] = plan = _fitting(model, config, header, str(folder))
        adapted = [source.rpartition(".") for source in plan.sources]
        rank = max([rank, *(config.rank_of(layer) for layer, _, part in adapted if part in FACTORS)])
    modules: dict[str, None] = {}
    widest = max(rank, USUAL_RANK) if max_rank is None else max_rank
    for plan in plans.values():
        for layer, parts in _parts_in(plan, widest).items():
            modules[names[id(submodule(plan.root, layer))]] = None
            if "weight" in parts:
                rank = max(rank, min(plan.shapes[parts["weight"]]))
    return list(modules), rank


def _check_acts_everywhere(config: LoRAConfig, where: str) -> None:
    if config.alora_invocation_tokens:
        raise AdapterFormatError(
            f"{where} acts from alora_invocation_tokens={config.alora_invocation_tokens} on, and a bank's adapters act "
            "everywhere. Use it by itself."
        )


def _kind(config: LoRAConfig, header: Header) -> Any:
    """A key: files with the same one fit a model in the same way."""
    return repr(config), tuple(header.shapes.items()), header.note.get("module")


def _fitting(model: nn.Module, config: LoRAConfig, header: Header, where: str) -> Fit:
    _check_acts_everywhere(config, where)
    return fit(model, config, header, where=where)


def _read(plan: Fit, parts: Mapping[str, _Part | _Whole], tensors: Any) -> dict[str, LayerFactors]:
    """The factors out of an open file, or a state dict."""
    if plan.base or any(len(keys) > 1 for keys in plan.sources.values()):
        plan.read(tensors)  # raises where two copies of a tensor, in it or in the model, differ
    return {name: part.factors(tensors) for name, part in parts.items()}
