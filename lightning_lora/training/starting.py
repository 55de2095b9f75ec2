"""The adapters that a run starts with: those that are there, those that are loaded, and those of launched processes."""

from __future__ import annotations

import functools
import math
import os
from abc import ABC
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import quote

from huggingface_hub import constants
from lightning.pytorch.trainer.states import TrainerStatus
from torch import nn

from lightning_lora.engine import Injection, InjectionReport, LoRAConfig, inject, injections, remove
from lightning_lora.engine.config import AdapterDtype, check_is_config
from lightning_lora.engine.peft_names import unknown_name
from lightning_lora.engine.present import check_as_injected
from lightning_lora.engine.swap import swap
from lightning_lora.engine.targets import differences, with_plain_names
from lightning_lora.engine.tree import Tree, submodule
from lightning_lora.engine.weights import shape_of
from lightning_lora.errors import (
    AdapterFormatError,
    AdapterStateError,
    CheckpointError,
    ConfigError,
    HubError,
    TrainingError,
    listed,
)
from lightning_lora.hub import load_adapter
from lightning_lora.hub.address import hub_address
from lightning_lora.hub.pull import adapter_folder, pull
from lightning_lora.training.checkpoint import checkpoint_adapter
from lightning_lora.training.lightning_private import launches_processes
from lightning_lora.training.signals import SigtermLater

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer

    _Launcher = Any
else:
    _Launcher = ABC  # the base of Lightning's launcher: Python swaps classes only if their layouts agree


# Adapt the model in the process that launches others, before it does.
#
# With ddp_spawn, ddp_fork and ddp_notebook the Trainer's hooks run in child processes only. The parent's module would
# stay without adapters, and Lightning, which loads the trained weights back into it without strictness, would drop them
# silently. It offers no hook in the parent, so the launcher of a Trainer that has a LoRACallback gets a class of ours.


class AdaptingLauncher(_Launcher):
    """Mixin in front of Lightning's launcher of processes: each LoRACallback acts before the launch and after it."""

    def launch(self, function: Any, *args: Any, trainer: Any = None, **kwargs: Any) -> Any:
        ours = [c for c in getattr(trainer, "callbacks", ()) if hasattr(c, "before_launch")]
        for callback in ours:
            callback.before_launch(trainer)
        if ours:
            function = functools.partial(_save_on_exception, function, trainer)
        try:
            result = super().launch(function, *args, trainer=trainer, **kwargs)
        except BaseException:
            for callback in ours:
                callback.launch_failed()
            raise
        for callback in ours:
            callback.after_launch(trainer)
        return result


def adapt_before_launch(trainer: Trainer | None) -> None:
    """Give our class to the launcher of a Trainer that is being made with a LoRACallback among its callbacks."""
    launcher = None if trainer is None else trainer.strategy.launcher
    if launches_processes(launcher) and not isinstance(launcher, AdaptingLauncher):
        swap(launcher, "LoRA", AdaptingLauncher)


def check_adapted_before_launch(trainer: Trainer) -> None:
    """Raise TrainingError in a launched process where the one that launched it did not know of the LoRACallback."""
    launcher = trainer.strategy.launcher
    if launches_processes(launcher) and not isinstance(launcher, AdaptingLauncher):
        raise TrainingError(
            "LoRACallback was added after the Trainer was made (by its list of callbacks, or by configure_callbacks), "
            "so the process that launched this one would not get the trained adapters back. Give the callback to "
            "Trainer(callbacks=[...]), or use strategy='ddp'."
        )


def _save_on_exception(function: Any, trainer: Any, *args: Any, **kwargs: Any) -> Any:
    """Run `function` in a launched process, which has the weights, and save there on an exception: Lightning calls
    on_exception only in the launching process."""
    try:
        return function(*args, **kwargs)
    except BaseException as error:
        sigterm = SigtermLater()
        sigterm.begin()
        trainer.state.status = TrainerStatus.INTERRUPTED
        try:
            for callback in trainer.checkpoint_callbacks:
                callback.on_exception(trainer, trainer.lightning_module, error)
        finally:
            sigterm.end()
        raise


# Adapt a module whose layers are built by hooks of its own.


def call_after(module: LightningModule, hook: str, function: Callable[[], None]) -> None:
    """Let `function` run once, after the next call of `module`'s own hook of this name."""
    original = getattr(module, hook)
    had_own = hook in module.__dict__  # LightningCLI, for one, puts hooks on the instance

    @functools.wraps(original)  # Lightning looks at the wrapped function to see if the hook is overridden
    def hook_and_function(*args: Any, **kwargs: Any) -> Any:
        if had_own:
            module.__dict__[hook] = original
        else:
            module.__dict__.pop(hook, None)
        result = original(*args, **kwargs)
        function()
        return result

    module.__dict__[hook] = hook_and_function


class FurtherFields(TypedDict, total=False):
    """The fields of a LoRAConfig that LoRACallback does not spell in its signature, for type checkers and editors."""

    target_parameters: list[str] | None
    layers_to_transform: int | list[int] | None
    layers_pattern: str | list[str] | None
    rank_pattern: dict[str, int]
    alpha_pattern: dict[str, float]
    trainable_token_indices: list[int] | dict[str, list[int]] | None
    lora_bias: bool
    freeze_a: bool
    rank_dropout: float
    module_dropout: float
    alora_invocation_tokens: list[int] | None
    adapter_dtype: AdapterDtype


# Adapters that a module has before a run: from an earlier run (a cell that is run again), inject or load_adapter.


def adapters_present(
    module: nn.Module, config: LoRAConfig | None, some: Mapping[str, Any] | None = None, *, adapter: str | None = None
) -> tuple[str, InjectionReport]:
    """The code that names what `inject` was called on ("module.backbone"), and its report, with names in `module`.

    Raises AdapterStateError, naming what differs, where the adapters of `module` are not those of `config`, or of
    `some` of its fields; values that mean the same count as the same. `adapter` is the folder or the id on the Hub that
    they were just loaded from.
    """
    check_as_injected(module)
    kind = type(module).__name__
    records = list(injections(module))
    if not records:
        raise AdapterStateError(
            f"{kind} has adapters already, of an inject on a module around it: call lightning_lora.remove on that one "
            "first, or fit that one."
        )
    if len(records) > 1:
        parts = listed(repr(name) for name, _ in records)
        raise AdapterStateError(
            f"{kind} has adapters already, of several calls of inject (on {parts}), "
            "and a callback trains those of one. Call lightning_lora.remove on the others first."
        )
    ((root, injection),) = records
    code = f"module.{root}" if root else "module"
    config = replace(injection.config, **some or {}) if config is None else config
    owner = submodule(module, root)
    differing = _differing(owner, injection, with_plain_names(config, Tree.of(owner)))
    if differing and adapter is not None:
        raise AdapterStateError(
            f"The adapter {adapter} is of another config than the one that was given beside it: {listed(differing)}. "
            "Leave these settings out, to go on as it was trained, or start a new adapter without adapter=."
        )
    if differing:
        raise AdapterStateError(
            f"{kind} has adapters already, of another config than this callback's: {listed(differing)}. To start anew, "
            f"call lightning_lora.remove({code}) first (or merge, to keep what they learnt in the base); to go on from "
            f"them, give the callback their config: LoRACallback(injection_of({code}).config), with injection_of from "
            "lightning_lora.engine."
        )
    assert injection.report is not None, "inject leaves it"
    inside = {id(p) for p in submodule(module, root).parameters()}
    others = sum(math.prod(shape_of(p)) for p in module.parameters() if id(p) not in inside)
    return code, injection.report.within(root, others)


def _differing(model: nn.Module, injection: Injection, config: LoRAConfig) -> list[str]:
    differing = differences(model, injection, config)
    return [f"{name} is {_shown(a)} there and {_shown(b)} here" for name, (a, b) in differing.items()]


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:97]}..."


# The config, as LoRACallback takes it: whole, or its fields by name.

_SETTINGS = ("adapter", "lora_plus_ratio", "product_decay", "push", "save_adapter", "check_base", "init_batches")


def given_fields(
    config: LoRAConfig | None,
    spelled: Mapping[str, Any],
    target_modules: Any,
    others: Mapping[str, Any],
    *,
    from_file: bool,
) -> dict[str, Any]:
    """The fields of a LoRAConfig that the user set: those of `spelled`, the named arguments, that are not None, and the
    `others`. Raises ConfigError for fields beside a `config`, and for a name that is no field."""
    known = LoRAConfig.__dataclass_fields__
    further = known.keys() - spelled.keys() - {"target_modules"}
    if others.keys() >= further and (config is not None or from_file):
        # LightningCLI gives all of them; those that nobody set have their defaults.
        defaults = LoRAConfig().to_dict()
        others = {name: value for name, value in others.items() if name not in defaults or value != defaults[name]}
    given = {name: value for name, value in spelled.items() if value is not None} | dict(others)
    if target_modules != "all-linear":  # None is a value there, beside target_parameters
        given["target_modules"] = target_modules
    if config is not None and given:
        raise ConfigError(f"Give either a LoRAConfig or its fields, not both: {listed(given)}.")
    if config is not None:
        check_is_config(config)
    for name in others:
        if name not in known:
            raise ConfigError(f"LoRACallback has no setting {name!r}. {unknown_name(name, [*known, *_SETTINGS])}")
    return given


# Training that goes on from an adapter that was saved, by us or by others: `LoRACallback(adapter=...)`.


class AbsentError(Exception):
    """The adapter is not there, for the reason given. That is an error unless a checkpoint is loaded in its place."""


class AdapterToGoOnFrom:
    """The adapter to start from, a folder or "user/repo@revision" on the Hub, and the config that was given besides."""

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        config: LoRAConfig | None,
        fields: dict[str, Any],
        subfolder: str | None = None,
        ignore_fields: Collection[str] = (),
    ) -> None:
        """Raises ConfigError for an `adapter` that can be neither; nothing is read yet."""
        if not isinstance(adapter, (str, os.PathLike)) or not str(adapter):
            raise ConfigError(f"adapter is a folder, or 'user/repo@revision' on the Hub, not {adapter!r}.")
        if str(adapter).endswith(".ckpt"):
            raise ConfigError(
                f"adapter={str(adapter)!r} is a checkpoint: give it to the Trainer as ckpt_path, to resume its run "
                "with its optimizer. To start another run from its adapter, give the folder beside it."
            )
        if (address := hub_address(adapter)) is not None:
            inside = f"/tree/{quote(address.revision or 'main', safe='')}/{address.subfolder}"
            at = f"@{address.revision}" if address.revision else ""
            adapter = f"{constants.ENDPOINT}/{address.repo_id}{inside}" if address.subfolder else address.repo_id + at
        self.adapter, self.config, self.fields = os.fspath(adapter), config, fields
        self.reading: dict[str, Any] = {"subfolder": subfolder, "ignore_fields": ignore_fields}
        if config is None and fields:
            LoRAConfig(**fields)  # raises for an invalid value

    def load(self, module: LightningModule, trainer: Trainer, *, check_base: bool) -> InjectionReport:
        """Adapt `module` as the adapter says, and load it. Raises as `load_adapter` does, and AdapterStateError where
        a config that was given besides differs; `module` is then as it was."""
        try:
            place, revision = self._place(trainer)
            folder = adapter_folder(place, revision, **self.reading)
        except HubError as error:
            raise AbsentError(error) from error
        if not folder.exists():
            raise AbsentError(AdapterFormatError(f"adapter={self.adapter}: there is no such folder ({folder})."))
        ignored = self.reading["ignore_fields"]
        report = load_adapter(module, folder, check_base=check_base, ignore_fields=ignored)
        try:
            adapters_present(module, self.config, self.fields, adapter=self.adapter)
        except AdapterStateError:
            remove(module)
            raise
        return report

    def _place(self, trainer: Trainer) -> tuple[str, str | None]:
        """A folder; or an id on the Hub, with the commit that the first process found, which all others take."""
        path, at, revision = self.adapter.rpartition("@")
        if os.path.exists(self.adapter) or not at:
            path, revision = self.adapter, ""
        if os.path.exists(path) or os.path.isabs(path) or path.count("/") != 1 or trainer.world_size == 1:
            return path, revision or None
        commit, error = None, None
        if trainer.is_global_zero:
            try:
                commit = pull(path, revision or None, **self.reading).commit
            except Exception as raised:
                error = raised
        if not _is_distributed():  # in the process that launches the others
            if error is not None:
                raise error
            return path, commit
        said = trainer.strategy.broadcast((commit, error))
        if said[1] is not None:
            raise said[1]
        return path, said[0]


def adapted_as_in(checkpoint: Mapping[str, Any], module: LightningModule) -> InjectionReport | None:
    """Adapt `module` as `checkpoint` says, which will be loaded into it; returns None where it is adapted so already.
    The adapter that the run once began with may be gone by now, or another one."""
    configs = checkpoint_adapter(checkpoint)["configs"]
    if len(configs) != 1:
        raise CheckpointError(f"The checkpoint has adapters of {len(configs)} calls of inject, not of one callback.")
    ((name, config),) = configs.items()
    present = [(where, injection.config) for where, injection in injections(module)]
    if present == [(name, LoRAConfig(**config))]:
        return None
    for where, _ in present:
        remove(submodule(module, where))
    try:
        part = submodule(module, name)
    except AttributeError as error:
        raise AdapterFormatError(f"The checkpoint adapts {name!r}, which {type(module).__name__} has not.") from error
    report = inject(part, LoRAConfig(**config), start=False)
    inside = {id(p) for p in part.parameters()}
    return report.within(name, sum(p.numel() for p in module.parameters() if id(p) not in inside))


def _is_distributed() -> bool:
    import torch

    return torch.distributed.is_available() and torch.distributed.is_initialized()
