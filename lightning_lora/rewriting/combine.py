"""Combines adapters (folders, or ids on the Hub) into one, written as a folder in PEFT's format; needs no model."""

from __future__ import annotations

import functools
import os
import re
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Generator, Tensor
from torch.nn import functional as F

from lightning_lora.checked import number, one_of, share, whole
from lightning_lora.engine import LoRAConfig
from lightning_lora.engine.combine import DENSE, METHODS, Combined, Term, combine
from lightning_lora.engine.layers.pair import as_blocks, from_blocks
from lightning_lora.engine.low_rank import product_change
from lightning_lora.engine.memory import largest
from lightning_lora.engine.targets import name_matches
from lightning_lora.errors import AdapterFormatError, ConfigError, listed
from lightning_lora.format import peft
from lightning_lora.format.config import to_peft
from lightning_lora.format.folder import write_adapter
from lightning_lora.format.inspection import LARGEST_SCALE
from lightning_lora.hub.address import base_id, local_path
from lightning_lora.hub.card import RunFacts, model_card
from lightning_lora.hub.pull import adapter_folder
from lightning_lora.rewriting.combinable import (
    CombinedModule,
    CombineReport,
    check_bases,
    check_combinable,
    groups_of,
    of_combination,
)
from lightning_lora.rewriting.lowering import least_change
from lightning_lora.rewriting.parts import Pair, Parts, check_target, parts_of
from lightning_lora.rewriting.written import check_written

# Names of methods in PEFT and elsewhere -> what the error says about them.
_ELSEWHERE = {
    "cat": "That is 'sum' here.",
    "task_arithmetic": "That is 'sum' here, or 'svd' for a smaller rank.",
    "linear": "Adding up factors mixes the A of one adapter with the B of another; 'sum' adds the updates, exactly.",
    "ties_svd": "That is 'ties' here.",
    "dare_linear": "That is 'dare' here.",
    "dare_linear_svd": "That is 'dare' here.",
    "dare_ties_svd": "That is 'dare_ties' here.",
}


def combine_adapters(
    adapters: Sequence[str | os.PathLike[str]],
    folder: str | os.PathLike[str],
    *,
    weights: Sequence[float],
    method: str = "sum",
    rank: int | None = None,
    density: float | None = None,
    seed: int = 0,
    check_base: bool = True,
    ignore_fields: Collection[str] = (),
) -> CombineReport:
    """Combine `adapters` (folders in PEFT's format, or ids on the Hub), each times its weight, into one in `folder`.

    Every method works on the updates of the weights, dW = scale * B A, module by module; their definitions are in
    lightning_lora/engine/combine.py. A negative weight takes away what an adapter learned; an adapter with weight 0 is
    left out.

    `method` is "sum" (the weighted sum, exact, with the sum of the ranks), "svd" (the closest to that sum with `rank`),
    or, on a base that several skills are to share, "ties", "dare" or "dare_ties". These keep the share `density` of
    each update, in (0, 1], and the result is cut to `rank`, which loses more than it does for "svd". `rank` is by
    default the largest of the adapters; `seed` decides what DARE drops. The report says how much was cut off.

    Ranks, alphas, targets, scalings and precisions may differ: the combination is computed in float32 or wider, and
    saved in the widest dtype of the files. Modules and biases that were trained whole must be the same in all.
    `ignore_fields` are unknown fields of the configs that are ignored and left out even if they have a value.
    Everything is checked before anything is computed. Raises AdapterFormatError for an adapter that is damaged or
    cannot be combined (DoRA, other shapes), BaseMismatchError where two were trained on different bases
    (`check_base=False` combines them all the same), ConfigError for an invalid argument, HubError where something
    cannot be fetched, CheckpointError where files cannot be read or written.
    """
    weights = _checked_weights(adapters, weights)
    _check_method(method, rank, density, seed)
    target = local_path(folder)
    used = [(source, weight) for source, weight in zip(adapters, weights) if weight]
    folders = [adapter_folder(source, ignore_fields=ignore_fields) for source, _ in used]
    if target.exists() and not target.is_dir():
        raise ConfigError(f"{str(target)!r} is a file: an adapter is written as a folder. Choose another name.")
    check_target(target, [*folders, *map(local_path, adapters)])
    names = _names([source for source, _ in used])
    parts = {name: parts_of(place, ignore_fields) for name, place in zip(names, folders)}
    weight_of = {name: weight for name, (_, weight) in zip(names, used)}
    check_combinable(parts, weight_of)
    if check_base:
        check_bases(parts)
    modules = list(dict.fromkeys(module for one in parts.values() for module in one.pairs))
    _check_rank(rank, modules, parts)

    generator = torch.Generator().manual_seed(seed)
    combined = {module: _combined(module, parts, weight_of, method, rank, density, generator) for module in modules}
    written = _written(combined, parts, weight_of, method)
    first = next(iter(parts.values()))
    keys = first.tensor_keys(written.pairs)
    tensors = {key: t for m, pair in written.pairs.items() for key, t in zip(keys[m], (pair.A, pair.B))}
    tensors |= _whole(parts, written.pairs)
    config = _config(parts, written)
    settings = {"rank": rank, "density": density, "seed": seed if method.startswith("dare") else None}
    how = ", ".join([method, *(f"{key} {value:g}" for key, value in settings.items() if value is not None)])
    report = CombineReport(
        folder=target,
        method=how,
        adapters=tuple(weight_of.items()),
        modules=written.report,
        alpha=written.alpha,
        notes=tuple(_notes(first, config)),
    )
    # The name of the base inside the model that was trained, if it was the same for all adapters.
    module = _common([one.note.get("module") or "" for one in parts.values()]) or ""
    card = _card(config, report, module, sum(t.numel() for t in tensors.values()))
    write_adapter(target, config, tensors, _note(parts, module, report), card)
    if method in ("sum", "svd"):
        check_written(target, parts, weight_of, {name: m.error * m.norm for name, m in written.report.items()})
    return report


# Arguments.


def _checked_weights(sources: Any, weights: Any) -> list[float]:
    if isinstance(sources, (str, os.PathLike)) or not sources:
        raise ConfigError(f"The adapters to combine are a list of folders or ids on the Hub, not {sources!r}.")
    if strange := [source for source in sources if not isinstance(source, (str, os.PathLike))]:
        raise ConfigError(f"The adapters to combine are folders or ids on the Hub; {strange[0]!r} is neither.")
    if isinstance(weights, (int, float, str)) or len(weights) != len(sources):
        raise ConfigError(f"weights has a number for each of the {len(sources)} adapters; {weights!r} has not.")
    for weight in weights:
        number("each of weights", weight)
    if not any(weights):
        raise ConfigError(f"weights is {list(weights)!r}: nothing would be left.")
    return [float(weight) for weight in weights]


def _check_method(method: Any, rank: Any, density: Any, seed: Any) -> None:
    one_of("method", method, METHODS, hint=_ELSEWHERE.get(str(method), ""))
    if rank is not None:
        whole("rank", rank)
        if method == "sum":
            raise ConfigError(f"'sum' is exact and has the sum of the ranks: for rank={rank}, use method='svd'.")
    if method not in DENSE and density is not None:
        raise ConfigError(f"density is a setting of {listed(map(repr, DENSE))}; {method!r} keeps everything.")
    if method in DENSE and density is None:
        raise ConfigError(f"{method!r} needs a density, the share of each update that is kept: TIES took 0.2.")
    if density is not None:
        share("density", density)
    if whole("seed", seed, least=0) >= 2**63:
        raise ConfigError(f"seed is a whole number below 2^63, not {seed!r}.")


def _check_rank(rank: int | None, modules: list[str], adapters: Mapping[str, Parts]) -> None:
    for module in modules if rank is not None else ():
        groups = groups_of(_any_pair(module, adapters))
        if rank is not None and rank % groups:
            raise ConfigError(f"rank={rank} is no multiple of {groups}, the groups of the convolution {module!r}.")


def _names(sources: list[str | os.PathLike[str]]) -> list[str]:
    """Names of the adapters for the card: an id on the Hub, or a folder without its path, as others read the card."""
    names: list[str] = []
    for source in sources:
        path = Path(source).expanduser()
        name = str(source)
        if path.exists() or not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
            path = path.absolute()
            # Every run calls its folder "adapter".
            name = f"{path.parent.name}/{path.name}" if path.name == "adapter" else path.name
        again = sum(other == name or other.startswith(f"{name} (") for other in names)
        names.append(f"{name} ({again + 1})" if again else name)
    return names


# Modules.


def _any_pair(module: str, adapters: Mapping[str, Parts]) -> Pair:
    return next(parts.pairs[module] for parts in adapters.values() if module in parts.pairs)


def _combined(
    module: str,
    adapters: Mapping[str, Parts],
    weights: Mapping[str, float],
    method: str,
    rank: int | None,
    density: float | None,
    generator: Generator,
) -> Combined:
    terms = [_term(parts.pairs[module], weights[name]) for name, parts in adapters.items() if module in parts.pairs]
    groups = terms[0].A.shape[0]
    most = None if rank is None else rank // groups
    return combine(terms, method, rank=most, density=density or 1.0, generator=generator)


def _term(pair: Pair, weight: float) -> Term:
    """The pair with A as (groups, r, in) and B as (groups, out, r), for every geometry."""
    A, B = as_blocks(pair.A, pair.B, pair.rank)
    return Term(A, B, pair.scale, weight)


class _Written(NamedTuple):
    pairs: dict[str, Pair]
    alpha: float
    report: dict[str, CombinedModule]


def _written(
    combined: Mapping[str, Combined], adapters: Mapping[str, Parts], weights: Mapping[str, float], method: str
) -> _Written:
    """The combinations in the precision of the file, with one alpha, since many programs read no alpha_pattern."""
    dtypes = [t.dtype for parts in adapters.values() for pair in parts.pairs.values() for t in (pair.A, pair.B)]
    dtype = functools.reduce(torch.promote_types, dtypes)
    ranks = _ranks(combined, adapters)
    alpha = _alpha(combined, adapters, weights, method, ranks)
    pairs, report, overflowing = {}, {}, []
    for module, c in combined.items():
        like, rank = _any_pair(module, adapters), ranks[module]
        groups, scale = groups_of(like), alpha / ranks[module]
        A, B = c.A.to(dtype), (c.B.double() / scale).to(dtype)
        if not (c.norm <= largest(dtype) and bool(torch.isfinite(A).all() and torch.isfinite(B).all())):
            overflowing.append(module)
        rounded = product_change(c.B, c.A, scale * B.double(), A)
        more = rank // groups - A.shape[-2]
        A, B = F.pad(A, (0, 0, 0, more)), F.pad(B, (0, more))
        A, B = from_blocks(A, B, like.A, like.B, like.rank)
        pairs[module] = Pair(A=A, B=B, alpha=alpha, scale=scale, is_embedding=like.is_embedding)
        report[module] = CombinedModule(
            ranks=tuple(parts.pairs[module].rank if module in parts.pairs else None for parts in adapters.values()),
            rank=rank,
            norm=c.norm,
            error=c.error + (rounded / c.norm if c.norm else 0.0),
        )
    if overflowing:
        raise AdapterFormatError(
            f"The combination has values in {listed(overflowing)} that are too large for "
            f"{str(dtype).removeprefix('torch.')}, the precision of its adapters: take smaller weights. Nothing was "
            "written."
        )
    return _Written(pairs, alpha, report)


def _ranks(combined: Mapping[str, Combined], adapters: Mapping[str, Parts]) -> dict[str, int]:
    """The ranks to write. If each adapter has one rank for all modules, the combination gets one too, padded with
    zeros: vLLM and others ignore a rank_pattern, and then scale wrongly. Otherwise each module keeps its own rank."""
    own = {module: c.A.shape[0] * c.A.shape[-2] for module, c in combined.items()}
    if any(len({pair.rank for pair in parts.pairs.values()}) > 1 for parts in adapters.values()):
        return own
    most = max(own.values())
    return {module: rank if most % combined[module].A.shape[0] else most for module, rank in own.items()}


def _alpha(
    combined: Mapping[str, Combined],
    adapters: Mapping[str, Parts],
    weights: Mapping[str, float],
    method: str,
    ranks: Mapping[str, int],
) -> float:
    """The alpha with the `least_change`. A single adapter with weight 1 keeps its alpha; with -1, its B change sign."""
    if method == "sum":
        scales = [
            (module, abs(pair.scale * weights[name]))
            for name, parts in adapters.items()
            for module, pair in parts.pairs.items()
        ]
    else:
        scales = [(module, 1.0) for module in combined]
    # Thirteen digits, so that 0.7 * 2 * 16 reads 22.4.
    wanted = Counter(float(f"{scale * ranks[module]:.13g}") for module, scale in scales)
    allowed = [alpha for alpha in wanted if 0 < alpha / min(ranks.values()) <= LARGEST_SCALE]
    return least_change(wanted, allowed) if allowed else float(max(ranks.values()))


# Makes what is written beside the pairs: tensors trained whole, the config, the note and the card.


def _whole(adapters: Mapping[str, Parts], pairs: Mapping[str, Pair]) -> dict[str, Tensor]:
    """Tensors that were trained whole, and weights of the base that PEFT wrote too: equal in all adapters with them.

    Their keys are made anew: a key depends on which modules are adapted, and the combination may adapt more of them.
    """
    found: dict[str, Tensor] = {}
    for parts in adapters.values():
        for key, tensor in {**parts.saved, **parts.biases, **parts.base}.items():
            found.setdefault(peft.tensor_key(peft.base_name(key), pairs, ()), tensor)
    return found


def _config(adapters: Mapping[str, Parts], written: _Written) -> dict[str, Any]:
    every = list(adapters.values())
    first = every[0]
    targets, selection = _targets(every, sorted(written.pairs))
    based = [(base_id(p.data.get("base_model_name_or_path")), p.data.get("revision")) for p in every]
    base, revision = next(((name, revision) for name, revision in based if name), (None, None))
    if any(r != revision for name, r in based if name):
        revision = None
    ranks = {module: pair.rank for module, pair in written.pairs.items()}
    config = to_peft(
        LoRAConfig(
            rank=max(ranks.values()),
            alpha=written.alpha,
            dropout=_common([p.config.dropout for p in every]) or 0.0,
            bias=first.config.bias,
        ),
        ranks=ranks,
        alphas=dict.fromkeys(ranks, written.alpha),
        target_modules=targets,
        modules_to_save=first.data.get("modules_to_save"),
        fan_in_fan_out=any(p.data.get("fan_in_fan_out") for p in every),
        task_type=_common([p.data.get("task_type") for p in every]),
        base_model_name_or_path=base,
        revision=revision,
    )
    return {**config, **selection}


_SELECTION = ("exclude_modules", "layers_to_transform", "layers_pattern")


def _targets(every: list[Parts], modules: list[str]) -> tuple[str | list[str], dict[str, Any]]:
    """target_modules for `modules`, all those that any adapter adapts, and the fields that restrict it."""
    entries = [parts.config.target_modules for parts in every]
    fields = [{field: getattr(parts.config, field) for field in _SELECTION} for parts in every]
    lists = [entry for entry in entries if isinstance(entry, list)]
    union = sorted({name for names in lists for name in names})
    is_named = len(lists) < len(every) or all(name_matches(union, name) for name in modules)  # tied layers may not be
    if len(lists) == len(every) and not any(any(f.values()) for f in fields) and is_named:
        return union, {}
    if is_named and all(entry == entries[0] and field == fields[0] for entry, field in zip(entries, fields)):
        return entries[0], {field: every[0].data.get(field) for field in _SELECTION}
    # In a list, "fc" would select every module of the model whose name ends in it.
    return "|".join(re.escape(name) for name in modules) or "^$", {}


def _common(values: list[Any]) -> Any:
    """The value that all `values` have; None where they differ."""
    return values[0] if all(value == values[0] for value in values) else None


def _note(adapters: Mapping[str, Parts], module: str, report: CombineReport) -> dict[str, Any]:
    base = next((parts.note for parts in adapters.values() if parts.note.get("base_fingerprint")), {})
    return {
        "version": version("lightning-lora"),
        "module": module,
        **{key: base[key] for key in ("base_fingerprint", "base_dtypes") if key in base},
        "combined": {"method": report.method, "adapters": [list(entry) for entry in report.adapters]},
    }


def _card(config: Mapping[str, Any], report: CombineReport, module: str, parameters: int) -> str:
    facts = RunFacts(
        notes={
            "combined from": ", ".join(f"{weight:g} x `{name}`" for name, weight in report.adapters),
            "combined by": report.method,
            "error": f"{of_combination(report.error)} (Frobenius norm)",
        }
    )
    return model_card(config, modules=len(report.modules), parameters=parameters, module=module, run=facts)


def _notes(first: Parts, config: Mapping[str, Any]) -> list[str]:
    notes = []
    if first.saved or first.biases:
        names = sorted(peft.base_name(key) for key in (*first.saved, *first.biases))
        notes.append(f"trained whole and the same in all, so kept without a weight: {listed(names)}")
    if config["rank_pattern"]:
        notes.append(
            "the ranks of the modules differ, which vLLM and LoRAX would get wrong: for them, run lightning-lora export"
        )
    return notes
