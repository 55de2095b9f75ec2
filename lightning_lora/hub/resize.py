"""Gives an adapter folder another rank, without a model: only the pairs and the config's ranks and alphas change.

All other tensors (modules and biases that were trained whole, rows of tokens, biases of B, DoRA's magnitudes), the
other fields of the config, the metadata and the user's part of the card are carried over.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from itertools import permutations
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import exact_pattern, scale_of, usual
from lightning_lora.engine.cut import (
    Aim,
    Resized,
    ResizedModule,
    ResizeReport,
    alpha_for,
    check_limit,
    in_each_block,
    resized,
    shown_error,
    together,
)
from lightning_lora.engine.layers.dora import dora_update
from lightning_lora.engine.layers.pair import as_blocks, from_blocks
from lightning_lora.engine.low_rank import product_norm
from lightning_lora.engine.tree import entry_matches
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.hub.base_weights import Base, WeightOf, matrix_of, weights_of
from lightning_lora.hub.card import RunFacts, base_id, merge_cards, model_card
from lightning_lora.hub.export.lowering import unclear_alphas
from lightning_lora.hub.export.rewrite import dtype_called
from lightning_lora.hub.format import peft
from lightning_lora.hub.format.config import plain_number
from lightning_lora.hub.format.inspection import check_config, config_in
from lightning_lora.hub.format.parts import ambiguous_in, by_number, magnitude_key, names_of, repaired_in, tensors_in
from lightning_lora.hub.format.reading import CARD, CONFIG, TENSORS, check_folder
from lightning_lora.hub.format.writing import local_path, write_adapter
from lightning_lora.hub.pull import adapter_folder


def resize_adapter(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    rank: int | None = None,
    energy: float | None = None,
    max_error: float | None = None,
    base: Base | None = None,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    ignore_fields: Collection[str] = (),
) -> ResizeReport:
    """Write `adapter` into `folder` with another rank. Give one of `rank`, `energy` and `max_error`.

    Each pair is cut to the best approximation of its update s B A of its new rank (Eckart and Young 1936), by QR and
    SVD of the factors, or padded with zeros, exactly. The scales stay, so alphas follow the ranks. Modules that get
    other ranks than the rest are written into rank_pattern and alpha_pattern, which vLLM and others do not read
    (`export_adapter` rewrites them). The experts of a layer, and the projections of an nn.MultiheadAttention, keep one
    rank.

    A DoRA keeps its magnitudes, and with them the norms of its adapted weights; a cut changes their directions.

    Args:
        adapter: A folder in PEFT's format, or an id on the Hub.
        folder: Where to write the result, as `save_adapter` does; another folder than that of `adapter`.
        rank: The new rank of every pair, also of those that had another.
        energy: In (0, 1]: cut each pair to the smallest rank that keeps this share of the sum of the squared singular
            values of its update.
        max_error: Cut each pair to the smallest rank with at most this relative error of its update (Frobenius norm).
            For a DoRA, whose error depends on the weights, this needs `base`.
        base: What a DoRA was trained on (the model, a folder or file of safetensors, or an id on the Hub). The report
            then has the errors of its adapted weights, relative to what the adapter changes in them.
        dtype: The precision of the factors ("float32", "bfloat16", "float16"); by default that of the file.
        revision, subfolder, ignore_fields: As in `load_adapter`.

    Returns:
        For each pair the ranks and the error, and the error of all together, with the rounding; `str()` is a table.

    Raises:
        ConfigError: An argument is invalid, a convolution's groups do not divide the rank, or rounding does not allow
            `max_error`.
        AdapterFormatError: The adapter is damaged, or what its ranks or scales are cannot be told.
        HubError: Something cannot be fetched.
        CheckpointError: Files cannot be read or written.
    """
    aim = Aim.of(rank, energy, max_error)
    wanted = dtype_called(dtype)
    target = local_path(folder)
    source = adapter_folder(os.path.expanduser(adapter), revision, subfolder=subfolder, ignore_fields=ignore_fields)
    if target.exists() and source.exists() and os.path.samefile(source, target):
        raise ConfigError(f"The result would replace the adapter itself: choose another folder than {str(target)!r}.")
    check_folder(source)
    data = config_in(source)
    config = check_config(data, str(source / CONFIG), ignore_fields)
    tensors, header, _ = tensors_in(source, config)
    pairs = _pairs(tensors, config, str(source / TENSORS))
    if aim.limit is not None and base is None and any(pair.magnitude is not None for pair in pairs.values()):
        raise ConfigError(
            "max_error of a DoRA is that of its adapted weight, so it needs the base's weights: pass base=. Or give "
            "rank or energy, which choose by s B A alone."
        )
    weight = None if base is None else weights_of(base)
    found, modules = _resized(pairs, aim, wanted, weight, bool(data.get("fan_in_fan_out")))
    check_limit(aim, modules, "Allow more, or write them wider, with dtype='float32'.")
    for name, result in found.items():
        pair = pairs[name]
        A, B = from_blocks(result.A, result.B, pair.A, pair.B, pair.rank)
        tensors |= {pair.keys[0]: A.contiguous(), pair.keys[1]: B.contiguous()}
    changed = _config(data, config, pairs, modules)
    report = ResizeReport(modules, aim.said, tuple(_notes(changed, pairs, modules, weight)))
    note = {**header.note, "resized": {"to": aim.said, "version": version("lightning-lora")}}
    card = _card(source, changed, report, header.note.get("module") or "", tensors)
    write_adapter(target, changed, dict(sorted(tensors.items())), note, card, header.others)
    return report


# Finds the pairs.


@dataclass(frozen=True)
class _Pair:
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


def _pairs(tensors: Mapping[str, Tensor], config: LoRAConfig, where: str) -> dict[str, _Pair]:
    """The pairs among `tensors`, by the name of the module; with a number where a module has several."""
    keys: dict[str, list[str]] = {}
    for key in sorted(tensors, key=by_number):
        if (owner := peft.owner_of_A(key)) is not None:
            keys.setdefault(owner, []).append(key)
    lacking = [b for found in keys.values() for key in found if (b := peft.key_of_B(key)) not in tensors]
    if lacking:
        raise AdapterFormatError(f"{where} is no whole adapter: missing: {listed(lacking)}.")
    pairs: dict[str, _Pair] = {}
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
            pairs[module if len(of_module) == 1 else f"{module} ({i})"] = _Pair(
                A=A,
                B=B,
                keys=(key, peft.key_of_B(key)),
                rank=rank,
                alpha=alpha,
                scale=scale_of(alpha, rank, rank_stabilised=config.use_rslora),
                magnitude=tensors.get(magnitude_key(key)),
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


# Resizes them.


def _resized(
    pairs: Mapping[str, _Pair], aim: Aim, dtype: torch.dtype | None, weight: WeightOf | None, transposed: bool
) -> tuple[dict[str, Resized], dict[str, ResizedModule]]:
    groups = together({pair.module for pair in pairs.values()})
    blocks = {name: as_blocks(pair.A, pair.B, pair.rank) for name, pair in pairs.items()}
    most: dict[str, int] = {}
    for name, pair in pairs.items() if aim.rank is None else ():
        group = groups[pair.module]
        most[group] = max(most.get(group, 1), aim.rank_in(*blocks[name]))
    found, modules = {}, {}
    for name, pair in pairs.items():
        if aim.rank is None:
            each = most[groups[pair.module]]
        else:
            each = in_each_block(aim.rank, pair.module, pair.A, pair.B, pair.rank)
        found[name], modules[name] = _one(pair, *blocks[name], each, aim, dtype, weight, transposed)
    return found, modules


def _one(
    pair: _Pair,
    A: Tensor,
    B: Tensor,
    each: int,
    aim: Aim,
    dtype: torch.dtype | None,
    weight: WeightOf | None,
    transposed: bool,
) -> tuple[Resized, ResizedModule]:
    """`pair`, of the blocks A and B, with `each` ranks in each block; with more, if a DoRA needs them for its error."""
    W = None if weight is None or pair.magnitude is None else _weight(pair, weight, transposed)
    had = A.shape[1]
    while True:
        made = resized(A, B, each).to(dtype or A.dtype, dtype or B.dtype)
        size, error = abs(pair.scale) * product_norm(B, A), made.error
        if W is not None:
            assert pair.magnitude is not None
            m = pair.magnitude.flatten()
            before, after = (dora_update(W, a[0], b[0], pair.scale, m) for a, b in ((A, B), (made.A, made.B)))
            size = float(before.norm())
            error = float((after - before).norm()) / (size or 1.0) if error else 0.0
        if W is None or aim.limit is None or error <= aim.limit or each >= had:
            break
        each += 1
    rank = pair.rank // had * each
    sizes = [A.numel() + B.numel(), made.A.numel() + made.B.numel()]
    return made, ResizedModule(pair.rank, rank, error, size, *sizes)


def _weight(pair: _Pair, weight: WeightOf, transposed: bool) -> Tensor:
    """The weight (out, in) of the module of a DoRA pair; a kernel counts as inputs."""
    shape, is_embedding = (pair.B.shape[0], pair.A[0].numel()), peft.is_of_embedding(pair.keys[0])
    return matrix_of(weight, pair.module, shape, is_embedding=is_embedding, is_transposed=transposed)


# Makes what is written beside the tensors.


def _config(
    data: Mapping[str, Any], config: LoRAConfig, pairs: Mapping[str, _Pair], modules: Mapping[str, ResizedModule]
) -> dict[str, Any]:
    """The config's fields with the new ranks and alphas, each by the whole name of its module or parameter."""
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, pair in pairs.items():
        rank = modules[name].rank
        alpha = alpha_for(pair.scale, rank, rank_stabilised=config.use_rslora)
        ranks |= dict.fromkeys(pair.names, rank)
        alphas |= dict.fromkeys(pair.names, plain_number(alpha))
    rank, alpha = usual(config.rank, ranks), usual(config.alpha, alphas)
    changed = {
        "r": rank,
        "lora_alpha": plain_number(alpha),
        "rank_pattern": exact_pattern(ranks, rank),
        "alpha_pattern": exact_pattern(alphas, alpha),
        "base_model_name_or_path": base_id(data.get("base_model_name_or_path")),
    }
    return dict(sorted({**data, **changed}.items()))


def _notes(
    config: Mapping[str, Any],
    pairs: Mapping[str, _Pair],
    modules: Mapping[str, ResizedModule],
    weight: WeightOf | None,
) -> Iterator[str]:
    if any(pair.magnitude is not None and modules[name].error for name, pair in pairs.items()):
        said = (
            "the error is that of s B A before it is rescaled: pass base= to see that of the adapted weight"
            if weight is None
            else "the error is that of the adapted weight, relative to what the adapter changes in it"
        )
        yield f"DoRA: the magnitudes stay, so each output's weights keep their norm; {said}"
    if any(m.rank > m.rank_before for m in modules.values()):
        yield (
            "ranks that were added are zero in A and in B, and do not learn: to train with a larger rank, call resize "
            "on the model"
        )
    if config["rank_pattern"]:
        yield (
            "the ranks of the modules differ, which vLLM and LoRAX would get wrong: for them, run lightning-lora export"
        )


def _card(
    source: Path, config: Mapping[str, Any], report: ResizeReport, module: str, tensors: Mapping[str, Tensor]
) -> str:
    error = f"{shown_error(report.error)} of the update (Frobenius norm)" if report.largest_error else "none"
    facts = RunFacts(notes={"resized to": report.aim, "error": error})
    parameters = sum(tensor.numel() for tensor in tensors.values())
    card = model_card(config, modules=len(report.modules), parameters=parameters, module=module, run=facts)
    try:
        theirs = (source / CARD).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        theirs = None
    return merge_cards(card, theirs)
