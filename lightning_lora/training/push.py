"""What to push while training goes on, and where to: `LoRACallback(push=HubPush("user/my-adapter"))`."""

from __future__ import annotations

from dataclasses import KW_ONLY, dataclass, field
from typing import Any, Literal

from lightning_lora.checked import flag, number, one_of
from lightning_lora.errors import ConfigError
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
    wait: float = 60.0
    """Seconds that the end of a run waits, at most, for pushes, and a second more for each megabyte of them; after an
    exception or a signal 20 at most."""
    data: str | None = None
    """What it was trained on, for the card."""
    datasets: tuple[str, ...] = ()
    """Their ids on the Hub, for the card."""
    card: dict[str, Any] = field(default_factory=dict)
    """Entries for the front matter of the card: license, language, tags."""

    def __post_init__(self) -> None:
        super().__post_init__()
        one_of("every", self.every, ("checkpoint", "best", "end"))
        number("wait", self.wait, least=0, unit="seconds")
        for name in ("tag_checkpoints", "push_checkpoints"):
            flag(name, getattr(self, name))
        if isinstance(self.datasets, str):
            raise ConfigError(f"datasets is {self.datasets!r}; give a list of ids.")
