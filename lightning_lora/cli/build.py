"""Builds the objects that the settings describe, and says which setting an error came from."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from lightning_lora.errors import ConfigError, LightningLoRAError, MissingExtraError

if TYPE_CHECKING:
    from lightning.pytorch import LightningDataModule, LightningModule

OTHERS = ("lightning", "torch", "transformers")
"""Packages whose constructors say in an error what is wrong with a setting; elsewhere it may be a fault in code."""
REFUSALS = (ValueError, TypeError, ImportError)
"""The last for what is not installed: trainer.accelerator=tpu wants torch_xla."""
EXTRAS = {"TensorBoardLogger": ("tensorboard", "tensorboard"), "WandbLogger": ("wandb", "wandb")}
"""Class name -> the package it needs and the extra of ours that brings it."""


def build(settings: dict[str, Any], where: str, **arguments: Any) -> Any:
    """The object that the node at the dotted key `where` describes, with further keyword `arguments`.

    Raises ConfigError where the node has no target, or has a value that its target, of another package, refuses;
    MissingExtraError where an optional package is missing; and whatever the user's own target raises, without Hydra's
    wrapping.
    """
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    node: Any = settings
    for part in where.split("."):
        node = node[part]
    if not isinstance(node, dict) or "_target_" not in node:
        raise ConfigError(f"{where} has no _target_: name the class or function that it describes.")
    try:
        # Twice: Hydra resolves what it is given, and reads the outcome once more.
        return instantiate({"_convert_": "all", **literal(literal(node))}, **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and not isinstance(cause, LightningLoRAError):
            name = node["_target_"].rpartition(".")[2]
            if name in EXTRAS:
                raise MissingExtraError(f"{where} ({name})", *EXTRAS[name]) from cause
        if isinstance(cause, REFUSALS) and node["_target_"].partition(".")[0] in OTHERS:
            raise ConfigError(f"{where}: {cause}") from cause
        raise cause if isinstance(cause, Exception) else error from None


def task_and_data(settings: dict[str, Any]) -> tuple[LightningModule, LightningDataModule]:
    """The objects that `task` and `data` describe. Raises ConfigError where they are of another kind."""
    from lightning.pytorch import LightningDataModule, LightningModule

    built: list[Any] = []
    for where, kind in (("task", LightningModule), ("data", LightningDataModule)):
        it = build(settings, where)
        if not isinstance(it, kind):
            made = f"{settings[where]['_target_']} makes a {type(it).__name__}"
            raise ConfigError(f"{where}._target_: {made}, and a {kind.__name__} is needed.")
        built.append(it)
    task, data = built
    return task, data


def literal(value: Any) -> Any:
    """`value` so that OmegaConf, which reads "${...}" in a text as a reference, reads what is there."""
    if isinstance(value, dict):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def build_each(settings: dict[str, Any], where: str) -> list[Any]:
    """The objects that a group of named nodes describes; one that is null is left out."""
    group = settings[where] or {}
    if "_target_" in group:
        raise ConfigError(f"{where} holds nodes by name, not one _target_: write {where}.my_name._target_=...")
    return [build(settings, f"{where}.{name}") for name, node in group.items() if node is not None]
