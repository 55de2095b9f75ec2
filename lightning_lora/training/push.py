"""The settings of pushes while training goes on: `LoRACallback(push=HubPush("user/my-adapter"))`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from lightning_lora.checked import flag, number, one_of
from lightning_lora.errors import ConfigError
from lightning_lora.hub.card import Card
from lightning_lora.hub.repository import Destination


@dataclass(frozen=True)
class HubPush(Destination):
    """What LoRACallback pushes, and where to. Raises ConfigError for an invalid value."""

    _: KW_ONLY
    every: Literal["checkpoint", "best", "end"] = "checkpoint"
    """Push the adapter of every checkpoint and the final one, that of each checkpoint that is the best so far, or only
    the final one."""
    tag_checkpoints: bool = False
    """Tag each commit with its step: "step-120"."""
    push_checkpoints: bool = False
    """Push the training checkpoint too, so that ckpt_path="hf://user/name@revision" resumes from it."""
    timeout_at_end: float = 60.0
    """The end of a run waits for pushes at most so many seconds, and one more for each megabyte of them; after an
    exception or a signal, at most 20 seconds."""
    card: Card | Mapping[str, Any] = field(default_factory=Card)
    """Facts for the cards that the run does not know by itself: `Card(data="...", front_matter={"license": "mit"})`."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("every", self.every, ("checkpoint", "best", "end"))
        number("timeout_at_end", self.timeout_at_end, least=0, unit="seconds")
        for name in ("tag_checkpoints", "push_checkpoints"):
            flag(name, getattr(self, name))
        card = Card.of(self.card)
        object.__setattr__(self, "card", card)
        if card.metrics or card.step is not None or card.picture is not None:
            raise ConfigError("metrics, step and picture of a card are those of the run: leave them out of HubPush.")
