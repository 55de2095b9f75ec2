"""Puts adapters into a model, takes them out again, and switches them off for a while.

`inject` checks everything first and changes the model after, so a call that raises leaves the model as it was. It
leaves an `Injection` on the module it was given: the record from which `remove` undoes the injection.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lightning_lora.engine import switch
from lightning_lora.engine.config import LoRAConfig, check_is_config
from lightning_lora.engine.forwards import listen_for_forwards, swapping, unlisten_for_forwards
from lightning_lora.engine.layers.alora import check_readers, listen, stop_listening
from lightning_lora.engine.layers.base import adapt, is_adapter, unadapt
from lightning_lora.engine.layers.fresh import Measured, check_measured, fresh_tensors
from lightning_lora.engine.layers.frozen import (
    FrozenNorm,
    freeze_norms,
    read_as_held,
    read_by_switch,
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
    injections,
)
from lightning_lora.engine.report import InjectionReport, report_rows
from lightning_lora.engine.swap import check_swappable, is_swapped
from lightning_lora.engine.targets import select, with_plain_names
from lightning_lora.engine.torch_private import check_overridden
from lightning_lora.engine.trained import trained_besides
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.weights import check_unsharded, is_sharded, shape_of
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


# Switches the adapters of a model off for a while, in this thread or task alone.


@contextmanager
def disabled(model: nn.Module) -> Iterator[None]:
    """Switch the adapters of `model` off inside a `with` block: for the reference pass of DPO, or to compare.

    Inside, `model` computes what it did before `inject`, bit for bit. Layers run, and weights read, without their
    adapters; tensors that are trained whole (modules_to_save, biases, token rows) act with their values from before
    training. No tensor is changed: state dicts, `parameters()` and `save_adapter` still give the trained values. The
    training mode stays as it is, so the base's own dropout stays on; norms whose statistics `inject` froze stay frozen.

    The block holds for the thread or the task that entered it, and may be nested. If a backward pass outside computes a
    forward from inside again (activation checkpointing), it runs without adapters again. Compiled code runs inside with
    graph breaks; with fullgraph=True it raises torch's error.

    Args:
        model: The module that `inject` was called on, or a module around it.

    Raises:
        AdapterStateError: `model` has no adapters, is only a part of the module that was adapted, or is merged.
            `merge`, `merged` and `remove` raise it while any thread is inside the block.

    Example:
        >>> import torch
        >>> from lightning_lora import LoRAConfig, disabled, inject
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> x = torch.ones(1, 4)
        >>> before = model(x)
        >>> report = inject(model, LoRAConfig(rank=2, target_modules=["0"]))
        >>> with torch.no_grad():
        ...     _ = model[0].lora_B.fill_(1.0)  # as if it had been trained
        >>> with torch.no_grad(), disabled(model):
        ...     reference = model(x)
        >>> torch.equal(reference, before), torch.equal(model(x), before)
        (True, False)
    """
    is_compiled = "torch._dynamo" in sys.modules
    with (torch.compiler.disable(_off) if is_compiled else _off)(model):
        yield


def _off(model: nn.Module) -> AbstractContextManager[None]:
    tree = Tree.of(model)
    _check_can_be_off(tree)
    held = _originals(tree)
    for _, module in tree.modules if held else ():
        tensors = (*module._parameters.items(), *module._buffers.items())
        if names := {name: held[id(t)] for name, t in tensors if id(t) in held}:
            read_by_switch(module, names)
    return switch.off(tree.root, frozenset(id(module) for _, module in tree.modules))


def _check_can_be_off(tree: Tree) -> None:
    kind = type(tree.root).__name__
    adapted = tree.of_classes(is_adapter)
    records = list(injections(tree.root, tree))
    if not adapted and records:
        raise AdapterStateError(f"{kind} is merged, or its adapted layers were replaced: there is nothing to disable.")
    if not adapted:
        raise AdapterStateError(f"{kind} has no adapters to disable: call inject(model, config) first.")
    known = {id(module) for _, injection in records for module in injection.adapted.values()}
    outside = [name for name, module in adapted if id(module) not in known and RECORD not in module.__dict__]
    if outside:
        raise AdapterStateError(
            f"{listed(map(repr, outside), 3)} of this {kind} was adapted as a part of a larger module, and other parts "
            "may be trained too: pass the module that inject was called on (under a Trainer, the LightningModule)."
        )
    changed = [name for name, module in adapted if not is_swapped(type(module))]
    if changed:
        raise AdapterStateError(
            f"{listed(map(repr, changed))} changed its class after it was adapted (a parametrization, for example): "
            "what it computes without its adapter is not known. Undo that first."
        )
    for _, wrapper in tree.wrappers:
        if isinstance(wrapper, nn.DataParallel) and len(wrapper.device_ids) > 1:
            raise AdapterStateError(
                f"nn.DataParallel runs copies of {kind} in threads of its own, in which its adapters would act: call "
                "the module inside of it (model.module), or use DistributedDataParallel."
            )


def _originals(tree: Tree) -> dict[int, Tensor]:
    """id(tensor) -> its value before training, for each tensor that is trained whole."""
    found: dict[int, Tensor] = {}
    for name, injection in injections(tree.root, tree):
        for tensor, original in originals_of(submodule(tree.root, name), injection):
            if original.is_meta or is_sharded(tensor):
                raise AdapterStateError(
                    f"{listed(injection.trained_whole, 3)} of {type(tree.root).__name__} is trained whole, and is "
                    f"{'on the meta device still' if original.is_meta else 'sharded over processes'}: its values "
                    "before training cannot be used here. Train it unsharded, or keep a copy of the base for this."
                )
            found[id(tensor)] = original
    return found
