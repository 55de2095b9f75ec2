"""Training that goes on from an adapter that was saved, by us or by others: `LoRACallback(adapter=...)`."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from huggingface_hub import constants

from lightning_lora.engine import InjectionReport, LoRAConfig, inject, injections, remove
from lightning_lora.engine.tree import submodule
from lightning_lora.errors import AdapterFormatError, AdapterStateError, CheckpointError, ConfigError, HubError
from lightning_lora.hub import load_adapter
from lightning_lora.hub.local import hub_address
from lightning_lora.hub.pull import adapter_folder, pull
from lightning_lora.training.checkpoint import checkpoint_adapter
from lightning_lora.training.present import adapters_present

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer


class AbsentError(Exception):
    """The adapter is not there, for the reason given: an error, unless a checkpoint is loaded that makes up for it."""


class AdapterToGoOnFrom:
    """A folder, or "user/repo@revision" on the Hub, and what the user says of its config besides."""

    def __init__(
        self,
        adapter: str | os.PathLike[str],
        config: LoRAConfig | None,
        fields: dict[str, Any],
        subfolder: str | None = None,
        ignore_fields: Collection[str] = (),
    ) -> None:
        """Raises ConfigError for what can be neither; nothing is read yet."""
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
            LoRAConfig(**fields)  # which raises for what cannot be

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
    """Adapt `module` as the run was whose checkpoint will be loaded into it, where it is not so already: the adapter
    that the run once began with may be gone by now, or another one."""
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
