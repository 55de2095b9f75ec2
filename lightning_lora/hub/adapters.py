"""Adapters as folders: write one from a model, load one into a model, both strictly and all or nothing."""

from __future__ import annotations

import os
import warnings
from collections.abc import Collection, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from typing_extensions import Unpack

from lightning_lora.checked import one_of
from lightning_lora.engine import (
    Injection,
    InjectionReport,
    LoRAConfig,
    adapter_tensors,
    adapters,
    injections,
    remove,
)
from lightning_lora.engine.inject import take_tables
from lightning_lora.engine.layers import LinearLoRA, register_conv1d
from lightning_lora.engine.present import check_as_injected, check_none_of_ours, check_some_of_ours
from lightning_lora.engine.state import by_plain_name, check_fits, check_same_base, describe_base, fill_adapter
from lightning_lora.engine.targets import name_matches
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.weights import is_first, is_sharded, whole
from lightning_lora.errors import AdapterStateError, ConfigError, listed
from lightning_lora.format.config import own_fields, to_peft
from lightning_lora.format.folder import NOTE, write_adapter
from lightning_lora.format.inspection import opened
from lightning_lora.format.layout import (
    Adapted,
    adapter_root,
    layout_of,
    member,
    tensor_named,
)
from lightning_lora.format.matching import fit
from lightning_lora.format.peft import ends_with, exact_targets, targets_of
from lightning_lora.format.transformers_private import commit_of
from lightning_lora.hub.address import base_id, local_path
from lightning_lora.hub.card import TASKS, model_card
from lightning_lora.hub.pull import Pulling, adapter_folder
from lightning_lora.hub.verify import verify_adapter


def save_adapter(
    model: nn.Module,
    folder: str | os.PathLike[str],
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the adapter of `model` as a folder in PEFT's format: adapter_config.json, adapter_model.safetensors,
    README.md.

    The names in it are relative to the base inside `model` (see `adapter_root`), so PEFT loads it onto that base. Where
    the model is sharded (fully_shard), its tensors are put together here: every process must call this, and the first
    one writes. An existing folder is replaced as a whole, or, where it holds other files too, file by file.

    Args:
        model: What `inject` was called on, or what holds it.
        folder: Where to write it: a local path.
        base_model: The base's id on the Hub; by default the one that a transformers model was loaded from. A local path
            is never written.
        revision: The commit of the base on the Hub.
        task_type: PEFT's name of the task; by default that of a transformers model, and none where PEFT could not call
            the model with it.
        metadata: Further entries for the header of the tensors.

    Returns:
        The folder.

    Raises:
        AdapterStateError: `inject` was not called on `model` or inside it.
        ConfigError: An argument is invalid.
        CheckpointError: The folder cannot be written; what was there before is then still there.
    """
    return save_tensors(
        model, folder, None, None, base_model=base_model, revision=revision, task_type=task_type, metadata=metadata
    )


def save_tensors(
    model: nn.Module,
    folder: str | os.PathLike[str],
    tensors: Mapping[str, Tensor] | None,
    known_base: Mapping[str, Any] | None,
    *,
    base_model: str | None = None,
    revision: str | None = None,
    task_type: str | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """`save_adapter` with `tensors`, an `adapter_state_dict` of `model`, in place of the live tensors. `known_base` is
    an earlier result of `describe_base(model, root)`: with it, the weights of the base are not read again. With both,
    and tensors that are whole, the first process may call this alone."""
    folder = local_path(folder)
    owner_name, injection = only_injection(model)
    owner = submodule(model, owner_name)
    module, root = adapter_root(model)
    adapted = dict(adapters(root))
    parts = {name: {own: getattr(m, own) for own in m.lora_names} for name, m in adapted.items()}
    layers = {
        name: Adapted(
            {own: tuple(t.shape) for own, t in parts[name].items()},
            {pair.suffix: pair.spec.rank for pair in m.lora_pairs(name)},
        )
        for name, m in adapted.items()
    }
    known = {id(t) for part in parts.values() for t in part.values()}
    own_tensors = adapter_tensors(model)
    others_trained = [t for t in own_tensors.values() if id(t) not in known]
    targets = targets_of(adapted, injection.config)
    layout = layout_of(root, layers, others_trained, targets.companions)
    saved = _saved_names(root, owner, injection.config)
    inside = tuple(f"{name}." for name in saved)
    named = {*targets.modules, *targets.companions, *saved}
    others = [n for n, _ in Tree.of(root).modules if n not in named and not n.startswith(inside)]

    if base_model is None:
        base_model = getattr(getattr(root, "config", None), "name_or_path", None)
    base_model = base_id(base_model)
    if revision is None and base_model is not None:
        revision = commit_of(getattr(root, "config", None))
    config = to_peft(
        injection.config,
        ranks={name: spec.rank for name, spec in targets.specs.items()},
        alphas={name: spec.alpha for name, spec in targets.specs.items()},
        target_modules=exact_targets(targets.modules, others) if targets.modules else [],
        target_parameters=targets.parameters or None,
        trainable_token_indices=targets.tokens or None,
        without_dropout=targets.without_dropout,
        modules_to_save=_entries(root, injection.config, saved),
        fan_in_fan_out=_is_transposed(adapted),
        task_type=_task_type(root, task_type, saved),
        base_model_name_or_path=base_model,
        revision=revision,
    )
    given = by_plain_name(model, tensors or {})
    live = {member(name, own): t for name, part in parts.items() for own, t in part.items()}
    live |= {name: tensor_named(root, name) for name in layout.whole}

    def value(name: str) -> Tensor:
        return whole(given.get(member(module, name), live[name]).detach()).cpu()

    values = {key: layout.value_in_file(name, value) for key, name in layout.written_keys().items()}
    note = {
        "version": version("lightning-lora"),
        "module": module,
        "config": own_fields(injection.config, dropout=targets.without_dropout),
        **(known_base or describe_base(model, root)),
    }
    metadata = _checked_metadata(metadata)
    at = f"{owner_name}." if owner_name else ""
    trained = sum(t.numel() for name, t in own_tensors.items() if name.removeprefix(at) not in injection.tables)
    card = model_card(config, modules=len(adapted), parameters=trained, module=module)
    if not any(map(is_sharded, own_tensors.values())) or is_first():
        write_adapter(folder, config, values, note, card, metadata)
    for what, names in targets.unread.items():
        warnings.warn(f"{what}: {listed(names)}. load_adapter does.", stacklevel=4)
    return folder


def load_adapter(
    model: nn.Module,
    adapter: str | os.PathLike[str],
    *,
    revision: str | None = None,
    check_base: bool = True,
    ignore_fields: Collection[str] = (),
    load_embedding_layers: bool = False,
    verify: bool = False,
    **pulling: Unpack[Pulling],
) -> InjectionReport:
    """Adapt `model` as the adapter in a folder says and load its tensors, whether this package or PEFT wrote it.

    If `adapter` is an existing folder, that folder is loaded. Anything else that looks like "user/name" is pulled from
    the Hub, at `revision`; further arguments are those of `pull_adapter`, whose errors are raised too. One of them,
    `subfolder`, is the place of the adapter in the folder or the repository.

    `model` is the base itself or what holds it, such as a LightningModule. Fields of the config that are not known
    here, and are not empty, are ignored where `ignore_fields` names them.

    PEFT also writes the embedding and the head of the base (its save_embedding_layers) where the vocabulary was resized
    or they are adapted. They are compared with the model's. With `load_embedding_layers` they are loaded into it, stay
    frozen and are saved with the adapter, and `remove` puts back the model's own.

    With `verify` each layer is then measured (`verify_adapter`), which takes two calls of each and proves that the
    model's precision lets the adapter act; AdapterStateError says where it does not.

    Loading is strict. Raises AdapterFormatError for a folder of another layout, a config with a field that cannot be
    honoured, and every tensor that is missing, unexpected, of another shape or not finite; BaseMismatchError where the
    adapter was trained on other base weights (`check_base=False` loads it all the same); AdapterStateError where
    `model` has adapters already. `model` is then as it was.
    """
    check_none_of_ours(model, Tree.of(model))
    folder = adapter_folder(adapter, revision, ignore_fields=ignore_fields, **pulling)
    with opened(folder, ignore_fields) as (config, file):
        plan = fit(model, config, file.header, where=str(folder))
        values = plan.read(file, compare_base=not load_embedding_layers)
        tables = plan.tables(file) if load_embedding_layers else {}
        note = file.header.note
    report = plan.inject(model)
    try:
        take_tables(model, plan.on(model, tables))
        own, given = adapter_tensors(model), plan.on(model, {**values, **tables})
        check_fits(own, given, what="the adapter", are_finite=True)  # by `read`
        fill_adapter(model, own, given)
        if check_base:
            check_same_base(model, note, plan.root, what=f"The adapter in {folder}")
        if verify:
            verify_adapter(model, folder, check_base=False, ignore_fields=ignore_fields).raise_for_verdict()
    except BaseException:
        remove(model)
        raise
    return report


def check_is_base(model: nn.Module, folder: Path, ignore_fields: Collection[str]) -> None:
    """Raise what `load_adapter` raises where `model` is not the base of the adapter in `folder`, or it does not fit.

    The adapter is loaded for a moment: only then is it known which weights it brings, which are not the base's."""
    load_adapter(model, folder, ignore_fields=ignore_fields)
    remove(model)


def only_injection(model: nn.Module) -> tuple[str, Injection]:
    """The name of the one module that `inject` was called on, and its record. Raises AdapterStateError where there is
    none or more than one, or where its layers are not as they were adapted."""
    tree = Tree.of(model)
    check_some_of_ours(model, tree)
    check_as_injected(model, tree)
    found = list(injections(model, tree))
    if len(found) == 1:
        return found[0]
    if found:
        places = listed(repr(name) for name, _ in found)
        raise AdapterStateError(f"inject was called on several parts of the model ({places}): save each by itself.")
    raise AdapterStateError(
        f"This {type(model).__name__} was adapted as a part of a larger module: pass the one that inject was called on "
        "(under a Trainer, the LightningModule). Names in the folder are relative to the base even so."
    )


def _saved_names(root: nn.Module, owner: nn.Module, config: LoRAConfig) -> list[str]:
    """The names in `root` of the modules that are trained whole; `owner` is what the config's names are relative to."""
    entries = config.modules_to_save
    if not entries:
        return []
    named = Tree.of(owner).every
    wanted = {id(module) for name, module in named if name and name_matches(entries, name)}
    return [name for name, module in Tree.of(root).every if name and id(module) in wanted]


def _entries(root: nn.Module, config: LoRAConfig, saved: list[str]) -> list[str] | None:
    """modules_to_save as PEFT reads it: the config's own entries if they mean the same there, else full names."""
    if not saved:
        return None
    own = sorted(set(config.modules_to_save or ()))
    means = {name for name, _ in Tree.of(root).every if ends_with(own, name)}
    return own if means == set(saved) else sorted(saved)


def _is_transposed(adapted: Mapping[str, nn.Module]) -> bool:
    """True if all adapted linear layers are transformers' Conv1D: PEFT warns unless fan_in_fan_out says so."""
    conv1d = register_conv1d()
    linear = [m for m in adapted.values() if isinstance(m, LinearLoRA)]
    return conv1d is not None and bool(linear) and all(isinstance(m, conv1d) for m in linear)


# With these task types PEFT trains the named modules whole, and fails to load an adapter that lacks them.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def _task_type(root: nn.Module, given: str | None, saved: list[str]) -> str | None:
    if given is not None:
        one_of("task_type", given, TASKS)
    task = given or _task_of(root)
    heads = _HEADS.get(task or "", ())
    untrained = [n for n, _ in Tree.of(root).modules if ends_with(heads, n) and n not in saved] if heads else []
    if not untrained:
        return task
    if given is None:
        return None
    raise ConfigError(
        f"With task_type={given!r} PEFT expects {listed(map(repr, untrained))} in the file, which was not trained: "
        "name it in modules_to_save when you inject, or leave task_type out."
    )


def _task_of(root: nn.Module) -> str | None:
    """The task type with which PEFT calls the model correctly. None where the main input is not input_ids: with a task
    type, PEFT passes input_ids whatever the main input is."""
    if getattr(root, "main_input_name", "input_ids") != "input_ids":  # Whisper's input_features, for one
        return None
    is_pair = getattr(getattr(root, "config", None), "is_encoder_decoder", False)
    endings = {
        "ForCausalLM": "CAUSAL_LM",
        "LMHeadModel": "CAUSAL_LM",
        "ForSequenceClassification": "SEQ_CLS",
        "ForTokenClassification": "TOKEN_CLS",
        "ForQuestionAnswering": "QUESTION_ANS",
        "ForConditionalGeneration": "SEQ_2_SEQ_LM" if is_pair else "CAUSAL_LM",
    }
    return next((task for ending, task in endings.items() if type(root).__name__.endswith(ending)), None)


def _checked_metadata(metadata: Mapping[str, str] | None) -> dict[str, str]:
    checked = dict(metadata or {})
    for key, value in checked.items():
        if key in ("format", NOTE) or not isinstance(key, str) or not isinstance(value, str):
            raise ConfigError(
                f"metadata holds {key!r}: {value!r}. It maps strings to strings, and 'format' and {NOTE!r} are taken."
            )
    return checked
