"""An adapter folder that is read, without a model, to write another one with other numbers in its pairs.

All other tensors (modules and biases that were trained whole, rows of tokens, biases of B, DoRA's magnitudes), the
other fields of the config, the metadata and the user's part of the card are carried over.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from itertools import permutations
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora import __version__
from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import scale_of
from lightning_lora.engine.layers.pair import from_blocks
from lightning_lora.engine.tree import entry_matches
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.hub.address import base_id, local_path
from lightning_lora.hub.base_weights import WeightOf, matrix_of
from lightning_lora.hub.card import RunFacts, merge_cards, model_card
from lightning_lora.hub.format import peft
from lightning_lora.hub.format.folder import (
    CONFIG,
    TENSORS,
    Header,
    check_folder,
    read_card,
    read_config,
    write_adapter,
)
from lightning_lora.hub.format.inspection import check_config
from lightning_lora.hub.pull import adapter_folder
from lightning_lora.rewriting.parts import (
    ambiguous_in,
    by_number,
    names_of,
    repaired_in,
    tensors_in,
    unclear_alphas,
)

_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Stored:
    """The content of an adapter folder, and where the other one is to be written."""

    folder: Path
    target: Path
    data: Mapping[str, Any]
    """The fields of its config."""
    config: LoRAConfig
    tensors: Mapping[str, Tensor]
    header: Header
    pairs: Mapping[str, StoredPair]
    """By the name of the module; with a number where a module has several."""

    @property
    def is_transposed(self) -> bool:
        """True if the weights of the base's linear layers are stored as (in, out)."""
        return bool(self.data.get("fan_in_fan_out"))

    def write(
        self,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        note: Mapping[str, Mapping[str, Any]],
        said: Mapping[str, str],
        *,
        target: Path | None = None,
    ) -> None:
        """Write the adapter anew, with other fields and tensors; `note` goes into its file, what is `said` into its
        card."""
        data = {**data, _BASE: base_id(data.get(_BASE))}
        notes = {key: {**value, "version": __version__} for key, value in note.items()}
        card = model_card(
            data,
            modules=len(self.pairs),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            module=self.header.note.get("module") or "",
            run=RunFacts(notes=dict(said)),
        )
        card = merge_cards(card, read_card(self.folder))
        place = self.target if target is None else target
        write_adapter(place, data, tensors, {**self.header.note, **notes}, card, self.header.others)


def opened(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    revision: str | None,
    subfolder: str | None,
    ignore_fields: Collection[str],
) -> Stored:
    """Read `adapter`, a folder or an id on the Hub, of which another is to be written into `folder`. Raises ConfigError
    where that is the same folder, and AdapterFormatError for one that is damaged."""
    target = local_path(folder)
    source = adapter_folder(os.path.expanduser(adapter), revision, subfolder=subfolder, ignore_fields=ignore_fields)
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise ConfigError(f"The result would replace the adapter itself: choose another folder than {str(target)!r}.")
    check_folder(source)
    data = read_config(source)
    config = check_config(data, str(source / CONFIG), ignore_fields)
    tensors, header, _ = tensors_in(source, config)
    return Stored(source, target, data, config, tensors, header, _pairs(tensors, config, str(source / TENSORS)))


@dataclass(frozen=True)
class StoredPair:
    """A and B of one module or parameter, as a folder holds them."""

    A: Tensor
    B: Tensor
    keys: tuple[str, str]
    rank: int
    alpha: float
    scale: float
    magnitude: Tensor | None
    module: str
    parameters: tuple[str, ...] = ()
    """The whole names of the module's parameters that are adapted one by one. Which of them the pair belongs to, a file
    does not say."""

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which patterns give the pair its rank and alpha."""
        return self.parameters or (self.module,)

    def weight_in(self, weight: WeightOf, transposed: bool) -> Tensor:
        """The weight (out, in) of the module; a kernel counts as inputs."""
        shape, is_embedding = (self.B.shape[0], self.A[0].numel()), peft.is_of_embedding(self.keys[0])
        return matrix_of(weight, self.module, shape, is_embedding=is_embedding, is_transposed=transposed)

    def tensors(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The blocks A (n, r, in) and B (n, out, r), by the keys of the pair and laid out as its own."""
        A, B = from_blocks(A, B, self.A, self.B, self.rank)
        return {self.keys[0]: A.contiguous(), self.keys[1]: B.contiguous()}


def _pairs(tensors: Mapping[str, Tensor], config: LoRAConfig, where: str) -> dict[str, StoredPair]:
    """The pairs among `tensors`, by the name of the module; with a number where a module has several."""
    keys: dict[str, list[str]] = {}
    for key in sorted(tensors, key=by_number):
        if (owner := peft.owner_of_A(key)) is not None:
            keys.setdefault(owner, []).append(key)
    lacking = [b for found in keys.values() for key in found if (b := peft.key_of_B(key)) not in tensors]
    if lacking:
        raise AdapterFormatError(f"{where} is no whole adapter: missing: {listed(lacking)}.")
    pairs: dict[str, StoredPair] = {}
    whole = {module for module in keys if not _parameters(module, config)}
    for module, of_module in keys.items():
        parameters = _parameters(module, config)
        factors = [(tensors[key], tensors[peft.key_of_B(key)]) for key in of_module]
        if len(of_module) != max(1, len(parameters)):
            raise AdapterFormatError(
                f"{where} holds {len(of_module)} pairs for {module!r}, of which its {CONFIG} adapts "
                f"{listed(parameters) or 'the output'}."
            )
        ranks = _ranks(module, parameters, factors, config, where)
        for i, (key, (A, B), rank) in enumerate(zip(of_module, factors, ranks), 1):
            named = parameters or (module,)
            alphas = {config.alpha_of(name, *names_of(module, whole)) for name in named}
            if len(alphas) > 1:
                raise AdapterFormatError(f"{where}: {_untold(module, parameters)}")
            alpha = alphas.pop()
            pairs[module if len(of_module) == 1 else f"{module} ({i})"] = StoredPair(
                A=A,
                B=B,
                keys=(key, peft.key_of_B(key)),
                rank=rank,
                alpha=alpha,
                scale=scale_of(alpha, rank, rank_stabilised=config.use_rslora),
                magnitude=tensors.get(peft.key_of_magnitude(key)),
                module=module,
                parameters=parameters,
            )
    plain = {name: pair.rank for name, pair in pairs.items() if not pair.parameters}
    repaired = repaired_in(plain, config, where)
    if problems := unclear_alphas(repaired, ambiguous_in(plain, config)):
        raise AdapterFormatError(f"{where}: {problems[0]}.")
    return pairs


def _parameters(module: str, config: LoRAConfig) -> tuple[str, ...]:
    """The whole names of the parameters of `module` that target_parameters names."""
    last = {entry.rpartition(".")[2]: entry for entry in config.target_parameters or ()}
    full = {f"{module}.{name}" if module else name: entry for name, entry in last.items()}
    return tuple(sorted(name for name, entry in full.items() if entry_matches(entry, name)))


def _ranks(
    module: str,
    parameters: tuple[str, ...],
    factors: list[tuple[Tensor, Tensor]],
    config: LoRAConfig,
    where: str,
) -> tuple[int, ...]:
    """The rank of each of `factors`. That of a stack of matrices is a part of its rows, which only the config tells;
    where the parameters of a module have several ranks, the one way in which all stacks have one length."""
    if not parameters:
        return (factors[0][0].shape[0],)
    wanted = [config.rank_of(name, module) for name in parameters]
    ways = {
        ranks
        for ranks in permutations(wanted)
        if all(A.shape[0] % r == 0 and B.ndim == 2 and B.shape[1] == A.shape[0] for r, (A, B) in zip(ranks, factors))
    }
    if len(ways) > 1:
        ways = {way for way in ways if len({A.shape[0] // r for r, (A, _) in zip(way, factors)}) == 1}
    if len(ways) != 1:
        raise AdapterFormatError(f"{where}: {_untold(module, parameters)}")
    return ways.pop()


def _untold(module: str, parameters: tuple[str, ...]) -> str:
    return (
        f"which pair of {module!r} belongs to which of {listed(parameters)} cannot be told from the file, and "
        "their ranks or alphas differ. Load it into its model (load_adapter), call resize there, and save it."
    )
