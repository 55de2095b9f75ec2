"""A URL where a folder on this machine is meant: an error that says so, and no folder named "s3:"."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import (
    AdapterBank,
    Card,
    LoRAConfig,
    inject,
    load_adapter,
    pull_adapter,
    push_adapter,
    save_adapter,
    verify_adapter,
)
from lightning_lora.errors import ConfigError
from lightning_lora.hub.address import local_path
from lightning_lora.rewriting.combine import combine_adapters
from lightning_lora.rewriting.export import export_adapter
from tests.hub.models import Linears, assert_same, state

URLS = ["s3://bucket/adapter", "gs://bucket/adapter", "memory://adapter", "hf://user/adapter", "https://host/adapter"]


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))


def adapted() -> nn.Module:
    model = net()
    inject(model, LoRAConfig(rank=2, target_modules=["0"]))
    return model


ENTRANCES: dict[str, Callable[[Any, Path], Any]] = {
    "save_adapter": lambda url, folder: save_adapter(adapted(), url),
    "load_adapter": lambda url, folder: load_adapter(net(), url),
    "export_adapter from": lambda url, folder: export_adapter(url, folder / "out", consumer="vllm"),
    "export_adapter to": lambda url, folder: export_adapter(folder / "a", url, consumer="vllm"),
    "export_adapter, base": lambda url, folder: export_adapter(folder / "a", folder / "out", consumer="vllm", base=url),
    "combine_adapters from": lambda url, folder: combine_adapters([url], folder / "out", weights=[1]),
    "combine_adapters, weight 0": lambda url, folder: combine_adapters(
        [folder / "a", url], folder / "out", weights=[1, 0]
    ),
    "combine_adapters to": lambda url, folder: combine_adapters([folder / "a"], url, weights=[1]),
    "bank.add": lambda url, folder: AdapterBank(net(), 2).add("x", url),
    "bank, disk": lambda url, folder: AdapterBank(net(), 2, host_capacity=1, disk=url),
    "bank.from_folders": lambda url, folder: AdapterBank.from_folders(net(), url),
    "bank.from_folders, by name": lambda url, folder: AdapterBank.from_folders(net(), {"x": url}),
    "push_adapter": lambda url, folder: push_adapter(url, "user/adapter"),
    "push_adapter, picture": lambda url, folder: push_adapter(folder / "a", "user/adapter", card=Card(picture=url)),
    "pull_adapter to": lambda url, folder: pull_adapter("user/adapter", local_dir=url),
    "pull_adapter, cache": lambda url, folder: pull_adapter("user/adapter", cache_dir=url),
}


READS_THE_HUB = ("load_adapter", "bank.add", "export_adapter from", "combine_adapters from")


@pytest.mark.parametrize(
    ("entrance", "url"),
    [(e, u) for e in ENTRANCES for u in (URLS[0], Path(URLS[0]), URLS[3]) if e not in READS_THE_HUB or u != URLS[3]],
)
def test_a_url_is_refused_wherever_a_folder_is_taken(
    entrance: str, url: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_adapter(adapted(), tmp_path / "a")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    (tmp_path / "here" / "s3:" / "bucket" / "adapter").mkdir(parents=True)  # what an earlier version may have left
    with pytest.raises(ConfigError, match="is no folder on this machine, and remote folders are not supported yet"):
        ENTRANCES[entrance](url, tmp_path)
    assert [p.name for p in (tmp_path / "here").iterdir()] == ["s3:"]
    assert list((tmp_path / "here" / "s3:" / "bucket" / "adapter").iterdir()) == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("url", URLS)
def test_whatever_the_scheme_is(url: str) -> None:
    with pytest.raises(ConfigError, match="remote folders"):
        local_path(url)
    with pytest.raises(ConfigError, match="remote folders"):
        local_path(Path(url))  # a Path has lost one of the slashes


def test_what_is_a_path_stays_one(tmp_path: Path) -> None:
    for path in ("user/adapter", "./x", "C:/adapters/x", "a:b/c", "runs/lr=1e-4:seed=1/x", str(tmp_path), tmp_path):
        assert local_path(path) == Path(path)
    assert local_path("~/x") == Path.home() / "x"
    assert local_path(f"file://{tmp_path}/with%20space") == tmp_path / "with space"
    with pytest.raises(ConfigError, match="A path is a str or a Path, not a int"):
        local_path(3)


def test_an_argument_that_there_is_not_is_an_error_for_a_local_folder_too(files, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    model = Linears()
    before, bank = state(model), AdapterBank(Linears())
    wrong: Any = {"check_bas": False}  # else the misspelt name would be passed over in silence
    with pytest.raises(TypeError, match="check_bas"):
        load_adapter(model, folder, **wrong)
    assert_same(before, state(model))
    for adapter in (folder, model):
        with pytest.raises(TypeError, match="check_bas"):
            bank.add("it", adapter, **wrong)
    load_adapter(model, folder, check_base=False)
    with pytest.raises(TypeError, match="check_bas"):
        verify_adapter(model, folder, **wrong)
