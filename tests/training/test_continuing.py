"""`LoRACallback(adapter=...)`: a run that starts from an adapter that was saved, by us or by PEFT."""

from __future__ import annotations

import copy
import logging
import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader

from lightning_lora import LoRACallback, LoRAConfig, inject, load_adapter, save_adapter
from lightning_lora.engine import adapter_state_dict
from lightning_lora.errors import (
    AdapterFormatError,
    AdapterStateError,
    BaseMismatchError,
    CheckpointError,
    ConfigError,
)

from .lit import STYLES, Lit, net, trainer

FIELDS: dict[str, Any] = {"rank": 2, "alpha": 6.0, "target_modules": ["0", "3"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An adapter that is not zero."""
    return saved(tmp_path / "it", **FIELDS)


def saved(path: Path, **fields: Any) -> Path:
    module = Lit()
    inject(module, LoRAConfig(**fields))
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for t in adapter_state_dict(module).values():
            t.add_(0.1 * torch.randn(t.shape, generator=generator))
    return save_adapter(module, path)


def start(callback: LoRACallback, module: Any = None, **settings: Any) -> Any:
    """The module as it is before the first step: a learning rate of 0 keeps it."""
    module = Lit(lr=0.0) if module is None else module
    trainer(callback, **{"max_steps": 1, **settings}).fit(module)
    return module


def same(a: Any, b: Any) -> bool:
    a, b = adapter_state_dict(a), adapter_state_dict(b)
    return a.keys() == b.keys() and all(t.equal(b[name]) for name, t in a.items())


@pytest.mark.parametrize("style", STYLES)
def test_a_run_starts_from_it_wherever_layers_are_built(folder: Path, style: Any) -> None:
    expected = Lit()
    load_adapter(expected, folder)
    callback = LoRACallback(adapter=folder)
    module = start(callback, style(lr=0.0))
    assert same(module, expected)
    assert callback.config.rank == 2
    assert callback.report is not None


def test_a_run_that_measures_first_does_not_say_that_it_has_adapters_already(
    folder: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level(logging.INFO)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero"):
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    module, callback = Lit(), LoRACallback(adapter=folder)
    trainer(callback, max_epochs=1).validate(module, DataLoader(module.train_dataloader().dataset))
    trainer(callback, max_epochs=1).fit(module)
    assert "Training goes on from" in caplog.text
    assert "has adapters already" not in caplog.text
    trainer(callback, max_epochs=1).fit(module)  # from what it has learned
    assert "has adapters already" in caplog.text


@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["5"]}, {"bias": "all"}, {"use_dora": True}], ids=str)
def test_all_of_it_trains_with_a_fresh_optimizer(tmp_path: Path, more: dict[str, Any]) -> None:
    place = saved(tmp_path / "it", **FIELDS, **more)
    module, by_hand = Lit(), Lit()
    trainer(LoRACallback(adapter=str(place)), max_epochs=1).fit(module)
    load_adapter(by_hand, place)
    before = {name: t.clone() for name, t in adapter_state_dict(by_hand).items()}
    trainer(LoRACallback(**FIELDS, **more), max_epochs=1).fit(by_hand)
    assert all(not t.equal(before[name]) for name, t in adapter_state_dict(module).items())
    assert adapter_state_dict(module).keys() == before.keys()


def test_an_adapter_of_peft_is_gone_on_from(tmp_path: Path) -> None:
    model = peft.get_peft_model(net(), peft.LoraConfig(r=4, lora_alpha=4, target_modules=["0", "3"]))
    with torch.no_grad():
        for p in (p for p in model.parameters() if p.requires_grad):
            p.normal_(std=0.1)
    model.save_pretrained(tmp_path / "theirs")
    module = start(LoRACallback(adapter=tmp_path / "theirs", lora_plus_ratio=4.0))
    x = torch.randn(3, 8)
    torch.testing.assert_close(module.eval()(x), model.eval()(x))
    with pytest.raises(AdapterStateError, match=r"rank is 4 there and 2 here\. Leave these settings out"):
        start(LoRACallback(adapter=tmp_path / "theirs", rank=2))


@pytest.mark.parametrize(
    "given",
    [
        {"rank": 2},
        {"target_modules": ["3", "0"]},
        {"target_modules": "all-linear"},
        {"target_modules": r"net\.(0|3)"},
        {"target_modules": "all-linear", "exclude_modules": ["5"]},
        {"rank": 5, "rank_pattern": {"0": 2, "3": 2}},
        {"rank": 2, "alpha": 6, "target_modules": ["net.0", "net.3"]},
    ],
    ids=str,
)
def test_a_config_that_means_the_same_is_the_same(folder: Path, given: dict[str, Any]) -> None:
    expected = Lit()
    load_adapter(expected, folder)
    assert same(start(LoRACallback(adapter=folder, **given)), expected)
    whole = LoRAConfig(**{**FIELDS, **given})
    assert same(start(LoRACallback(whole, adapter=folder)), expected)
    module = Lit(lr=0.0)
    load_adapter(module, folder)
    assert same(start(LoRACallback(whole), module), expected)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"rank": 4, "target_modules": "all-linear"}, r": rank is 2 there and 4 here\. "),
        ({"alpha": 5, "rank": 2}, r": alpha is 6\.0 there and 5\.0 here\. "),
        ({"target_modules": ["0"]}, r": target_modules is .* there and \['0'\] here\. "),
        ({"use_dora": True, "target_modules": ["3", "0"]}, r": use_dora is False there and True here\. "),
        ({"modules_to_save": ["5"]}, r": modules_to_save is None there and \['5'\] here\. "),
        ({"dropout": 0.5}, r": dropout is 0\.0 there and 0\.5 here\. "),
        ({"target_modules": ["nowhere"]}, r": target_modules is .* there and \['nowhere'\] here\. "),
    ],
    ids=str,
)
def test_a_config_that_differs_is_an_error_that_shows_what_differs_alone(
    folder: Path, given: dict[str, Any], said: str
) -> None:
    module = Lit()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(AdapterStateError, match=said):
        start(LoRACallback(adapter=folder, **given), module)
    assert module.state_dict().keys() == before.keys()
    assert all(p.requires_grad for p in module.parameters())


@pytest.mark.filterwarnings("ignore:The dirpath has changed", "ignore:Be aware that when using `ckpt_path`")
def test_a_run_resumes_exactly_and_without_the_folder(folder: Path, tmp_path: Path) -> None:
    def run(epochs: int, where: str, ckpt: Any = None) -> Lit:
        torch.manual_seed(0)
        module = Lit()
        saver = ModelCheckpoint(tmp_path / where, save_last=True, filename="{epoch}", save_top_k=-1)
        fit = trainer(LoRACallback(adapter=folder, lora_plus_ratio=2.0), saver, max_epochs=epochs)
        fit.fit(module, ckpt_path=ckpt)
        return module

    undisturbed = run(3, "a")
    run(1, "b")
    shutil.rmtree(folder)
    assert same(run(3, "c", tmp_path / "b/last.ckpt"), undisturbed)
    saved(folder, rank=3, target_modules=["0"])  # another one has taken its place since
    assert same(run(3, "d", tmp_path / "b/last.ckpt"), undisturbed)
    module, again = Lit(), trainer(LoRACallback(adapter=folder / "gone"), ModelCheckpoint(tmp_path / "d"))
    again.validate(module, ckpt_path=tmp_path / "d/last.ckpt", verbose=False)
    assert same(module, undisturbed)


def test_it_is_evaluated_as_it_is_and_then_trained(folder: Path) -> None:
    expected = Lit()
    load_adapter(expected, folder)
    module, run = Lit(lr=0.0), trainer(LoRACallback(adapter=folder), max_epochs=1)
    run.validate(module, verbose=False)
    assert same(module, expected)
    run.fit(module)
    assert same(module, expected)


def test_a_module_with_adapters_is_refused(folder: Path) -> None:
    module = Lit()
    inject(module, LoRAConfig(**FIELDS))
    with pytest.raises(AdapterStateError, match="has adapters already, and adapter= would load others"):
        start(LoRACallback(adapter=folder), module)


def test_another_base_is_refused(folder: Path) -> None:
    with pytest.raises(BaseMismatchError):
        start(LoRACallback(adapter=folder), Lit(seed=1))
    start(LoRACallback(adapter=folder, check_base=False), Lit(seed=1, lr=0.0))


def test_what_is_no_adapter_says_so(tmp_path: Path) -> None:
    with pytest.raises(AdapterFormatError, match="there is no such folder"):
        start(LoRACallback(adapter=tmp_path / "nothing"))
    with pytest.raises(AdapterFormatError, match="there is no such folder"):
        trainer(LoRACallback(adapter=tmp_path / "nothing")).validate(Lit())
    with pytest.raises(ConfigError, match="is a checkpoint: give it to the Trainer as ckpt_path"):
        LoRACallback(adapter=tmp_path / "last.ckpt")
    with pytest.raises(ConfigError, match="adapter is a folder, or 'user/repo@revision'"):
        LoRACallback(adapter=3)  # type: ignore[arg-type]


def test_an_adapter_folder_that_is_given_as_a_checkpoint_says_what_it_is(folder: Path, tmp_path: Path) -> None:
    for place in (folder, folder / "adapter_model.safetensors"):
        with pytest.raises(
            CheckpointError, match=rf"{folder} is an adapter folder, not a checkpoint.*adapter={folder} "
        ):
            trainer(LoRACallback(**FIELDS), max_epochs=1).fit(Lit(), ckpt_path=place)


def test_launched_processes_start_from_it(folder: Path) -> None:
    expected = Lit()
    load_adapter(expected, folder)
    settings = {"strategy": "ddp_fork", "devices": 2, "max_steps": 1, "limit_val_batches": 0}
    module = Lit(lr=0.0)
    trainer(LoRACallback(adapter=folder), **settings).fit(module)
    assert same(module, expected)


def test_the_child_that_it_was_saved_of_may_have_another_name(tmp_path: Path) -> None:
    class Renamed(Lit):
        def build(self, seed: int) -> None:
            self.backbone = net(seed)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.backbone(x)

    place = saved(tmp_path / "it", **FIELDS)
    module = start(LoRACallback(adapter=place, target_modules="all-linear", rank=2), Renamed(lr=0.0))
    assert isinstance(module.backbone[0], nn.Linear)
    assert set(adapter_state_dict(module)) == {f"backbone.{i}.lora_{f}" for i in (0, 3) for f in "AB"}
