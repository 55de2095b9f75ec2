"""Rewrites an adapter folder for the program that will serve it, and reports what was changed."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_lora.checked import number, one_of, whole
from lightning_lora.engine.low_rank import Spectrum
from lightning_lora.engine.report import aligned, by_ending, overall_error
from lightning_lora.engine.targets import name_matches
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.format import peft
from lightning_lora.format.config import to_peft
from lightning_lora.format.folder import CONFIG
from lightning_lora.hub.address import base_id
from lightning_lora.hub.base_weights import Base, BaseFacts, WeightOf, facts_of, size_of, weights_of
from lightning_lora.hub.consumers import Consumer, consumer_called
from lightning_lora.rewriting.lowering import (
    Lowered,
    dora_spectra,
    head_of,
    left_out,
    lowered,
    other_base,
    refuse,
    refuse_loss,
    unsupported,
    with_every_layer,
    written_rank,
)
from lightning_lora.rewriting.parts import Parts, parts_of, source_and_target
from lightning_lora.rewriting.written import check_written


@dataclass(frozen=True)
class ExportReport:
    """What an export did; `str()` is a table and a line for each rewrite."""

    consumer: str
    folder: Path
    modules: Mapping[str, Lowered]
    """The modules as they are written; empty for PEFT, whose pairs are not rewritten."""
    changes: tuple[str, ...]
    notes: tuple[str, ...]
    """What the user has to do or to check."""
    size_before: int = 0
    """Bytes of the file of tensors that was read."""
    size: int = 0
    """Bytes of the file of tensors that was written."""
    size_merged: int | None = None
    """Bytes of the base, and so of the merged model; None where that is not known."""

    @property
    def error(self) -> float:
        """Frobenius norm of the change of all updates together, relative to the updates."""
        return overall_error((m.error, m.size) for m in self.modules.values())

    @property
    def largest_error(self) -> float:
        """The error of the module with the largest error."""
        return max((m.error for m in self.modules.values()), default=0.0)

    def __repr__(self) -> str:
        done = f"{len(self.modules)} modules, error {self.error:.2g}"
        return f"ExportReport({self.consumer!r}, {str(self.folder)!r}, {done})"

    def __str__(self) -> str:
        lines = [f"exported for {self.consumer}"]
        if self.modules:
            head = ("module", "number", "rank", "scale", "B times", "largest error")
            lines += aligned([head, *_rows(self.modules)], right=(1, 2, 3, 4, 5))
        lines += self.changes or ("nothing had to change",)
        if self.modules:
            worst = [m.worst for m in self.modules.values() if m.worst is not None]
            off = f", an output is off by at most {max(worst):.2g} of what the adapter can change" if worst else ""
            exact = "none: every product is bit for bit the same"
            lines.append(f"error: {f'{self.error:.2g} of the update{off}' if self.largest_error else exact}")
        lines.append(self._sizes())
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def _sizes(self) -> str:
        line = f"size: {_megabytes(self.size)}, before {_megabytes(self.size_before)}"
        if self.size < 1.5 * self.size_before:
            return line
        merged = "no more than its base" if self.size_merged is None else _megabytes(self.size_merged)
        return f"{line}; merged into its base (lightning-lora merge) it is {merged}, and nothing beside"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.3g} MB" if size < 1e9 else f"{size / 1e9:.3g} GB"


def _rows(modules: Mapping[str, Lowered]) -> list[tuple[str, ...]]:
    """One row for all modules whose names end alike and that were rewritten alike."""

    def rewriting(m: Lowered) -> tuple[str, str, str]:
        rank = str(m.rank) if m.rank == m.rank_before or m.added else f"{m.rank_before} -> {m.rank}"
        scale = "zeros added" if m.added else f"{m.scale:g}" if m.worst is None else "DoRA"
        return rank, scale, f"{m.factor:.6g}"

    return [
        (ending, str(len(members)), *alike, f"{max(m.error for m in members):.2g}")
        for (ending, alike), members in by_ending(modules.items(), rewriting).items()
    ]


# The export: the rewritten adapter computes the same in the program that serves it, or an error says why it cannot.

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def export_adapter(
    adapter: str | os.PathLike[str],
    folder: str | os.PathLike[str],
    *,
    consumer: str,
    base: Base | None = None,
    rank: int | None = None,
    max_rank: int | None = None,
    tolerance: float = 0.01,
    dtype: torch.dtype | str | None = None,
    revision: str | None = None,
    subfolder: str | None = None,
    ignore_fields: Collection[str] = (),
) -> ExportReport:
    """Write the `adapter` (a folder in PEFT's format, or an id on the Hub) into `folder` as `consumer` needs it.

    `consumer` is "vllm", "llama.cpp", "lorax" or "peft" (see consumers.py). If it has one scale for all modules, their
    own scales are multiplied into B. If it needs one rank, factors are padded with zeros. DoRA becomes a plain pair by
    truncated SVD, of the smallest rank with at most `tolerance` of error (Frobenius norm, relative to the update). For
    "peft" only names, patterns and keys are corrected.

    `base` is what the adapter was trained on: the model, a folder or file of safetensors, or an id on the Hub. It is
    needed for DoRA, for weights of the base in the file (compared, then left out), and to count layers. `rank` is the
    rank to write, `max_rank` the largest that the server takes. `dtype` ("float32", "bfloat16", "float16") is by
    default that of the file. `revision` and `subfolder` are those of an adapter on the Hub. `ignore_fields` are unknown
    fields of its config that are ignored and left out even if they have a value.

    Everything is checked before anything is written. Raises AdapterFormatError for an adapter that is damaged, that
    the consumer cannot compute, or that loses more than `tolerance`; ConfigError for an invalid argument; HubError
    where something cannot be fetched; CheckpointError where files cannot be read or written.
    """
    row = consumer_called(consumer)
    dtype = dtype_called(dtype)
    _check_numbers(rank, max_rank, tolerance)
    source, target = source_and_target(adapter, folder, revision, subfolder, ignore_fields)
    parts = parts_of(source, ignore_fields)
    try:
        if row.layout_of_peft:
            tensors, config, report = _for_peft(parts, row, target, dtype)
        else:
            weight = None if base is None else weights_of(base)
            tensors, config, report = _for_server(parts, row, target, weight, base, rank, max_rank, tolerance, dtype)
    except AdapterFormatError as error:
        what = f"{adapter} cannot be exported for {row.title}"
        raise AdapterFormatError(f"{what}: {str(error).rstrip('.')}. Nothing was written.") from error
    parts.write(target, config, tensors, {}, {"exported for": row.title})
    check_written(target, {"": parts}, {"": 1.0}, {name: m.error * m.size for name, m in report.modules.items()})
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (source, target)]
    return replace(report, size_before=sizes[0], size=sizes[1], size_merged=size_of(base))


def dtype_called(dtype: torch.dtype | str | None) -> torch.dtype | None:
    if dtype is None or dtype in DTYPES.values():
        return dtype  # type: ignore[return-value]
    return DTYPES[one_of("dtype", dtype, DTYPES)]


def _check_numbers(rank: int | None, max_rank: int | None, tolerance: float) -> None:
    for name, value in (("rank", rank), ("max_rank", max_rank)):
        if value is not None:
            whole(name, value)
    if rank is not None and max_rank is not None and rank > max_rank:
        raise ConfigError(f"rank={rank} is more than max_rank={max_rank}.")
    number("tolerance", tolerance, least=0, why="it is a relative error, such as 0.01")


def _for_peft(
    parts: Parts, row: Consumer, target: Path, dtype: torch.dtype | None
) -> tuple[dict[str, Tensor], dict[str, Any], ExportReport]:
    refuse(parts.unclear())
    keys = parts.tensor_keys(parts.pairs)
    tensors = {**parts.saved, **parts.biases, **parts.base}
    for name, pair in parts.pairs.items():
        tensors |= {keys[name][0]: pair.A, keys[name][1]: pair.B}
        if pair.magnitude is not None:
            tensors[peft.key_of_magnitude(keys[name][0])] = pair.magnitude
    tensors = {k: t.to(dtype) if dtype and t.is_floating_point() else t for k, t in sorted(tensors.items())}
    ranks = {name: pair.rank for name, pair in parts.pairs.items()}
    alphas = {name: pair.alpha for name, pair in parts.pairs.items()}
    config = _config(parts, parts.config, ranks, alphas, parts.data.get("modules_to_save"), parts.config.bias)
    config["use_dora"] = parts.is_dora
    for field in ("target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"):
        config[field] = parts.data.get(field)
    config["ensure_weight_tying"] = bool(parts.data.get("ensure_weight_tying"))
    patterns = {field: config[field] for field in ("rank_pattern", "alpha_pattern")}
    changes = [
        f"{field}: an entry for each module that differs, whatever order they are read in"
        for field, pattern in patterns.items()
        if pattern != (parts.data.get(field) or {})
    ]
    return tensors, config, ExportReport(row.title, target, {}, (*changes, *_cleaned(parts, config)), ())


def _for_server(
    parts: Parts,
    row: Consumer,
    target: Path,
    weight: WeightOf | None,
    base: Base | None,
    rank: int | None,
    max_rank: int | None,
    tolerance: float,
    dtype: torch.dtype | None,
) -> tuple[dict[str, Tensor], dict[str, Any], ExportReport]:
    named, revision = parts.data.get("base_model_name_or_path"), parts.data.get("revision")
    facts = facts_of(base, named, revision) if row.tried else BaseFacts()
    problems = [*parts.unclear(), *unsupported(parts, row, weight), *left_out(parts, row, facts)]
    refuse([*problems, *other_base(parts, weight)])
    spectra = dora_spectra(parts.pairs, weight, parts.is_transposed) if weight is not None else {}
    most = min(m for m in (row.most_rank, max_rank, math.inf) if m is not None)
    cuts = {name: _cut(name, s, row, rank, most, tolerance) for name, s in spectra.items()}
    refuse_loss(spectra, cuts, row, most, tolerance)

    restricted = parts.config.layers_to_transform is not None or bool(
        re.search(r"\d", " ".join([*_entries(parts.config.target_modules), *_entries(parts.config.exclude_modules)]))
    )
    pairs = with_every_layer(parts.pairs, restricted, weight) if row.every_layer else dict(parts.pairs)
    ranks = _ranks({name: cuts.get(name, pair.rank) for name, pair in pairs.items()}, row, rank, most)
    added = set(pairs).difference(parts.pairs)
    modules, alpha = lowered(pairs, spectra, ranks, cuts, dtype, added)
    lossy = {name: m.error for name, m in modules.items() if name not in spectra and m.error > tolerance}
    if lossy:
        worst = max(lossy, key=lossy.__getitem__)
        raise AdapterFormatError(
            f"rounding changes the update of {worst!r} by {lossy[worst]:.2g}, more than tolerance={tolerance:g}: write "
            "it with dtype='float32'"
        )

    keys = parts.tensor_keys(pairs)
    tensors = {keys[n][i]: t for n, m in modules.items() for i, t in enumerate((m.A, m.B))}
    tensors |= {key: t.to(dtype) if dtype and t.is_floating_point() else t for key, t in parts.saved.items()}
    plain = replace(parts.config, use_rslora=False)
    heads = [entry for entry in row.heads if parts.saved and any(head_of(key) == entry for key in parts.saved)]
    config = _config(parts, plain, ranks, dict.fromkeys(pairs, alpha), heads or None, "none", added=bool(added))
    if config["base_model_name_or_path"] is None and isinstance(base, str):
        config["base_model_name_or_path"] = base_id(base)
    changes = (*_changes(parts, row, modules, alpha, config), *_cleaned(parts, config))
    report = ExportReport(row.title, target, modules, changes, tuple(_notes(parts, row, config, modules, facts)))
    return dict(sorted(tensors.items())), config, report


def _cut(name: str, s: Spectrum, row: Consumer, rank: int | None, most: float, tolerance: float) -> int:
    return int(min(s.rank_for(tolerance) if rank is None else rank, most, len(s.S)))


def _ranks(own: Mapping[str, int], row: Consumer, rank: int | None, most: float) -> dict[str, int]:
    """The rank to write for each module."""
    largest = max(own.values())
    if rank is not None and rank < largest:
        raise ConfigError(f"rank={rank} is less than the rank {largest} that the adapter has: it can only be padded.")
    one = written_rank(rank or largest, row)
    if one is None or one > most or (rank is not None and one != rank):
        takes = f"ranks {listed(map(str, row.ranks))}" if row.ranks else f"at most rank {row.most_rank}"
        takes = takes if row.most_rank == most else f"here at most rank {most}"
        raise AdapterFormatError(f"{row.title} takes {takes}; this adapter would have rank {one or rank or largest}")
    return dict.fromkeys(own, one) if row.one_rank or rank is not None else dict(own)


def _config(
    parts: Parts,
    config: Any,
    ranks: Mapping[str, int],
    alphas: Mapping[str, float],
    modules_to_save: list[str] | None,
    bias: str,
    added: bool = False,
) -> dict[str, Any]:
    own = config.target_modules
    narrowed = config.exclude_modules or config.layers_to_transform is not None or added
    # With ensure_weight_tying, PEFT adapts two tied layers and names only one of them.
    narrowed = narrowed or not all(name_matches(own, name) for name in ranks)
    # The old list is shorter, and is kept if it still selects the same; the names of all modules need no other field.
    targets = sorted(own) if isinstance(own, list) and not narrowed else sorted(ranks)
    return to_peft(
        replace(config, bias=bias),
        ranks=ranks,
        alphas=alphas,
        target_modules=targets,
        modules_to_save=modules_to_save or None,
        fan_in_fan_out=parts.is_transposed,
        task_type=parts.data.get("task_type"),
        base_model_name_or_path=base_id(parts.data.get("base_model_name_or_path")),
        revision=parts.data.get("revision"),
    )


def _entries(patterns: str | list[str] | None) -> list[str]:
    return [patterns] if isinstance(patterns, str) else patterns or []


def _changes(
    parts: Parts, row: Consumer, modules: Mapping[str, Lowered], alpha: float, config: Mapping[str, Any]
) -> list[str]:
    changes = []
    folded = sum(m.factor != 1.0 for m in modules.values())
    padded = sum(m.rank > m.rank_before for m in modules.values() if m.worst is None and not m.added)
    zeros = sum(m.added for m in modules.values())
    dora = sum(m.worst is not None for m in modules.values())
    if parts.config.use_rslora or parts.config.alpha_pattern or folded or alpha != parts.config.alpha:
        ranks = {m.rank for m in modules.values()}
        scale = f"one scale of {alpha / min(ranks):g}" if len(ranks) == 1 else "alpha / rank everywhere"
        rest = f"; what was left of the scales of {folded} {_modules(folded)} went into B" if folded else ""
        changes.append(f"lora_alpha: {alpha:g}, {scale}{rest}")
    if padded:
        changes.append(f"rank: {padded} {_modules(padded)} padded with zeros")
    if dora:
        changes.append(f"DoRA: {dora} {_modules(dora)} as plain pairs, by truncated SVD of the change of the weight")
    if zeros:
        changes.append(
            f"layers: {zeros} {_modules(zeros)} added as zeros, so that {row.title} takes the others of their kind"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        if parts.data.get(field) and not config[field]:
            changes.append(f"{field}: not needed any more")
    if parts.base:
        changes.append(f"left out, the same as the base's: {listed(map(peft.base_name, parts.base))}")
    return changes


def _modules(number: int) -> str:
    return "module" if number == 1 else "modules"


def _cleaned(parts: Parts, config: Mapping[str, Any]) -> list[str]:
    """The lines of the report for changes that concern only names."""
    changes = []
    if config["target_modules"] != parts.data.get("target_modules"):
        changes.append("target_modules: a list of names")
    if dropped := [field for field, value in parts.data.items() if field not in config and value]:
        changes.append(f"fields left out, which are not known here: {listed(dropped)}")
    if parts.renamed:
        changes.append(f"keys: {parts.renamed} without the adapter's name in them")
    return changes


def _notes(
    parts: Parts, row: Consumer, config: Mapping[str, Any], modules: Mapping[str, Lowered], facts: BaseFacts
) -> list[str]:
    notes = []
    if row.needs_base_id and config["base_model_name_or_path"] is None:
        notes.append(f"{CONFIG} names no base on the Hub: give {row.title}'s converter its folder, with --base")
    if row.tried and facts.architecture not in row.tried:
        names = listed([name.removesuffix("ForCausalLM") for name in row.tried])
        what = f"not with {facts.architecture}" if facts.architecture else "and this base is not known (pass base=)"
        notes.append(f"{row.title} was tried with {names}, {what}: compare a few answers before you rely on it")
    largest = max(m.rank for m in modules.values())
    if row.usual_limit is not None and largest > row.usual_limit:
        limit = next(rank for rank in row.limits if rank >= largest)
        notes.append(f"start {row.title} with {row.flag} {limit}: otherwise it takes ranks up to {row.usual_limit}")
    if row.ranks is not None and largest < 64:
        many = f"{row.title} on more than {largest // 8} GPU{'s' if largest > 8 else ''}"
        notes.append(f"{many}: export again with rank= of at least 8 for each, or it gets the scales wrong")
    if parts.ambiguous:
        first = f"entries of alpha_pattern disagree for {listed(parts.ambiguous)}"
        notes.append(f"{first}: the first in the file was taken, as PEFT takes it")
    return notes
