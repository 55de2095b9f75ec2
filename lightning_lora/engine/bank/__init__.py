"""Serves many adapters on one running base: `Bank` holds them in slots, and a routing says which row uses which."""

from lightning_lora.engine.bank.bank import Bank
from lightning_lora.engine.bank.slab import MemoryPlan
from lightning_lora.engine.bank.slots import USUAL_RANK, Store
from lightning_lora.engine.layers.cell import LayerFactors

__all__ = ["USUAL_RANK", "Bank", "LayerFactors", "MemoryPlan", "Store"]
