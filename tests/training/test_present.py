"""A module that has adapters before a run: what goes on is said, and reported; what is meant otherwise is an error."""

from __future__ import annotations

import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from lightning_lora import LoRACallback, LoRAConfig, inject, load_adapter, merge, merged, remove, save_adapter
from lightning_lora.engine import adapter_state_dict, injection_of
from lightning_lora.engine.report import InjectionReport
from lightning_lora.errors import AdapterStateError

from .lit import Lit, trainer

GOES_ON = "Lit has adapters already (2 modules, rank 2): training goes on from them. To start anew, call "


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level(logging.INFO)
    for name in ("lightning.pytorch", "lightning.pytorch.utilities.rank_zero", "lightning.fabric"):
        logging.getLogger(name).propagate = True

    def lines() -> list[str]:
        found = [r.getMessage() for r in caplog.records if "has adapters already" in r.getMessage()]
        caplog.clear()
        return found

    return lines


def cell(module: Lit, **fields: Any) -> LoRACallback:
    """What a notebook's cell does, each time that it is run."""
    callback = LoRACallback(**{"rank": 2, **fields})
    trainer(callback, max_epochs=1).fit(module)
    return callback


def test_a_cell_that_is_run_again_says_that_it_goes_on_and_how_to_start_anew(said: Any) -> None:
    module = Lit()
    first = cell(module)
    assert said() == []
    before = adapter_state_dict(module)["net.0.lora_B"].clone()
    again = cell(module)
    assert said() == [f"{GOES_ON}lightning_lora.remove(module) before you fit."]
    assert again.report == first.report
    assert not torch.equal(adapter_state_dict(module)["net.0.lora_B"], before)
    remove(module)
    cell(module)
    assert said() == []


def test_a_second_fit_of_one_callback_says_so_too(said: Any) -> None:
    module, callback = Lit(), LoRACallback(rank=2)
    for expected in (0, 1):
        trainer(callback, max_epochs=1).fit(module)
        assert len(said()) == expected
    assert isinstance(callback.report, InjectionReport)


def test_a_test_with_a_new_callback_has_its_report(said: Any) -> None:
    module = Lit()
    first = cell(module)
    callback = LoRACallback(rank=2)
    trainer(callback).test(module, verbose=False)
    assert callback.report == first.report
    assert said() == []


def test_a_run_that_a_checkpoint_is_loaded_into_goes_on_from_that(said: Any, tmp_path: Path) -> None:
    module = Lit()
    run = trainer(LoRACallback(rank=2), max_epochs=1)
    run.fit(module)
    run.save_checkpoint(tmp_path / "it.ckpt")
    callback = LoRACallback(rank=2)
    trainer(callback, max_epochs=2).fit(module, ckpt_path=tmp_path / "it.ckpt")
    assert said() == []
    assert callback.report is not None


def test_adapters_of_inject_are_reported_by_the_names_of_the_module(said: Any) -> None:
    module = Lit()
    inject(module.net, LoRAConfig(rank=2, modules_to_save=["5"]))
    module.aside = nn.Linear(3, 3).requires_grad_(False)
    report = cell(module, modules_to_save=["5"]).report
    assert said() == ["Lit has adapters already (2 modules, rank 2), as inject left them."]
    assert report is not None
    assert [m.name for m in report.modules] == ["net.0", "net.3"]
    assert report.trained_whole == ("net.5.weight", "net.5.bias")
    everything = {p: p.numel() for p in module.parameters()}
    assert report.trainable == sum(n for p, n in everything.items() if p.requires_grad)
    assert report.trainable + report.frozen == sum(everything.values())


def test_an_adapter_that_was_loaded_goes_on_with_a_config_that_means_the_same(said: Any, tmp_path: Path) -> None:
    module = Lit()
    cell(module)
    save_adapter(module, tmp_path / "it")
    loaded = Lit()
    load_adapter(loaded, tmp_path / "it")
    assert injection_of(loaded).config.target_modules != "all-linear", "which the file spells out"
    with pytest.raises(AdapterStateError, match=r"callback's: modules_to_save is None there and .* here\. To start"):
        cell(loaded, modules_to_save=["net.5"])
    said()
    cell(loaded)
    assert len(said()) == 1
    with pytest.raises(AdapterStateError, match=r"target_modules is .* there and \['0'\] here\. To start"):
        cell(loaded, target_modules=["0"])
    callback = LoRACallback(injection_of(loaded).config)
    trainer(callback, max_epochs=1).fit(loaded)
    assert len(said()) == 1
    assert callback.report is not None


def test_another_config_is_an_error_that_shows_what_differs_alone() -> None:
    module = Lit()
    cell(module, dropout=0.1)
    before = {name: t.clone() for name, t in adapter_state_dict(module).items()}
    differs = re.escape("rank is 2 there and 4 here, dropout is 0.1 there and 0.0 here. To start anew, call lightning")
    with pytest.raises(AdapterStateError, match=f"of another config than this callback's: {differs}") as error:
        cell(module, rank=4)
    assert "alpha" not in str(error.value)
    assert all(torch.equal(t, before[name]) for name, t in adapter_state_dict(module).items())


def test_adapters_of_several_injections_are_an_error() -> None:
    module = Lit()
    inject(module.net[0], LoRAConfig(rank=2))
    inject(module.net[3], LoRAConfig(rank=2))
    with pytest.raises(AdapterStateError, match=r"several calls of inject \(on 'net\.0', 'net\.3'\)"):
        cell(module)


def test_a_part_of_what_was_injected_is_an_error() -> None:
    outer: Any = nn.ModuleDict({"lit": Lit()})
    inject(outer, LoRAConfig(rank=2))
    with pytest.raises(AdapterStateError, match="of an inject on a module around it"):
        cell(outer["lit"])


@pytest.mark.parametrize("part", ["", "net"])
def test_a_merged_module_gets_no_second_adapter(part: str) -> None:
    module = Lit()
    injected = module.get_submodule(part)
    inject(injected, LoRAConfig(rank=2))
    with merged(injected), pytest.raises(AdapterStateError, match="is merged: leave"):
        cell(module)


def test_a_module_whose_adapter_was_merged_for_good_starts_anew(said: Any) -> None:
    module = Lit()
    cell(module)
    merge(module)
    cell(module)
    assert said() == []


def test_layers_that_were_replaced_after_the_last_run_are_an_error() -> None:
    module = Lit()
    cell(module)
    module.net[3] = nn.Linear(32, 32)
    with pytest.raises(AdapterStateError, match=r"net\.3 has no adapter any more"):
        cell(module)
