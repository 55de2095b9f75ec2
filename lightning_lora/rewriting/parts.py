"""Takes an adapter folder apart, without a model: A, B and the scale of each module, and the other tensors."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import pattern_matches, scale_of
from lightning_lora.errors import AdapterFormatError, listed
from lightning_lora.hub.format import peft
from lightning_lora.hub.format.folder import CONFIG, TENSORS, Header, check_folder, open_tensors, read_config
from lightning_lora.hub.format.inspection import check_config, check_header


@dataclass(frozen=True)
class Pair:
    """A and B of one module, with their scale: the update of its weight is scale * B A.

    Linear: A (r, in), B (out, r). Embedding: A (r, words), B (width, r), for the transposed weight. Convolution: A
    (r, in, *kernel), B (out, r / groups, 1, ...).
    """

    A: Tensor
    B: Tensor
    alpha: float
    scale: float
    magnitude: Tensor | None = None
    """DoRA's m (out,), or (width,) for an embedding (Liu et al. 2024, arXiv:2402.09353)."""
    is_embedding: bool = False

    @property
    def rank(self) -> int:
        return self.A.shape[0]

    @property
    def is_matrix(self) -> bool:
        return self.A.ndim == 2 and self.B.ndim == 2


@dataclass(frozen=True)
class Parts:
    """The content of an adapter folder."""

    config: LoRAConfig
    data: Mapping[str, Any]
    """The fields of adapter_config.json, unchanged."""
    pairs: dict[str, Pair]
    """The pairs, by the name of their module in the base."""
    saved: dict[str, Tensor]
    """Tensors of modules that were trained whole, by PEFT's keys."""
    biases: dict[str, Tensor]
    """Biases of the base that were trained, by PEFT's keys."""
    base: dict[str, Tensor]
    """Weights of the base that PEFT wrote as well, by its keys."""
    note: Mapping[str, Any]
    """The data that this package wrote into the header of the tensors' file."""
    repaired: tuple[str, ...]
    """Modules whose rank differs from the one that the config's patterns give, read in the order of the file."""
    ambiguous: tuple[str, ...]
    """Modules for which entries of alpha_pattern disagree; the first in the file counts."""
    renamed: int
    """The number of keys that still had the name of the adapter or of a wrapper in them."""

    @property
    def is_dora(self) -> bool:
        return any(pair.magnitude is not None for pair in self.pairs.values())

    def tensor_keys(self, names: Mapping[str, Pair]) -> dict[str, tuple[str, str]]:
        """PEFT's keys of A and of B for the modules `names`."""
        return {name: _factor_keys(name, names, pair.is_embedding) for name, pair in names.items()}


def _factor_keys(name: str, wrapped: Mapping[str, Any] | set[str], is_embedding: bool) -> tuple[str, str]:
    stem = f"{name}." if name else ""
    embeddings = {name} if is_embedding else set()
    A, B = (peft.tensor_key(f"{stem}{factor}", wrapped, embeddings) for factor in ("lora_A", "lora_B"))
    return A, B


def parts_of(folder: Path, ignore_fields: Collection[str] = (), *, to_look_at: bool = False) -> Parts:
    """Read and check the adapter in `folder`.

    Raises AdapterFormatError for a folder that is no adapter, is damaged, holds values that are not finite, does not
    fit its own config, or uses a variant of LoRA that cannot be read here. With `to_look_at` the pairs are all that is
    wanted, and variants are read too whose other tensors cannot be rewritten: a bias of B, tokens, aLoRA.
    """
    check_folder(folder)
    where = str(folder / TENSORS)
    config, data = _config(folder, ignore_fields, to_look_at)
    tensors, header, renamed = tensors_in(folder, config)
    pairs = _pairs(tensors, config, bool(data.get("use_dora")), where)
    saved: dict[str, Tensor] = {}
    biases: dict[str, Tensor] = {}
    base: dict[str, Tensor] = {}
    whole = config.modules_to_save or ()
    for key, tensor in tensors.items():
        name = peft.base_name(key)
        kind = saved if peft.is_inside(whole, name) else biases if _is_bias(name, config) else base
        kind[key] = tensor
    repaired = repaired_in({name: pair.rank for name, pair in pairs.items()}, config, where)
    return Parts(config, data, pairs, saved, biases, base, header.note, repaired, ambiguous_in(pairs, config), renamed)


def tensors_in(folder: Path, config: LoRAConfig) -> tuple[dict[str, Tensor], Header, int]:
    """The tensors of the adapter in `folder`, by PEFT's keys without what some writers leave in them; the header of
    their file; and the number of keys that were not plain. Raises AdapterFormatError for what `config` does not
    explain, and for values that are not finite."""
    where = str(folder / TENSORS)
    tensors: dict[str, Tensor] = {}
    renamed, doubled, broken = 0, [], []
    with open_tensors(folder) as file:
        check_header(config, file.header, where)
        for key in file.header.shapes:
            plain = peft.plain_key(key)
            renamed += plain != key
            if peft.is_untrained_original(key):
                continue
            if plain in tensors:
                doubled.append(plain)
            tensors[plain] = file[key]
            if tensors[plain].is_floating_point() and not bool(torch.isfinite(tensors[plain]).all()):
                broken.append(key)
    if doubled:
        raise AdapterFormatError(f"{where} holds {listed(doubled)} twice, under keys that mean the same.")
    if broken:
        raise AdapterFormatError(f"{where} holds values that are not finite, in {listed(broken)}.")
    return tensors, file.header, renamed


def names_of(name: str, adapted: Collection[str]) -> tuple[str, ...]:
    """The names by which patterns match the module called `name`. For the out_proj of an nn.MultiheadAttention that is
    adapted, PEFT takes what it takes for the attention."""
    parent, _, last = name.rpartition(".")
    return (name, parent) if last == "out_proj" and parent in adapted else (name,)


def repaired_in(ranks: Mapping[str, int], config: LoRAConfig, where: str) -> tuple[str, ...]:
    """The modules that have another rank than the config's patterns give, which PEFT sorts. Raises AdapterFormatError
    where there is no pattern that may have been sorted."""
    repaired = tuple(name for name, rank in ranks.items() if config.rank_of(*names_of(name, ranks)) != rank)
    if repaired and not config.rank_pattern:
        name = repaired[0]
        raise AdapterFormatError(
            f"{where} does not fit its {CONFIG}: r is {config.rank}, and {name!r} has rank {ranks[name]}."
        )
    return repaired


def _config(folder: Path, ignore_fields: Collection[str], to_look_at: bool) -> tuple[LoRAConfig, Mapping[str, Any]]:
    """The config in `folder`, and the fields of its file. A config with DoRA is read as one without, since DoRA changes
    neither A nor B."""
    data = read_config(folder)
    is_dora = isinstance(data, Mapping) and bool(data.get("use_dora"))
    if is_dora and data["use_dora"] is not True:
        raise AdapterFormatError(f"{folder / CONFIG}: use_dora is {data['use_dora']!r}, not true or false.")
    plain = {**data, "use_dora": False} if is_dora else data
    config = check_config(plain, str(folder / CONFIG), ignore_fields)
    if to_look_at:
        if config.target_parameters:
            raise AdapterFormatError(
                f"{folder / CONFIG}: target_parameters is {data['target_parameters']!r}. Which parameters the pairs in "
                "the file belong to shows only beside the model: load the adapter onto it, and inspect the model."
            )
        return config, data
    for field in ("lora_bias", "target_parameters", "trainable_token_indices"):
        if getattr(config, field):
            raise AdapterFormatError(
                f"{folder / CONFIG}: {field} is {data[field]!r}. That is no low-rank update of a layer, and cannot be "
                "rewritten as one: merge the adapter into its base and use that."
            )
    if config.alora_invocation_tokens:
        raise AdapterFormatError(
            f"{folder / CONFIG}: alora_invocation_tokens is {config.alora_invocation_tokens}, so the adapter acts from "
            "these tokens on, and would act everywhere once it is rewritten. Use it as it is."
        )
    return config, data


def _pairs(tensors: dict[str, Tensor], config: LoRAConfig, use_dora: bool, where: str) -> dict[str, Pair]:
    """Removes the pairs from `tensors` and returns them, by module."""
    names = sorted(peft.adapted_names(key for key in tensors if not peft.is_of_tokens(key)), key=by_number)
    wrapped = peft.adapted_names(tensors)
    pairs, problems = {}, []
    for name in names:
        is_embedding = not any(key in tensors for key in _factor_keys(name, wrapped, False))
        A_key, B_key = _factor_keys(name, wrapped, is_embedding)
        A, B = tensors.pop(A_key, None), tensors.pop(B_key, None)
        magnitude = tensors.pop(peft.key_of_magnitude(A_key), None)
        if A is None or B is None:
            problems.append(f"missing: {A_key if A is None else B_key}")
        elif A.ndim == 2 and B.ndim == 2 and A.shape[0] != B.shape[1]:
            problems.append(f"{A_key} has rank {A.shape[0]}, {B_key} has {B.shape[1]}")
        elif use_dora != (magnitude is not None):
            problems.append(f"{name}: use_dora is {use_dora}, and a magnitude is {'missing' if use_dora else 'there'}")
        else:
            alpha = config.alpha_of(*names_of(name, wrapped))
            scale = scale_of(alpha, A.shape[0], rank_stabilised=config.use_rslora)
            pairs[name] = Pair(A, B, alpha, scale, magnitude, is_embedding)
    if problems:
        raise AdapterFormatError(f"{where} is no whole adapter: {listed(problems)}.")
    return pairs


def by_number(name: str) -> list[tuple[int, str]]:
    """A sort key that puts layer 2 before layer 10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _is_bias(name: str, config: LoRAConfig) -> bool:
    return config.bias != "none" and name.endswith("bias")


def ambiguous_in(names: Collection[str], config: LoRAConfig) -> tuple[str, ...]:
    """The modules among `names` for which entries of alpha_pattern disagree."""

    def alphas(name: str) -> set[float]:
        return {alpha for entry, alpha in config.alpha_pattern.items() if pattern_matches(entry, name)}

    return tuple(name for name in names if len(alphas(name)) > 1)


def unclear(parts: Parts) -> list[str]:
    """The problem that alpha_pattern is ambiguous, if it is."""
    return unclear_alphas(parts.repaired, parts.ambiguous)


def unclear_alphas(repaired: Sequence[str], ambiguous: Sequence[str]) -> list[str]:
    """As `unclear`, of modules as they are in `Parts`. PEFT sorts the patterns that it saves. If the ranks show that
    this changed their order, and entries of alpha_pattern disagree, the alphas are not known."""
    if not (repaired and ambiguous):
        return []
    return [
        f"its patterns were saved in another order than they were trained in (the rank of {repaired[0]!r} shows it), "
        f"so which entry of alpha_pattern was meant for {listed(map(repr, ambiguous))} is not known: correct "
        f"alpha_pattern in {CONFIG} by hand"
    ]
