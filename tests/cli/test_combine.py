from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import LoRAConfig, inject, save_adapter
from tests.hub.models import Linears, shake
from tests.hub_server.plugin import hub  # noqa: F401


@pytest.fixture
def adapters(tmp_path):
    """Two on one base, of ranks 2 and 4, both with a scale of 2."""
    for name, rank in (("a", 2), ("b", 4)):
        torch.manual_seed(0)
        model = Linears()
        inject(model, LoRAConfig(rank=rank, alpha=2 * rank, target_modules=["fc"]))
        shake(model)
        save_adapter(model, tmp_path / name)


def update(folder):
    """alpha / r * B A."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    A, B = (tensors[f"base_model.model.fc.lora_{factor}.weight"].double() for factor in "AB")
    return config["lora_alpha"] / config["r"] * B @ A


GIVEN = ["adapters=[a,b]", "weights=[0.7,-0.3]", "output=out"]


def test_combine_says_what_came_of_it_and_where_it_lies(cli, adapters, tmp_path):
    assert cli("combine", *GIVEN) == 0, cli.err
    assert cli.out.splitlines()[:6] == [
        "combined by sum",
        "   0.7 x a",
        "  -0.3 x b",
        "module  number  ranks  rank  largest error",
        "------  ------  -----  ----  -------------",
        cli.out.splitlines()[5],
    ]
    assert cli.out.splitlines()[5].startswith("fc           1  2 + 4     6")
    assert cli.out.splitlines()[-1] == "folder: out"
    expected = 0.7 * update(tmp_path / "a") - 0.3 * update(tmp_path / "b")
    # Saved in float32.
    torch.testing.assert_close(update(tmp_path / "out"), expected, rtol=1e-6, atol=1e-6)
    assert not (tmp_path / "runs").exists(), "nothing is run, so there is no folder of a run"


@pytest.mark.parametrize("settings", [["method=svd", "rank=3"], ["method=ties", "rank=3", "density=0.5"]])
def test_what_is_cut_off_is_said(cli, adapters, tmp_path, settings):
    assert cli("combine", *GIVEN, *settings) == 0, cli.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 3
    assert "error: 0." in cli.out


def test_a_seed_repeats(cli, adapters, tmp_path):
    def combined(seed):
        assert cli("combine", *GIVEN, "method=dare", "density=0.5", f"seed={seed}") == 0, cli.err
        return update(tmp_path / "out")

    first = combined(1)
    assert torch.equal(first, combined(1))
    assert not torch.equal(first, combined(2))


def test_an_adapter_can_be_negated(cli, adapters, tmp_path):
    assert cli("combine", "adapters=[a]", "weights=[-1]", "output=out") == 0, cli.err
    assert torch.equal(update(tmp_path / "out"), -update(tmp_path / "a"))


def test_adapters_on_the_hub_are_pulled_first(cli, adapters, hub, tmp_path):  # noqa: F811
    for name in "ab":
        files = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
        hub.create_repo(f"user/{name}", files=files)
    assert cli("combine", "adapters=[user/a,user/b]", "weights=[1,1]", "output=out") == 0, cli.err
    assert "1 x user/a" in cli.out


def test_what_cannot_be_is_one_screen_and_writes_nothing(cli, adapters, tmp_path):
    assert "Did you mean 'ties'?" in cli.error("combine", *GIVEN, "method=tise", "density=0.5")
    assert "a number for each of the 2 adapters" in cli.error("combine", *GIVEN, "weights=[1]")
    assert "weights: a value is missing" in cli.error("combine", "adapters=[a,b]", "output=out")
    assert "weights" in cli.error("combine", *GIVEN, "weights=[one,two]")
    assert "Did you mean density?" in cli.error("combine", *GIVEN, "densty=1")
    assert "above 0 and at most 1" in cli.error("combine", *GIVEN, "method=ties", "density=2")
    assert "use method='svd'" in cli.error("combine", *GIVEN, "rank=2")
    assert "would replace one of its adapters" in cli.error("combine", *GIVEN, "output=a")
    assert "no folder" in cli.error("combine", *GIVEN, "adapters=[a,nowhere]")
    assert not (tmp_path / "out").exists()


def test_help_shows_the_settings(cli):
    assert cli("combine", "--help") == 0
    assert "lightning-lora combine adapters=[a,b] weights=[1,1] method=svd rank=8" in cli.out
    assert "method: sum" in cli.out
