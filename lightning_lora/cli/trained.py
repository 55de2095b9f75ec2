"""The trained model of evaluate and predict: task, data and Trainer; the adapter is loaded once the model is built."""

from __future__ import annotations

import functools
import os
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.model_helpers import is_overridden

from lightning_lora import load_adapter
from lightning_lora.cli.build import build, task_and_data
from lightning_lora.cli.cores import use_available_cores
from lightning_lora.cli.noise import is_terminal, quieten
from lightning_lora.errors import ConfigError
from lightning_lora.hub.pull import adapter_folder


class LoadedAdapter(pl.Callback):
    """Puts the adapter onto the model, right after the model is built and before it moves to its device."""

    def __init__(self, adapter: str, subfolder: str | None, ignore_fields: list[str], check_base: bool) -> None:
        folder = adapter_folder(os.path.expanduser(adapter), subfolder=subfolder, ignore_fields=ignore_fields)
        if not folder.is_dir():
            raise ConfigError(f"adapter={adapter}: there is no such folder ({folder}).")
        self.load = functools.partial(
            load_adapter, folder_or_repo=folder, check_base=check_base, ignore_fields=ignore_fields
        )

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        # Layers may be built by the module's own hooks, which run after this one: load after the last of them.
        last = next((hook for hook in ("configure_model", "setup") if is_overridden(hook, pl_module)), None)
        if last is None:
            self.load(pl_module)
            return
        build_layers = getattr(pl_module, last)

        @functools.wraps(build_layers)  # Lightning asks of the function underneath whether the hook is overridden
        def build_and_load(*args: Any, **kwargs: Any) -> None:
            setattr(pl_module, last, build_layers)
            build_layers(*args, **kwargs)
            self.load(pl_module)

        setattr(pl_module, last, build_and_load)


def trained(
    settings: dict[str, Any], *callbacks: pl.Callback
) -> tuple[pl.Trainer, pl.LightningModule, pl.LightningDataModule]:
    """Trainer, task and data as `settings` describe them; a hook of the Trainer loads the adapter, unless `callbacks`
    are given, which do."""
    checkpoint = settings["ckpt_path"]
    if checkpoint is not None and "://" not in checkpoint and not Path(checkpoint).exists():
        raise ConfigError(f"ckpt_path={checkpoint}: there is no such checkpoint.")
    quieten()
    use_available_cores()
    if settings["seed"] is not None:
        pl.seed_everything(settings["seed"], workers=True, verbose=False)
    task, data = task_and_data(settings)
    if settings["adapter"] is not None and not callbacks:
        reading = (settings[name] for name in ("adapter", "subfolder", "ignore_fields", "check_base"))
        callbacks = (LoadedAdapter(*reading),)
    bars = {} if is_terminal() else {"enable_progress_bar": False}
    trainer = build(settings, "trainer", callbacks=list(callbacks), logger=False, enable_checkpointing=False, **bars)
    return trainer, task, data
