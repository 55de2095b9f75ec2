"""Puts adapters into a model, and takes them out again.

`inject` checks everything first and changes the model after, so a call that raises leaves the model as it was. It
leaves an `Injection` on the module it was given: the record from which `remove` undoes the injection.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine.config import LoRAConfig, check_is_config
from lightning_lora.engine.forwards import listen_for_forwards, swapping, unlisten_for_forwards
from lightning_lora.engine.layers.alora import check_readers, listen, stop_listening
from lightning_lora.engine.layers.base import adapt, is_adapter, unadapt
from lightning_lora.engine.layers.fresh import Measured, check_measured, fresh_tensors
from lightning_lora.engine.layers.frozen import (
    FrozenNorm,
    freeze_norms,
    read_as_held,
    release_statistics,
)
from lightning_lora.engine.layers.quantized import keep_in_place, let_go
from lightning_lora.engine.plan import planned
from lightning_lora.engine.present import (
    RECORD,
    Injection,
    are_merged,
    check_none_of_ours,
    check_removable,
    injection_of,
)
from lightning_lora.engine.report import InjectionReport, report_rows
from lightning_lora.engine.swap import check_swappable
from lightning_lora.engine.targets import select, with_plain_names
from lightning_lora.engine.torch_private import check_overridden
from lightning_lora.engine.trained import trained_besides
from lightning_lora.engine.tree import Tree
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
    selection = select(config, tree)
    plan = planned(selection.targets, config)
    whole, with_rows, rows = trained_besides(config, selection)
    if config.alora_invocation_tokens:
        check_readers(model)
    wasteful = [target.names_of(name)[0] for target, kind in plan for name in kind.wasteful]
    if wasteful:  # warn before anything is changed, since a user may turn warnings into errors
        warnings.warn(
            f"A rank above a layer's smaller side is legal but wasteful, since B A cannot have a higher one: "
            f"{listed(wasteful)}. Lower rank, or set rank_pattern.",
            stacklevel=2,
        )
    swaps = [*((target.name, target.module, kind.mixin, kind.spec) for target, kind in plan), *with_rows]
    for name, layer, mixin, _ in swaps:
        check_swappable(name, layer, mixin)
    if start:
        check_measured(config, [target.name for target in selection.targets], measured or {})
    start = start and not any(kind.is_on_meta for _, kind in plan)
    tensors = [*fresh_tensors(plan, (measured or {}) if start else None), *rows]
    modules = tuple(report_rows(plan, tensors, tree))
    injection = Injection(
        config=config,
        was_trainable=frozenset(name for name, p in tree.parameters if p.requires_grad),
        originals={name: t.detach().clone() for name, t in whole.items()},
        head=selection.head,
        awaits_start=not start,
        adapted={name: layer for name, layer, *_ in swaps if layer is not model},
    )
    # Nothing below can fail for a reason in the model or the config.
    trained = {id(t) for t in whole.values()}
    for _, p in tree.parameters:
        if p.requires_grad is not (is_trained := id(p) in trained):
            p.requires_grad_(is_trained)
    for (name, layer, mixin, spec), own in zip(swaps, tensors):
        adapt(layer, mixin, spec, own, name)
    listen_for_forwards(model)
    if config.alora_invocation_tokens:
        listen(model, config.alora_invocation_tokens)
    injection.frozen_norms = freeze_norms(tree.modules, selection.inside)
    injection.kept_in_place = keep_in_place(tree.modules)
    model.__dict__[RECORD] = injection
    parameters = {id(p): p for _, p in Tree.of(model).parameters}.values()
    injection.report = InjectionReport(
        modules=modules,
        trained_whole=tuple(whole),
        head=selection.head,
        left_out=selection.left_out,
        tokens={name: len(spec.tokens) for name, _, _, spec in with_rows},
        trainable=sum(p.numel() for p in parameters if p.requires_grad),
        frozen=sum(math.prod(shape_of(p)) for p in parameters if not p.requires_grad),
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
