"""One file per kind of layer; `base.py` has what they share. Importing this package registers them all."""

from lightning_lora.engine.layers import conv, embedding
from lightning_lora.engine.layers.base import FACTORS, Adapter, AdapterSpec, adapters, geometry_of
from lightning_lora.engine.layers.conv1d import register_conv1d
from lightning_lora.engine.layers.linear import LinearLoRA, WeightReadLinearLoRA

__all__ = [
    "FACTORS",
    "Adapter",
    "AdapterSpec",
    "LinearLoRA",
    "WeightReadLinearLoRA",
    "adapters",
    "conv",
    "embedding",
    "geometry_of",
    "register_conv1d",
]
