"""The names that users and other programs rely on."""

from __future__ import annotations

import pytest

import lightning_lora

NAMES = [
    "Adapter",
    "Advice",
    "advise",
    "Card",
    "CombineReport",
    "DryRun",
    "ExportReport",
    "ForgettingMonitor",
    "InjectionReport",
    "InspectionReport",
    "LightningLoRAError",
    "MemoryPlan",
    "RepairReport",
    "ResizeReport",
    "ServerReport",
    "VerifyReport",
    "make_certificate",
    "calibrate",
    "init",
    "measure",
    "pairs",
    "AdapterBank",
    "AdapterColumn",
    "AdapterMonitor",
    "HubPush",
    "LoRACallback",
    "LoRAConfig",
    "MultiLoRACallback",
    "adapter_state_dict",
    "combine_adapters",
    "disabled",
    "export_adapter",
    "inject",
    "inspect_adapter",
    "load_adapter",
    "load_adapter_state_dict",
    "load_from_checkpoint",
    "merge",
    "merged",
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


@pytest.mark.parametrize("name", NAMES)
def test_a_public_name_can_be_imported_and_is_documented(name: str):
    assert name in lightning_lora.__all__
    assert name in dir(lightning_lora)
    assert getattr(lightning_lora, name).__doc__


def test_every_name_in_all_is_there():
    assert all(hasattr(lightning_lora, name) for name in lightning_lora.__all__)


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'injekt'"):
        lightning_lora.injekt  # noqa: B018


def test_public_objects_show_what_they_are():
    public = [getattr(lightning_lora, name) for name in NAMES]
    classes = [c for c in public if isinstance(c, type) and not issubclass(c, Exception)]
    silent = {c.__name__ for c in classes if c.__repr__ is object.__repr__}
    assert silent == {"Adapter"}, "a mixin, whose layers show their own class"
    assert repr(lightning_lora.LoRACallback(adapter="user/it@v1")) == "LoRACallback(adapter='user/it@v1')"
    monitor = lightning_lora.ForgettingMonitor(["one", "two"])
    assert repr(monitor) == "ForgettingMonitor(2 texts, measures general/bits_per_byte)"
