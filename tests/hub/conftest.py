"""What the tests of this folder share: the Hub on loopback, and an adapter to put there."""

from __future__ import annotations

import time
import types
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.hub import client as calls
from tests.hub.models import Linears
from tests.hub_server.plugin import hub, xet

__all__ = ["hub", "xet"]


@pytest.fixture
def short_waits(monkeypatch):
    """Between one try and the next, of ours and of the client's."""
    monkeypatch.setattr(calls, "WAITS", (0.05, 0.1, 0.2, 0.2))
    quick = types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: time.sleep(seconds / 20)})
    for module in ("huggingface_hub.file_download", "huggingface_hub.utils._http"):
        monkeypatch.setattr(f"{module}.time", quick)


@pytest.fixture(scope="module")
def source():
    """An adapted model, as if it was trained."""
    torch.manual_seed(3)
    model = Linears()
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    nn.init.normal_(model.fc.lora_B)
    return model


@pytest.fixture(scope="module")
def files(source, tmp_path_factory):
    """Its folder, as name -> content."""
    folder = save_adapter(source, tmp_path_factory.mktemp("saved") / "adapter")
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def repository(hub, files):
    """The adapter as user/adapter, which is private and holds more than that."""
    more = {"training_args.bin": b"pickle", "adapter_model.bin": b"pickle", "x/y.txt": b""}
    return hub.create_repo("user/adapter", private=True, files={**files, **more})


@pytest.fixture
def cached():
    """A function that lists what the cache holds of adapters, and what was left half done."""

    def listed() -> list[Path]:
        cache = Path(constants.HF_HUB_CACHE)
        return [path for path in cache.rglob("*") if path.name.startswith("adapter_") or path.name.endswith(".tmp")]

    return listed
