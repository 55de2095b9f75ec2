"""The mathematics and the surgery: plain functions on any nn.Module, with torch alone."""

from lightning_lora.engine.config import LoRAConfig
from lightning_lora.engine.disabling import disabled
from lightning_lora.engine.inject import Injection, inject, injection_of, injections, remove
from lightning_lora.engine.layers import Adapter, Pair, adapters, pairs
from lightning_lora.engine.low_rank import effective_rank, stable_rank
from lightning_lora.engine.merge import merge, merged
from lightning_lora.engine.report import AdaptedModule, InjectionReport
from lightning_lora.engine.start import start_adapters
from lightning_lora.engine.state import adapter_state_dict, adapter_tensors, base_fingerprint, load_adapter_state_dict

__all__ = [
    "AdaptedModule",
    "Adapter",
    "Injection",
    "InjectionReport",
    "LoRAConfig",
    "Pair",
    "adapter_state_dict",
    "adapter_tensors",
    "adapters",
    "base_fingerprint",
    "disabled",
    "effective_rank",
    "inject",
    "injection_of",
    "injections",
    "load_adapter_state_dict",
    "merge",
    "merged",
    "pairs",
    "remove",
    "stable_rank",
    "start_adapters",
]
