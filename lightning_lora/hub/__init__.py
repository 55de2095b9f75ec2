"""Adapters between models, folders and the Hub: saved, loaded, verified, pushed, pulled, and served by a bank."""

from lightning_lora.format.layout import adapter_root
from lightning_lora.hub.adapters import load_adapter, save_adapter

__all__ = ["adapter_root", "load_adapter", "save_adapter"]
