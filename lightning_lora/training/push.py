"""What to push while training goes on, and where to: `LoRACallback(push=HubPush("user/my-adapter"))`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from lightning_lora.checked import flag, number, one_of
from lightning_lora.errors import ConfigError
from lightning_lora.hub.card import Card
from lightning_lora.hub.push.repository import Destination


@dataclass(frozen=True)
class HubPush(Destination):
    """What LoRACallback pushes, and where to. Raises ConfigError for what cannot be."""

    _: KW_ONLY
    every: Literal["checkpoint", "best", "end"] = "checkpoint"
    """Which adapters: of every checkpoint and of the end, of each checkpoint that is the best so far, or of the end."""
    tag_checkpoints: bool = False
    """Tag each commit with its step: "step-120"."""
    push_checkpoints: bool = False
    """Push the training checkpoint too, so that ckpt_path="hf://user/name@revision" resumes from it."""
    timeout_at_end: float = 60.0
    """Seconds that the end of a run waits, at most, for pushes, and a second more for each megabyte of them; after an
    exception or a signal 20 at most."""
    card: Card | Mapping[str, Any] = field(default_factory=Card)
    """What the cards say beside what the run knows by itself: `Card(data="...", front_matter={"license": "mit"})`."""

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
