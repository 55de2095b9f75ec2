"""Many adapters on one running base."""

from lightning_lora.engine.bank.bank import Bank
from lightning_lora.engine.bank.cells import LayerFactors
from lightning_lora.engine.bank.slab import MemoryPlan
from lightning_lora.engine.bank.tiers import Store

__all__ = ["Bank", "LayerFactors", "MemoryPlan", "Store"]
