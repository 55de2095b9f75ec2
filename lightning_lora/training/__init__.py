"""Lightning: the callback, its checkpoints, tasks and data modules."""

from lightning_lora.training.callback import LoRACallback
from lightning_lora.training.checkpoint import load_from_checkpoint

__all__ = ["LoRACallback", "load_from_checkpoint"]
