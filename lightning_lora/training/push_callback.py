"""`callbacks.push` of a settings file: a HubPush as an entry of its own in the Trainer's callbacks."""

from __future__ import annotations

import inspect
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from lightning_lora.errors import ConfigError
from lightning_lora.training.push import HubPush
from lightning_lora.training.pushing import Pushing


class PushCallback(Callback):
    """Pushes as `LoRACallback(push=HubPush(repo_id, **settings))` does; does nothing where `repo_id` is None.

    Put it after the LoRACallback whose adapters it pushes.
    """

    def __init__(self, repo_id: str | None = None, **settings: Any) -> None:
        self._pushing = None if repo_id is None else Pushing(HubPush(repo_id, **settings))

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if self._pushing is None or stage != "fit":
            return
        policy = getattr(trainer.strategy, "lora", None)
        if policy is None:
            raise ConfigError("callbacks.push pushes what a LoRACallback trains, and there is none before it.")
        if policy.push is None:
            policy.push = self._pushing  # from here on LoRACallback calls its hooks
            policy.push.check(trainer)
        elif policy.push.settings != self._pushing.settings:
            raise ConfigError("LoRACallback has a push of its own: leave out one of the two.")


def _signature() -> inspect.Signature:
    """The signature of HubPush, with a repo_id that may be left out: the entries that a settings file may have."""
    parameters = dict(inspect.signature(HubPush, eval_str=True).parameters)
    first = parameters["repo_id"]
    parameters["repo_id"] = first.replace(annotation=str | None, default=None)
    return inspect.Signature(list(parameters.values()))


PushCallback.__signature__ = _signature()  # type: ignore[attr-defined]
