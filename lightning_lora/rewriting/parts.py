"""Takes an adapter folder apart, without a model: A, B and the scale of each module, and the other tensors.

Another adapter can be written from it, with other numbers in its pairs. What is not named is carried over: tensors that
were trained whole, rows of tokens, biases of B, fields of the config, metadata, and the user's part of the card.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import pattern_matches, scale_of
from lightning_lora.engine.layers.pair import from_blocks
from lightning_lora.engine.state import is_finite
from lightning_lora.engine.tree import entry_matches
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.format import peft
from lightning_lora.format.folder import (
    CONFIG,
    TENSORS,
    Header,
    check_folder,
    open_tensors,
    read_card,
    read_config,
    write_adapter,
)
from lightning_lora.format.inspection import check_config, check_header
from lightning_lora.hub.address import base_id, local_path
from lightning_lora.hub.base_weights import WeightOf, matrix_of
from lightning_lora.hub.card import RunFacts, merge_cards, model_card
from lightning_lora.hub.pull import adapter_folder

_BASE = "base_model_name_or_path"


@dataclass(frozen=True)
class Pair:
    """A and B of one module, with their scale: the update of its weight is scale * B A.

    Linear: A (r, in), B (out, r). Embedding: A (r, words), B (width, r), for the transposed weight. Convolution: A
    (r, in, *kernel), B (out, r / groups, 1, ...). Stack of n matrices: A (n r, in), B (out, r n).
    """

    A: Tensor
    B: Tensor
    alpha: float
    scale: float
    magnitude: Tensor | None = None
    """DoRA's m (out,), or (width,) for an embedding (Liu et al. 2024, arXiv:2402.09353)."""
    is_embedding: bool = False
    count: int = 1
    """The number of matrices of a stack."""
    module: str = ""
    parameters: tuple[str, ...] = ()
    """The whole names of the module's parameters that are adapted one by one. Which of them the pair belongs to, a file
    does not say."""
    keys: tuple[str, str] = ("", "")
    """PEFT's keys of A and B in the file that was read."""

    @property
    def rank(self) -> int:
        return self.A.shape[0] // self.count

    @property
    def is_matrix(self) -> bool:
        return self.A.ndim == 2 and self.B.ndim == 2

    @property
    def names(self) -> tuple[str, ...]:
        """The names by which patterns give the pair its rank and alpha."""
        return self.parameters or (self.module,)

    def weight_in(self, weight: WeightOf, transposed: bool) -> Tensor:
        """The base's weight (out, in) of the module; a kernel counts as inputs."""
        shape = self.B.shape[0], self.A[0].numel()
        return matrix_of(weight, self.module, shape, is_embedding=self.is_embedding, is_transposed=transposed)

    def tensors(self, A: Tensor, B: Tensor) -> dict[str, Tensor]:
        """The blocks A (n, r, in) and B (n, out, r), by the keys of the pair and laid out as its own."""
        A, B = from_blocks(A, B, self.A, self.B, self.rank)
        return {self.keys[0]: A.contiguous(), self.keys[1]: B.contiguous()}


@dataclass(frozen=True)
class Parts:
    """The content of an adapter folder."""

    folder: Path
    config: LoRAConfig
    """The config, with DoRA read as plain LoRA: it changes neither A nor B."""
    data: Mapping[str, Any]
    """The fields of adapter_config.json, unchanged."""
    tensors: dict[str, Tensor]
    """All tensors, by PEFT's keys."""
    header: Header
    pairs: dict[str, Pair]
    """The pairs, by the name of their module in the base; with a number where a module has several."""
    saved: dict[str, Tensor]
    """Tensors of modules that were trained whole, by PEFT's keys."""
    biases: dict[str, Tensor]
    """Biases of the base that were trained, by PEFT's keys."""
    base: dict[str, Tensor]
    """Weights of the base that PEFT wrote as well, by its keys."""
    renamed: int
    """The number of keys that still had the name of the adapter or of a wrapper in them."""

    @property
    def note(self) -> Mapping[str, Any]:
        """The data that this package wrote into the header of the tensors' file."""
        return self.header.note

    @property
    def is_dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    @property
    def is_transposed(self) -> bool:
        """True if the weights of the base's linear layers are stored as (in, out)."""
        return bool(self.data.get("fan_in_fan_out"))

    @property
    def ambiguous(self) -> tuple[str, ...]:
        """Modules for which entries of alpha_pattern disagree; the first in the file counts."""

        def alphas(name: str) -> set[float]:
            return {alpha for entry, alpha in self.config.alpha_pattern.items() if pattern_matches(entry, name)}

        return tuple(name for name, pair in self.pairs.items() if not pair.parameters and len(alphas(name)) > 1)

    def unclear(self) -> list[str]:
        """The problem that alpha_pattern is ambiguous, if it is. PEFT sorts the patterns that it saves. If the ranks
        show that this changed their order, and entries of alpha_pattern disagree, the alphas are not known."""
        plain = {name: pair.rank for name, pair in self.pairs.items() if not pair.parameters}
        moved = [name for name, rank in plain.items() if self.config.rank_of(*_names_of(name, plain)) != rank]
        if not (moved and self.ambiguous):
            return []
        return [
            f"its patterns were saved in another order than they were trained in (the rank of {moved[0]!r} shows it), "
            f"so which entry of alpha_pattern was meant for {listed(map(repr, self.ambiguous))} is not known: correct "
            f"alpha_pattern in {CONFIG} by hand"
        ]

    def tensor_keys(self, names: Mapping[str, Pair]) -> dict[str, tuple[str, str]]:
        """PEFT's keys of A and of B for the modules `names`, if these and no others are adapted."""

        def key(name: str, factor: str) -> str:
            full = f"{name}.{factor}" if name else factor
            return peft.tensor_key(full, names, {name} if names[name].is_embedding else ())

        return {name: (key(name, "lora_A"), key(name, "lora_B")) for name in names}

    def write(
        self,
        target: Path,
        data: Mapping[str, Any],
        tensors: Mapping[str, Tensor],
        note: Mapping[str, Mapping[str, Any]],
        said: Mapping[str, str],
    ) -> None:
        """Write another adapter into `target`, with the fields `data` and with `tensors`; `note` goes into its file,
        what is `said` into its card."""
        data = {**data, _BASE: base_id(data.get(_BASE))}
        notes = {key: {**value, "version": version("lightning-lora")} for key, value in note.items()}
        card = model_card(
            data,
            modules=len(peft.adapted_names(tensors)),
            parameters=sum(tensor.numel() for tensor in tensors.values()),
            module=self.note.get("module") or "",
            run=RunFacts(notes=dict(said)),
        )
        card = merge_cards(card, read_card(self.folder))
        write_adapter(target, data, tensors, {**self.note, **notes}, card, self.header.others)


def source_and_target(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    revision: str | None,
    subfolder: str | None,
    ignore_fields: Collection[str],
) -> tuple[Path, Path]:
    """The folder of `adapter`, which may be on the Hub, and the other folder, into which an adapter is to be written.
    Raises ConfigError where they are one."""
    target = local_path(folder)
    source = adapter_folder(adapter, revision, subfolder=subfolder, ignore_fields=ignore_fields)
    check_target(target, [source])
    return source, target


def parts_to_change(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    revision: str | None,
    subfolder: str | None,
    ignore_fields: Collection[str],
) -> tuple[Parts, Path]:
    """The parts of `adapter`, in which numbers are to be changed, and the folder into which the result is written."""
    source, target = source_and_target(adapter, folder, revision, subfolder, ignore_fields)
    parts = any_parts_of(source, ignore_fields)
    if problems := parts.unclear():
        raise AdapterFormatError(f"{source / TENSORS}: {problems[0]}.")
    return parts, target


def check_target(target: Path, sources: Collection[Path]) -> None:
    """Raise ConfigError where an adapter that is written into `target` would replace one of `sources`."""
    if target.exists() and any(source.exists() and os.path.samefile(source, target) for source in sources):
        what = "the adapter itself" if len(sources) == 1 else "one of its adapters"
        raise ConfigError(f"The result would replace {what}: choose another folder than {str(target)!r}.")


# What may be read: to write pairs anew under other names; to look at the pairs; or to change the numbers in them.

_NO_PAIRS = ("lora_bias", "target_parameters", "trainable_token_indices")


def parts_of(folder: Path, ignore_fields: Collection[str] = ()) -> Parts:
    """Read and check the adapter in `folder`, whose pairs are all that it is.

    Raises AdapterFormatError for a folder that is no adapter, is damaged, holds values that are not finite, does not
    fit its own config, or uses a variant of LoRA that pairs alone do not hold.
    """
    parts = any_parts_of(folder, ignore_fields)
    for field in _NO_PAIRS:
        if getattr(parts.config, field):
            raise AdapterFormatError(
                f"{folder / CONFIG}: {field} is {parts.data[field]!r}. That is no low-rank update of a layer, and "
                "cannot be rewritten as one: merge the adapter into its base and use that."
            )
    if parts.config.alora_invocation_tokens:
        raise AdapterFormatError(
            f"{folder / CONFIG}: alora_invocation_tokens is {parts.config.alora_invocation_tokens}, so the adapter "
            "acts from these tokens on, and would act everywhere once it is rewritten. Use it as it is."
        )
    return parts


def any_parts_of(folder: Path, ignore_fields: Collection[str]) -> Parts:
    """`parts_of`, also of an adapter that has more than pairs: biases of B, stacks, rows of tokens, aLoRA."""
    check_folder(folder)
    data, where = read_config(folder), str(folder / CONFIG)
    use_dora = isinstance(data, Mapping) and bool(data.get("use_dora"))
    if use_dora and data["use_dora"] is not True:
        raise AdapterFormatError(f"{where}: use_dora is {data['use_dora']!r}, not true or false.")
    config = check_config({**data, "use_dora": False} if use_dora else data, where, ignore_fields)
    where = str(folder / TENSORS)
    tensors: dict[str, Tensor] = {}
    renamed, doubled, broken = 0, [], []
    with open_tensors(folder) as file:
        header = file.header
        check_header(config, header, where)
        for key in header.shapes:
            plain = peft.plain_key(key)
            renamed += plain != key
            if peft.is_untrained_original(key):
                continue
            if plain in tensors:
                doubled.append(plain)
            tensors[plain] = file[key]
            if not is_finite(tensors[plain]):
                broken.append(key)
    if doubled:
        raise AdapterFormatError(f"{where} holds {listed(doubled)} twice, under keys that mean the same.")
    if broken:
        raise AdapterFormatError(f"{where} holds values that are not finite, in {listed(broken)}.")
    pairs = _pairs(tensors, config, use_dora, where)
    own = {key for pair in pairs.values() for key in (*pair.keys, peft.key_of_magnitude(pair.keys[0]))}
    saved: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    for key, tensor in tensors.items():
        if key in own:
            continue
        name = peft.base_name(key)
        is_bias = config.bias != "none" and name.endswith("bias")
        kind = saved if peft.is_inside(config.modules_to_save or (), name) else biases if is_bias else base
        kind[key] = tensor
    return Parts(folder, config, data, tensors, header, pairs, saved, biases, base, renamed)


def _pairs(tensors: Mapping[str, Tensor], config: LoRAConfig, use_dora: bool, where: str) -> dict[str, Pair]:
    keys: dict[str, list[str]] = {}
    problems = []
    for key in sorted(tensors, key=_by_number):
        if (owner := peft.owner_of_factor(key)) is None:
            continue
        if (other := peft.other_factor(key)) not in tensors:
            problems.append(f"missing: {other}")
        elif peft.is_A(key):
            keys.setdefault(owner, []).append(key)
    whole = {module for module in keys if not _parameters(module, config)}
    pairs: dict[str, Pair] = {}
    for module, of_module in keys.items():
        parameters = _parameters(module, config)
        factors = [(tensors[key], tensors[peft.other_factor(key)]) for key in of_module]
        if len(of_module) != max(1, len(parameters)):
            raise AdapterFormatError(
                f"{where} holds {len(of_module)} pairs for {module!r}, of which its {CONFIG} adapts "
                f"{listed(parameters) or 'the output'}."
            )
        counts = _counts(module, parameters, factors, config, where)
        alphas = {config.alpha_of(name, *_names_of(module, whole)) for name in parameters or (module,)}
        if len(alphas) > 1:
            raise AdapterFormatError(f"{where}: {_untold(module, parameters)}")
        (alpha,) = alphas
        for i, (key, (A, B), count) in enumerate(zip(of_module, factors, counts), 1):
            magnitude = tensors.get(peft.key_of_magnitude(key))
            if not parameters and A.ndim == 2 and B.ndim == 2 and A.shape[0] != B.shape[1]:
                problems.append(f"{key} has rank {A.shape[0]}, {peft.other_factor(key)} has {B.shape[1]}")
            elif use_dora != (magnitude is not None):
                is_there = "missing" if use_dora else "there"
                problems.append(f"{module}: use_dora is {use_dora}, and a magnitude is {is_there}")
            pairs[module if len(of_module) == 1 else f"{module} ({i})"] = Pair(
                A=A,
                B=B,
                alpha=alpha,
                scale=scale_of(alpha, A.shape[0] // count, rank_stabilised=config.use_rslora),
                magnitude=magnitude,
                is_embedding=peft.is_of_embedding(key),
                count=count,
                module=module,
                parameters=parameters,
                keys=(key, peft.other_factor(key)),
            )
    if problems:
        raise AdapterFormatError(f"{where} is no whole adapter: {listed(problems)}.")
    plain = {name: pair.rank for name, pair in pairs.items() if not pair.parameters}
    for name, rank in plain.items():
        if not config.rank_pattern and config.rank_of(*_names_of(name, plain)) != rank:
            raise AdapterFormatError(
                f"{where} does not fit its {CONFIG}: r is {config.rank}, and {name!r} has rank {rank}."
            )
    return pairs


def _by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _names_of(name: str, adapted: Collection[str]) -> tuple[str, ...]:
    """The names by which patterns match the module called `name`. For the out_proj of an nn.MultiheadAttention that is
    adapted, PEFT takes what it takes for the attention."""
    parent, _, last = name.rpartition(".")
    return (name, parent) if last == "out_proj" and parent in adapted else (name,)


def _parameters(module: str, config: LoRAConfig) -> tuple[str, ...]:
    """The whole names of the parameters of `module` that target_parameters names."""
    last = {entry.rpartition(".")[2]: entry for entry in config.target_parameters or ()}
    full = {f"{module}.{name}" if module else name: entry for name, entry in last.items()}
    return tuple(sorted(name for name, entry in full.items() if entry_matches(entry, name)))


def _counts(
    module: str,
    parameters: tuple[str, ...],
    factors: list[tuple[Tensor, Tensor]],
    config: LoRAConfig,
    where: str,
) -> tuple[int, ...]:
    """The number of matrices that each of `factors` is a stack of. The rank, by which the rows of A are divided, only
    the config tells; where the parameters of a module have several, the one way in which all stacks have one length."""
    if not parameters:
        return (1,)
    wanted = [config.rank_of(name, module) for name in parameters]
    ways = {
        tuple(A.shape[0] // r for r, (A, _) in zip(ranks, factors))
        for ranks in permutations(wanted)
        if all(A.shape[0] % r == 0 and B.ndim == 2 and B.shape[1] == A.shape[0] for r, (A, B) in zip(ranks, factors))
    }
    if len(ways) > 1:
        ways = {way for way in ways if len(set(way)) == 1}
    if len(ways) != 1:
        raise AdapterFormatError(f"{where}: {_untold(module, parameters)}")
    return ways.pop()


def _untold(module: str, parameters: tuple[str, ...]) -> str:
    return (
        f"which pair of {module!r} belongs to which of {listed(parameters)} cannot be told from the file, and "
        "their ranks or alphas differ. Load it into its model (load_adapter), call resize there, and save it."
    )
