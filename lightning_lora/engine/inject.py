"""Puts adapters into a model, and takes them out again.

`inject` checks everything first and changes the model after, so a call that raises leaves the model as it was. It
leaves an `Injection` on the module it was given: the record from which `remove` undoes the injection.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig, check_is_config
from lightning_lora.engine.forwards import listen_for_forwards, swapping, unlisten_for_forwards
from lightning_lora.engine.layers.alora import check_readers, listen, stop_listening
from lightning_lora.engine.layers.base import adapt, is_adapter, unadapt
from lightning_lora.engine.layers.embedding import TokenRows
from lightning_lora.engine.layers.fresh import Measured, check_measured, drawing_on
from lightning_lora.engine.layers.frozen import (
    FrozenNorm,
    freeze_statistics,
    has_running_statistics,
    may_have_running_statistics,
    read_as_held,
    release_statistics,
)
from lightning_lora.engine.layers.quantized import is_kept, keep_in_place, let_go, may_be_kept
from lightning_lora.engine.plain_names import with_plain_names
from lightning_lora.engine.plan import planned
from lightning_lora.engine.present import (
    RECORD,
    Injection,
    are_merged,
    check_none_of_ours,
    check_removable,
    injection_of,
)
from lightning_lora.engine.report import InjectionReport, rows
from lightning_lora.engine.targets import check_shared, select, tensors_trained_whole
from lightning_lora.engine.torch_private import check_overridden
from lightning_lora.engine.tree import Tree, weight_users
from lightning_lora.engine.vocabulary import token_tensors, vocabulary
from lightning_lora.engine.weights import check_unsharded, shape_of
from lightning_lora.errors import AdapterStateError, TargetError, listed


def inject(
    model: nn.Module,
    config: LoRAConfig | None = None,
    *,
    measured: Measured | None = None,
    start: bool = True,
) -> InjectionReport:
    """Adapt `model` in place, and freeze everything but the adapter.

    The outputs of the model do not change, since every update starts at zero (but for init="loftq"). After the call
    only A and B train, and what the config names besides: modules_to_save, biases, token rows. A call that raises
    leaves the model as it was.

    Args:
        model: Any nn.Module. It is changed in place.
        config: What to adapt, and how. None stands for LoRAConfig().
        measured: For an init that starts from measurements ("eva", "corda", "lora_ga", "loftq"): layer name -> letter
            -> matrix in float32, as `calibrate` and `residuals` in lightning_lora.engine.calibration return it.
        start: False leaves A and B at zero, for tensors that are loaded right after, or for `start_adapters`. A model
            on the meta device is always left so: materialise it (`to_empty`, or `load_state_dict(..., assign=True)`),
            load its weights, and call `start_adapters`.

    Returns:
        A report of the adapted modules, and of the numbers of trained and frozen elements. Its text is a table.

    Raises:
        ConfigError: `config` is no LoRAConfig, or `measured` lacks a matrix that the init needs.
        TargetError: An entry of the config matches nothing, or a module that it names cannot be adapted.
        AdapterStateError: The model has adapters already, of this library or of another, or is sharded.
        DataError: A matrix in `measured` is not finite, or gives a start that is not finite.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), torch.nn.ReLU(), torch.nn.Linear(3, 2))
        >>> print(inject(model, LoRAConfig(rank=2, alpha=4, target_modules=["0"])))
        module  kind    weight  rank  scale  parameters
        ------  ------  ------  ----  -----  ----------
        0       Linear  3x4        2      2          14
        1 module adapted; 14 parameters trained (37.84 %), 23 frozen
        >>> [name for name, p in model.named_parameters() if p.requires_grad]
        ['0.lora_A', '0.lora_B']
    """
    tree = Tree.of(model)
    model = tree.root  # the record is left on the module inside all wrappers
    check_overridden()
    config = with_plain_names(LoRAConfig() if config is None else check_is_config(config), tree)
    _check_unadapted(model, tree)
    selection = select(model, config, tree)
    plan = planned(selection.targets, config)
    if config.alora_invocation_tokens:
        check_readers(model)
    vocabularies = vocabulary(model, config, selection)
    measured = measured or {}
    if start:
        check_measured(config, [target.name for target in selection.targets], measured)
    whole = tensors_trained_whole(model, config, selection)
    rows_of = {f"{name}.weight": module._parameters["weight"] for name, module, _, _ in vocabularies}
    check_shared(model, config, selection, whole, rows_of)
    wasteful = [target.names_of(name)[0] for target, kind in plan if kind.wasteful for name in kind.wasteful]
    if wasteful:  # warn before anything is changed, since a user may turn warnings into errors
        warnings.warn(
            f"A rank above a layer's smaller side is legal but wasteful, since B A cannot have a higher one: "
            f"{listed(wasteful)}. Lower rank, or set rank_pattern.",
            stacklevel=2,
        )

    start = start and not any(kind.is_on_meta for _, kind in plan)
    saved_modules = {id(m) for saved in selection.saved.values() for m in saved.modules()}
    targeted = {id(target.module) for target in selection.targets}
    norms = {
        name: m
        for name, m in tree.of_classes(may_have_running_statistics)
        if has_running_statistics(m) and id(m) not in saved_modules
    }
    kept = {name: m for name, m in tree.of_classes(may_be_kept) if id(m) not in targeted and is_kept(m)}
    injection = Injection(
        config=config,
        was_trainable=frozenset(name for name, p in tree.parameters if p.requires_grad),
        originals={name: t.detach().clone() for name, t in whole.items()},
        head=selection.head,
        frozen_norms=tuple(norms),
        kept_in_place=tuple(kept),
        awaits_start=not start,
        adapted={
            name: module
            for name, module in (*((t.name, t.module) for t in selection.targets), *(v[:2] for v in vocabularies))
            if module is not model
        },
    )
    tensors: list[dict[str, Tensor]] = []
    for device, steps in groupby(plan, key=lambda step: step[1].device):
        with drawing_on(device):
            tensors += [
                kind.tensors(target.name, target.module, measured.get(target.name, {}) if start else None)
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
            frozen += math.prod(shape_of(p))
    for (target, kind), own in zip(plan, tensors):
        adapt(target.module, kind.mixin, kind.spec, own, target.name)
    for (name, module, rows_of_tokens, spec), own in zip(vocabularies, tokens):
        adapt(module, rows_of_tokens, spec, own, name)
    listen_for_forwards(model)
    if config.alora_invocation_tokens:
        listen(model, config.alora_invocation_tokens)
    for module in norms.values():
        freeze_statistics(module)
    for module in kept.values():
        keep_in_place(module)
    model.__dict__[RECORD] = injection
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
    """Take the adapters out of `model`. The base is then as before `inject`, bit for bit, and trainable as before.

    A call that raises changes nothing.

    Args:
        model: The module that `inject` was called on, or a wrapper around it (DDP, torch.compile).

    Raises:
        AdapterStateError: `inject` was not called on this module, or the model was changed since in a way that cannot
            be undone, or it is merged, sharded, or inside `with disabled(model)`.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, inject, remove
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3))
        >>> report = inject(model, LoRAConfig(target_modules=["0"], rank=2))
        >>> sorted(model.state_dict())
        ['0.bias', '0.lora_A', '0.lora_B', '0.weight']
        >>> remove(model)
        >>> sorted(model.state_dict())
        ['0.bias', '0.weight']
    """
    tree = Tree.of(model)
    model = tree.root
    injection_of(model)
    check_removable(model, tree)
    adapted: Any = [module for _, module in tree.of_classes(is_adapter)]
    if are_merged(model, tree):
        raise AdapterStateError(f"{type(model).__name__} is merged: leave `with merged(model)` first.")
    # Innermost first: an inner `inject` found parameters that the outer one had frozen. The outer record, which is
    # released last, has their original state.
    records = [(m, m.__dict__[RECORD]) for _, m in tree.modules if RECORD in m.__dict__][::-1]
    restored = [originals_of(owner, injection) for owner, injection in records]
    with swapping([owner for owner, _ in records], adapted), torch.no_grad():
        for module in adapted:
            unadapt(module)
        for tensor, original in (pair for pairs in restored for pair in pairs):
            tensor.copy_(original)
    for owner, injection in records:
        release(owner, injection)


def originals_of(model: nn.Module, injection: Injection) -> list[tuple[Tensor, Tensor]]:
    """The tensors that are trained whole, each with its value before training."""
    if not injection.originals:
        return []
    tensors, originals = dict(Tree.of(model).tensors), injection.originals
    changed = [
        name for name, original in originals.items() if name not in tensors or tensors[name].shape != original.shape
    ]
    if changed:
        raise AdapterStateError(
            f"{listed(changed)} of {type(model).__name__} was replaced after inject, so its old value cannot be put "
            "back. Call remove before you change the model's modules."
        )
    return [(tensors[name], original) for name, original in originals.items()]


def release(model: nn.Module, injection: Injection) -> None:
    """Undo what `inject` did besides the adapters: freezing, hooks, frozen norms, the record."""
    if injection.config.alora_invocation_tokens:
        stop_listening(model)
    unlisten_for_forwards(model)
    tree = Tree.of(model)
    for _, module in tree.modules if injection.originals else ():
        read_as_held(module)
    by_name = injection.frozen_norms or injection.kept_in_place
    modules = dict(tree.every) if by_name else {}
    for name in injection.frozen_norms:
        norm = modules.get(name)
        if isinstance(norm, FrozenNorm):  # it may have been replaced since, by SyncBatchNorm for example
            release_statistics(norm)
    for name in injection.kept_in_place:
        if name in modules:
            let_go(modules[name])
    for name, p in tree.parameters:
        if p.requires_grad is not (was_trainable := name in injection.was_trainable):
            p.requires_grad_(was_trainable)
    for _, p in tree.parameters:
        if not p.requires_grad and p.grad is not None:
            p.grad = None
    del model.__dict__[RECORD]


def _check_unadapted(model: nn.Module, tree: Tree) -> None:
    check_none_of_ours(model, tree)
    check_unsharded(
        model,
        "Adapters that are added now would not be sharded, and each process would train its own. Call inject first, "
        "and fully_shard (or parallelize_module, or FSDP) after.",
        tree,
    )
    unusual = tree.parameters if tree.classes_of_parameters - {nn.Parameter} else ()
    lazy = [name for name, p in unusual if nn.parameter.is_lazy(p)]
    if lazy:
        raise TargetError(f"{listed(lazy)} of {type(model).__name__} has no shape yet: run one batch through it first.")


def take_tables(model: nn.Module, names: Iterable[str]) -> None:
    """Count the embedding tables `names` of `model`, which has just been adapted, to its adapter: those of a vocabulary
    that was resized before the adapter was trained. They stay frozen, and are saved, loaded and removed with it:
    `remove` puts their present values back."""
    injection = injection_of(model)
    there = dict(Tree.of(model).tensors)
    taken = {name: there[name].detach().clone() for name in names}
    injection.originals.update(taken)
    injection.tables |= taken.keys()
