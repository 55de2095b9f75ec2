"""LoRA for any PyTorch Lightning model: one callback, in the format that the whole ecosystem reads.

    from lightning_lora import LoRACallback
    trainer = Trainer(callbacks=[LoRACallback(rank=8, alpha=16)])

The names below are public. They are imported when first used: `import lightning_lora` costs nothing beyond torch's
own import, and the engine works where Lightning is not installed.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOME = {
    "LoRAConfig": "lightning_lora.engine",
    "InjectionReport": "lightning_lora.engine",
    "InspectionReport": "lightning_lora.analysis.inspection_page",
    "inject": "lightning_lora.engine",
    "remove": "lightning_lora.engine",
    "merge": "lightning_lora.engine",
    "merged": "lightning_lora.engine",
    "disabled": "lightning_lora.engine",
    "adapter_state_dict": "lightning_lora.engine",
    "load_adapter_state_dict": "lightning_lora.engine",
    "resize": "lightning_lora.engine.resize",
    "ResizeReport": "lightning_lora.engine.cut",
    "save_adapter": "lightning_lora.hub",
    "load_adapter": "lightning_lora.hub",
    "Adapter": "lightning_lora.engine",
    "pairs": "lightning_lora.engine",
    "init": "lightning_lora.engine.inits",
    "measure": "lightning_lora.engine.inits",
    "calibrate": "lightning_lora.engine.calibration",
    "AdapterBank": "lightning_lora.hub.bank",
    "MemoryPlan": "lightning_lora.engine.bank",
    "Card": "lightning_lora.hub.card",
    "CombineReport": "lightning_lora.rewriting.combinable",
    "DryRun": "lightning_lora.hub.push",
    "ExportReport": "lightning_lora.rewriting.export",
    "combine_adapters": "lightning_lora.rewriting.combine",
    "export_adapter": "lightning_lora.rewriting.export",
    "inspect_adapter": "lightning_lora.analysis.inspect",
    "VerifyReport": "lightning_lora.hub.verify",
    "make_certificate": "lightning_lora.analysis.certificate",
    "ServerReport": "lightning_lora.analysis.served",
    "verify_server": "lightning_lora.analysis.served",
    "verify_adapter": "lightning_lora.hub.verify",
    "pull_adapter": "lightning_lora.hub.pull",
    "push_adapter": "lightning_lora.hub.push",
    "RepairReport": "lightning_lora.rewriting.repair",
    "repair_adapter": "lightning_lora.rewriting.repair",
    "resize_adapter": "lightning_lora.rewriting.resize",
    "AdapterColumn": "lightning_lora.training.adapter_column",
    "AdapterMonitor": "lightning_lora.training.monitor",
    "ForgettingMonitor": "lightning_lora.training.forgetting",
    "HubPush": "lightning_lora.training.push",
    "LoRACallback": "lightning_lora.training",
    "MultiLoRACallback": "lightning_lora.training.many",
    "load_from_checkpoint": "lightning_lora.training",
    "Advice": "lightning_lora.training.advice",
    "advise": "lightning_lora.training.advise",
    "LightningLoRAError": "lightning_lora.errors",
}

__all__ = [
    "Adapter",
    "AdapterBank",
    "AdapterColumn",
    "AdapterMonitor",
    "Advice",
    "Card",
    "CombineReport",
    "DryRun",
    "ExportReport",
    "ForgettingMonitor",
    "HubPush",
    "InjectionReport",
    "InspectionReport",
    "LightningLoRAError",
    "LoRACallback",
    "LoRAConfig",
    "MemoryPlan",
    "MultiLoRACallback",
    "RepairReport",
    "ResizeReport",
    "ServerReport",
    "VerifyReport",
    "adapter_state_dict",
    "advise",
    "calibrate",
    "combine_adapters",
    "disabled",
    "export_adapter",
    "init",
    "inject",
    "inspect_adapter",
    "load_adapter",
    "load_adapter_state_dict",
    "load_from_checkpoint",
    "make_certificate",
    "measure",
    "merge",
    "merged",
    "pairs",
    "pull_adapter",
    "push_adapter",
    "remove",
    "repair_adapter",
    "resize",
    "resize_adapter",
    "save_adapter",
    "verify_adapter",
    "verify_server",
]

if TYPE_CHECKING:
    from lightning_lora.analysis.certificate import make_certificate
    from lightning_lora.analysis.inspect import inspect_adapter
    from lightning_lora.analysis.inspection_page import InspectionReport
    from lightning_lora.analysis.served import ServerReport, verify_server
    from lightning_lora.engine import (
        Adapter,
        InjectionReport,
        LoRAConfig,
        adapter_state_dict,
        disabled,
        inject,
        load_adapter_state_dict,
        merge,
        merged,
        pairs,
        remove,
    )
    from lightning_lora.engine.bank import MemoryPlan
    from lightning_lora.engine.calibration import calibrate
    from lightning_lora.engine.cut import ResizeReport
    from lightning_lora.engine.inits import init, measure
    from lightning_lora.engine.resize import resize
    from lightning_lora.errors import LightningLoRAError
    from lightning_lora.hub import load_adapter, save_adapter
    from lightning_lora.hub.bank import AdapterBank
    from lightning_lora.hub.card import Card
    from lightning_lora.hub.pull import pull_adapter
    from lightning_lora.hub.push import DryRun, push_adapter
    from lightning_lora.hub.verify import VerifyReport, verify_adapter
    from lightning_lora.rewriting.combinable import CombineReport
    from lightning_lora.rewriting.combine import combine_adapters
    from lightning_lora.rewriting.export import ExportReport, export_adapter
    from lightning_lora.rewriting.repair import RepairReport, repair_adapter
    from lightning_lora.rewriting.resize import resize_adapter
    from lightning_lora.training import LoRACallback, load_from_checkpoint
    from lightning_lora.training.adapter_column import AdapterColumn
    from lightning_lora.training.advice import Advice
    from lightning_lora.training.advise import advise
    from lightning_lora.training.forgetting import ForgettingMonitor
    from lightning_lora.training.many import MultiLoRACallback
    from lightning_lora.training.monitor import AdapterMonitor
    from lightning_lora.training.push import HubPush


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOME])
