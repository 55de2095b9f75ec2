"""Gives an adapter folder another rank, without a model: only the pairs and the config's ranks and alphas change."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.config import exact_pattern, usual
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
from lightning_lora.engine.layers.pair import as_blocks
from lightning_lora.engine.low_rank import product_norm
from lightning_lora.errors import ConfigError
from lightning_lora.format.config import plain_number
from lightning_lora.hub.base_weights import Base, WeightOf, weights_of
from lightning_lora.rewriting.export import dtype_called
from lightning_lora.rewriting.parts import Pair, parts_to_change


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
    parts, target = parts_to_change(adapter, folder, revision, subfolder, ignore_fields)
    pairs, tensors = parts.pairs, dict(parts.tensors)
    if aim.limit is not None and base is None and parts.is_dora:
        raise ConfigError(
            "max_error of a DoRA is that of its adapted weight, so it needs the base's weights: pass base=. Or give "
            "rank or energy, which choose by s B A alone."
        )
    weight = None if base is None else weights_of(base)
    found, modules = _resized(pairs, aim, wanted, weight, parts.is_transposed)
    check_limit(aim, modules, "Allow more, or write them wider, with dtype='float32'.")
    for name, result in found.items():
        tensors |= pairs[name].tensors(result.A, result.B)
    changed = _config(parts.data, parts.config, pairs, modules)
    report = ResizeReport(modules, aim.said, tuple(_notes(changed, pairs, modules, weight)))
    error = f"{shown_error(report.error)} of the update (Frobenius norm)" if report.largest_error else "none"
    parts.write(target, changed, tensors, {"resized": {"to": aim.said}}, {"resized to": aim.said, "error": error})
    return report


# Resizes them.


def _resized(
    pairs: Mapping[str, Pair], aim: Aim, dtype: torch.dtype | None, weight: WeightOf | None, transposed: bool
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
    pair: Pair,
    A: Tensor,
    B: Tensor,
    each: int,
    aim: Aim,
    dtype: torch.dtype | None,
    weight: WeightOf | None,
    transposed: bool,
) -> tuple[Resized, ResizedModule]:
    """`pair`, of the blocks A and B, with `each` ranks in each block; with more, if a DoRA needs them for its error."""
    W = None if weight is None or pair.magnitude is None else pair.weight_in(weight, transposed)
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


# Makes what is written beside the tensors.


def _config(
    data: Mapping[str, Any], config: LoRAConfig, pairs: Mapping[str, Pair], modules: Mapping[str, ResizedModule]
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
    }
    return {**data, **changed}


def _notes(
    config: Mapping[str, Any],
    pairs: Mapping[str, Pair],
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
