"""Several adapters, trained in one run on one frozen base."""

from lightning_lora.training.many.callback import MultiLoRACallback

__all__ = ["MultiLoRACallback"]
