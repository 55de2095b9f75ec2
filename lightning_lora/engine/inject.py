"""Put adapters into a model, and take them out again.

`inject` checks everything first and changes the model after, so a call that raises leaves it as it was. What it needs
to undo itself, and which parameters it left trainable, it keeps in an `Injection` on the module it was given.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.layers.alora import check_readers, listen, stop_listening
from lightning_lora.engine.layers.base import is_adapter
from lightning_lora.engine.layers.fresh import Measured, check_measured, drawing_on, fresh_tensors
from lightning_lora.engine.layers.frozen import (
    FrozenNorm,
    freeze_statistics,
    has_running_statistics,
    may_have_running_statistics,
    release_statistics,
)
from lightning_lora.engine.layers.quantized import keep_in_place, let_rearrange, may_rearrange, rearranges
from lightning_lora.engine.layers.swapping import check_removable, swap, swap_back
from lightning_lora.engine.layers.tokens import TokenRows
from lightning_lora.engine.plan import planned, variants_of
from lightning_lora.engine.report import InjectionReport, rows
from lightning_lora.engine.sharded import check_unsharded
from lightning_lora.engine.storage import shape_of
from lightning_lora.engine.targets import Selection, select
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.vocabulary import token_tensors, vocabulary
from lightning_lora.engine.wrappers import plain_name, tensors_by_plain_name
from lightning_lora.errors import AdapterStateError, TargetError, listed

_RECORD = "lora_injection"


@dataclass
class Injection:
    """What `inject` left on the module it was given. Names are relative to that module."""

    config: LoRAConfig
    was_trainable: frozenset[str]
    """Parameters that required grad before, by their names without wrappers."""
    originals: dict[str, Tensor] = field(default_factory=dict)
    """Values before training of the parameters and buffers that are trained whole: `remove` puts them back."""
    head: str | None = None
    frozen_norms: tuple[str, ...] = ()
    """Norms whose running statistics were frozen."""
    kept_in_place: tuple[str, ...] = ()
    """4-bit layers without an adapter that were kept from rearranging their weights."""
    awaits_start: bool = False
    """Whether A and B are zero still: neither started nor loaded."""
    adapted: dict[str, nn.Module] = field(default_factory=dict, repr=False)
    """The adapted modules by their names without wrappers, for `check_as_injected`; not the module itself that the
    record lies on."""
    report: InjectionReport | None = field(default=None, repr=False)
    """What `inject` returned."""

    @property
    def trained_whole(self) -> list[str]:
        """Names of the parameters and buffers that are trained, and saved, beside A and B."""
        return list(self.originals)


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    measured: Measured | None = None,
    start: bool = True,
) -> InjectionReport:
    """Adapt `model` in place, and freeze all but the adapters (and what the config trains besides).

    The outputs of the model do not change, since the update starts at zero. Raises TargetError where a pattern matches
    nothing or a module cannot be adapted, AdapterStateError where the model has adapters already; the model is then as
    it was. Returns a report, whose text is a table.

    `measured` is what an initialiser that starts from data asks for (see `calibration`). With `start=False` the
    adapters stay zero: for tensors that are loaded right after, or for `start_adapters`. So do those of a model on the
    meta device: materialise it (`to_empty`, or `load_state_dict(..., assign=True)`), load its weights, and then start
    them.
    """
    config, tree = config or LoRAConfig(), Tree.of(model)
    _check_unadapted(model, tree)
    selection = select(model, config, tree)
    _check_shared_weights(model, selection)
    plan = planned(selection.targets, config)
    if config.alora_invocation_tokens:
        check_readers(model)
    vocabularies = vocabulary(model, config, selection)
    measured = measured or {}
    if start:
        check_measured(config, [target.name for target in selection.targets], measured)
    whole = tensors_trained_whole(model, config, selection)
    wasteful = [target.names_of(name)[0] for target, kind in plan if kind.wasteful for name in kind.wasteful]
    if wasteful:  # said before anything is changed, since a warning can be made an error
        warnings.warn(
            f"A rank above a layer's smaller side is legal but wasteful, since B A cannot have a higher one: "
            f"{listed(wasteful)}. Lower rank, or set rank_pattern.",
            stacklevel=2,
        )

    start = start and not any(kind.is_on_meta for _, kind in plan)
    saved_modules = {id(m) for saved in selection.saved.values() for m in saved.modules()}
    targeted = {id(target.module) for target in selection.targets}
    injection = Injection(
        config=config,
        was_trainable=frozenset(plain_name(name) for name, p in tree.parameters if p.requires_grad),
        originals={name: t.detach().clone() for name, t in whole.items()},
        head=selection.head,
        frozen_norms=tuple(
            name
            for name, m in tree.of_classes(may_have_running_statistics)
            if has_running_statistics(m) and id(m) not in saved_modules
        ),
        kept_in_place=tuple(
            name for name, m in tree.of_classes(may_rearrange) if rearranges(m) and id(m) not in targeted
        ),
        awaits_start=not start,
        adapted={
            plain_name(name): module
            for name, module in (*((t.name, t.module) for t in selection.targets), *(v[:2] for v in vocabularies))
            if module is not model
        },
    )
    tensors: list[dict[str, Tensor]] = []
    for device, steps in groupby(plan, key=lambda step: step[1].device):
        with drawing_on(device):
            tensors += [
                fresh_tensors(target.module, kind.recipes, measured.get(target.name), start=start)
                for target, kind in steps
            ]
    tokens = [token_tensors(module, spec, config) for _, module, _, spec in vocabularies]
    # Nothing below can fail for a reason in the model or the config.
    parameters = {id(p): p for _, p in tree.parameters}
    tied = weight_users(tree.modules) if len(parameters) < len(tree.parameters) else {}
    adapted = tuple(rows(plan, tensors, tied))
    trained = {id(t) for t in whole.values()}
    trainable = frozen = 0
    for key, p in parameters.items():
        is_trained = key in trained
        if p.requires_grad is not is_trained:
            p.requires_grad_(is_trained)
        if is_trained:
            trainable += p.numel()
        else:
            frozen += p.numel() if type(p) is nn.Parameter else math.prod(shape_of(p))
    variants = variants_of(config)
    for (target, kind), own in zip(plan, tensors):
        swap(target.module, (*variants, kind.geometry) if variants else kind.geometry, kind.spec, own)
    for (_, module, rows_of_tokens, spec), own in zip(vocabularies, tokens):
        swap(module, rows_of_tokens, spec, own)
    if config.alora_invocation_tokens:
        listen(model, config.alora_invocation_tokens)
    for name in injection.frozen_norms:
        freeze_statistics(model.get_submodule(name))
    for name in injection.kept_in_place:
        keep_in_place(model.get_submodule(name))
    model.__dict__[_RECORD] = injection
    of_tokens = (t for own in tokens for t in own.values())
    fresh = (t for own in tensors for t in own.values() if isinstance(t, nn.Parameter) and not t.requires_grad)
    injection.report = InjectionReport(
        modules=adapted,
        trained_whole=tuple(injection.trained_whole),
        head=injection.head,
        left_out=selection.left_out,
        tokens={name: len(module.lora.tokens) for name, module, _, _ in vocabularies if isinstance(module, TokenRows)},
        trainable=trainable + sum(m.parameters for m in adapted) + sum(t.numel() for t in of_tokens),
        frozen=frozen + (sum(t.numel() for t in fresh) if config.freeze_a else 0),
    )
    return injection.report


def remove(model: nn.Module) -> None:
    """Take the adapters out of `model`: the base as it was before `inject`, bit for bit, trainable as it was.

    Raises AdapterStateError where `inject` was not called on this very module, or where the model was changed since in
    a way that cannot be undone; nothing is changed then.
    """
    injection_of(model)
    tree = Tree.of(model)
    check_removable(model, tree)
    adapted: Any = [module for _, module in tree.of_classes(is_adapter)]
    if not adapted and _are_there(model, tree):
        raise AdapterStateError(f"{type(model).__name__} is merged: leave `with merged(model)` before you remove.")
    # Innermost first: what an inner `inject` found was already frozen by the outer one.
    records = [(m, m.__dict__[_RECORD]) for _, m in tree.modules if _RECORD in m.__dict__][::-1]
    restored = [_where_to_restore(owner, injection) for owner, injection in records]
    for module in adapted:
        swap_back(module)
    with torch.no_grad():
        for tensor, original in (pair for pairs in restored for pair in pairs):
            tensor.copy_(original)
    for owner, injection in records:
        release(owner, injection)


def _where_to_restore(model: nn.Module, injection: Injection) -> list[tuple[Tensor, Tensor]]:
    """The tensors that are trained whole, each with its value before."""
    if not injection.originals:
        return []
    tensors = {name: tensor for name, (_, tensor) in tensors_by_plain_name(model).items()}
    originals = {plain_name(name): original for name, original in injection.originals.items()}
    changed = [
        name for name, original in originals.items() if name not in tensors or tensors[name].shape != original.shape
    ]
    if changed:
        raise AdapterStateError(
            f"{listed(changed)} of {type(model).__name__} was replaced after inject, so its old value has no place to "
            "go back to. Call remove before you change the model's modules."
        )
    return [(tensors[name], original) for name, original in originals.items()]


def release(model: nn.Module, injection: Injection) -> None:
    """Undo the freezing of `inject`, once the adapters are gone."""
    if injection.config.alora_invocation_tokens:
        stop_listening(model)
    tree = Tree.of(model)
    by_name = injection.frozen_norms or injection.kept_in_place
    modules = {plain_name(name): module for name, module in tree.every} if by_name else {}
    for name in map(plain_name, injection.frozen_norms):
        norm = modules.get(name)
        if isinstance(norm, FrozenNorm):  # not so if it was replaced since, by SyncBatchNorm for example
            release_statistics(norm)
    for name in map(plain_name, injection.kept_in_place):
        if name in modules:
            let_rearrange(modules[name])
    for name, p in tree.parameters:
        if p.requires_grad is not (was_trainable := plain_name(name) in injection.was_trainable):
            p.requires_grad_(was_trainable)
    for _, p in tree.parameters:
        if not p.requires_grad and p.grad is not None:
            p.grad = None
    del model.__dict__[_RECORD]


def injection_of(model: nn.Module) -> Injection:
    """The record of `inject` on this very module; raises AdapterStateError where there is none."""
    injection = model.__dict__.get(_RECORD)
    if injection is None:
        inside = [name for name, m in model.named_modules() if _RECORD in m.__dict__]
        hint = f" It was called on its submodule {inside[0]!r}: pass that one." if inside else ""
        raise AdapterStateError(f"{type(model).__name__} was not adapted: inject was not called on it.{hint}")
    return injection


def injections(model: nn.Module, tree: Tree | None = None) -> Iterator[tuple[str, Injection]]:
    """The records of `inject` on `model` and on modules inside it, each with the name of its module; `tree` is what
    `model` consists of, if known."""
    for name, module in (tree or Tree.of(model)).modules:
        if _RECORD in module.__dict__:
            yield name, module.__dict__[_RECORD]


def _are_there(model: nn.Module, tree: Tree) -> bool:
    """Whether a layer that `inject` adapted, called on `model`, is still a part of it: as its own, if it is merged."""
    adapted = model.__dict__[_RECORD].adapted.values()
    return not adapted or not {id(m) for m in adapted}.isdisjoint(id(m) for _, m in tree.modules)


def _check_unadapted(model: nn.Module, tree: Tree) -> None:
    present = [name for name, _ in tree.of_classes(is_adapter)]
    if present:
        raise AdapterStateError(
            f"{type(model).__name__} has adapters already ({listed(present, 3)}). "
            "Call remove(model) or merge(model) first; AdapterBank holds several adapters on one base."
        )
    for name, module in tree.modules:
        if _RECORD in module.__dict__:
            what = f"{type(model).__name__}{f' ({name!r} in it)' if name else ''}"
            if _are_there(module, Tree.of(module)):
                raise AdapterStateError(f"{what} is merged: leave `with merged(model)` before you inject.")
            raise AdapterStateError(
                f"All adapted layers of {what} were replaced since inject: call remove on it first."
            )
    check_unsharded(
        model,
        "Adapters that came now would be no part of what is sharded, and each process would train its own. Call inject "
        "first, and fully_shard (or parallelize_module, or FSDP) after.",
        tree,
    )
    unusual = tree.parameters if tree.classes_of_parameters - {nn.Parameter} else ()
    lazy = [name for name, p in unusual if nn.parameter.is_lazy(p)]
    if lazy:
        raise TargetError(f"{listed(lazy)} of {type(model).__name__} has no shape yet: run one batch through it first.")


def tensors_trained_whole(model: nn.Module, config: LoRAConfig, selection: Selection) -> dict[str, Tensor]:
    """Parameters and persistent buffers that are trained whole, under the first name of each."""
    inside = {id(m) for saved in selection.saved.values() for m in saved.modules()}
    adapted = {id(t.module) for t in selection.targets}
    whole: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in model.named_modules() if inside or config.bias != "none" else ():
        saved = id(module) in inside
        for name, p in module.named_parameters(recurse=False):
            wanted = config.bias == "all" or (config.bias == "lora_only" and id(module) in adapted)
            if (saved or (wanted and "bias" in name)) and id(p) not in seen:
                full = f"{prefix}.{name}" if prefix else name
                if not p.is_floating_point():
                    raise TargetError(f"{full!r} cannot be trained: it holds {p.dtype} values (quantized weights).")
                seen.add(id(p))
                whole[full] = p
        if saved:
            for name, buffer in module.named_buffers(recurse=False):
                if name not in module._non_persistent_buffers_set:
                    whole[f"{prefix}.{name}" if prefix else name] = buffer
    if config.bias != "none" and not any("bias" in name.rpartition(".")[2] for name in whole):
        raise TargetError(f"bias={config.bias!r} trains no parameter: {type(model).__name__} has no such bias.")
    return whole


def _check_shared_weights(model: nn.Module, selection: Selection) -> None:
    """Refuse to train a weight whole that another module uses as well: that one would change unasked."""
    inside = {id(m) for saved in selection.saved.values() for m in saved.modules()}
    own = {id(p): name for name, module in selection.saved.items() for p in module.parameters()}
    for name, module in model.named_modules() if own else ():
        if id(module) in inside:
            continue
        for p in module.parameters(recurse=False):
            if id(p) in own:
                raise TargetError(
                    f"modules_to_save: {own[id(p)]!r} shares its weight with {name!r} (tied weights), which would be "
                    f"trained with it. Name both in modules_to_save, or untie them first."
                )


def weight_users(modules: Iterable[tuple[str, nn.Module]]) -> dict[int, list[tuple[str, nn.Module]]]:
    """Which of `modules` hold each parameter directly, by its identity: more than one where weights are tied."""
    users: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, module in modules:
        for p in {id(p) for p in module._parameters.values() if p is not None}:
            users.setdefault(p, []).append((name, module))
    return users
