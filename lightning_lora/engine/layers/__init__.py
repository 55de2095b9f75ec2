"""One file per kind of layer; `base.py` has what they share. Importing this package registers them all."""

from lightning_lora.engine.layers import conv, embedding
from lightning_lora.engine.layers.base import Adapter, adapters, geometry_of, pairs
from lightning_lora.engine.layers.dora import DoRA
from lightning_lora.engine.layers.linear import LinearLoRA, register_conv1d
from lightning_lora.engine.layers.pair import FACTORS, AdapterSpec, Pair
from lightning_lora.engine.layers.parameters import ParameterLoRA

__all__ = [
    "FACTORS",
    "Adapter",
    "AdapterSpec",
    "DoRA",
    "LinearLoRA",
    "Pair",
    "ParameterLoRA",
    "adapters",
    "conv",
    "embedding",
    "geometry_of",
    "pairs",
    "register_conv1d",
]
