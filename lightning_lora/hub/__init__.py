"""Adapters as files, in the format that PEFT, transformers, vLLM and llama.cpp read."""

from lightning_lora.format.layout import adapter_root
from lightning_lora.hub.adapters import load_adapter, save_adapter

__all__ = ["adapter_root", "load_adapter", "save_adapter"]
