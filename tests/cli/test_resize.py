from __future__ import annotations

import json

import pytest
import torch
from conftest import THEIRS
from safetensors.torch import load_file

from lightning_lora import LoRAConfig, inject, save_adapter
from tests.hub.models import Linears, shake


@pytest.fixture
def adapter(tmp_path):
    """Of rank 6, with a scale of 2."""
    torch.manual_seed(0)
    model = Linears()
    inject(model, LoRAConfig(rank=6, alpha=12, target_modules=["fc", "0"]))
    shake(model)
    return save_adapter(model, tmp_path / "a")


def update(folder):
    """alpha / r * B A of one module."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    A, B = (tensors[f"base_model.model.fc.lora_{factor}.weight"].double() for factor in "AB")
    return config["lora_alpha"] / config["r"] * B @ A


def test_resize_says_what_it_costs_and_where_it_lies(cli, adapter, tmp_path):
    assert cli("resize", "adapter=a", "output=out", "rank=2") == 0, cli.err
    lines = cli.out.splitlines()
    assert lines[:3] == [
        "resized to rank 2",
        "module  number  rank    largest error",
        "------  ------  ------  -------------",
    ]
    assert lines[3].startswith("0            1  6 -> 2")
    assert lines[5].startswith("2 modules; 180 -> 60 parameters; error: 0.")
    assert lines[-1] == "folder: out"
    dense, now = update(adapter), update(tmp_path / "out")
    U, S, Vh = torch.linalg.svd(dense)
    torch.testing.assert_close(now, U[:, :2] * S[:2] @ Vh[:2], rtol=1e-5, atol=1e-6)
    assert not (tmp_path / "runs").exists(), "nothing is run, so there is no folder of a run"


@pytest.mark.slow
def test_where_data_is_given_the_loss_is_measured_before_and_after(cli, tmp_path):
    assert cli.train("lora.rank=4", "optimizer.lr=0.05") == 0, cli.err
    run, after = cli.folder, cli.results["after"]
    assert cli("resize", f"run={run}", "output=out", "rank=1") == 0, cli.err
    rows = {row[0]: row[1:] for line in cli.out.splitlines() if (row := line.split()) and row[0] in after}
    assert cli("evaluate", f"run={run}", "adapter=out") == 0, cli.err
    cut = json.loads((cli.folder / "metrics.json").read_text())
    assert {name: [f"{after[name]:.4g}", f"{cut[name]:.4g}"] for name in after} == {
        name: [f"{float(value):.4g}" for value in values] for name, values in rows.items()
    }
    assert cut["val_loss"] != after["val_loss"]

    given = ["resize", *THEIRS[:5], f"adapter={run}/adapter"]
    assert cli(*given, "output=other", "rank=1", "data._target_=standin.Sumz") == 2
    assert "Did you mean standin.Sums?" in cli.err
    assert not (tmp_path / "other").exists(), "what is wrong with the data is said before anything is written"


def test_what_cannot_be_is_one_screen_and_writes_nothing(cli, adapter, tmp_path):
    given = ["resize", "adapter=a", "output=out"]
    assert "Give one of rank, energy and max_error; none was given" in cli.error(*given)
    assert "rank and energy was given" in cli.error(*given, "rank=2", "energy=0.5")
    assert "above 0 and at most 1" in cli.error(*given, "energy=2")
    assert "Did you mean energy?" in cli.error(*given, "enrgy=0.5")
    assert "would replace the adapter itself" in cli.error("resize", "adapter=a", "output=a", "rank=2")
    assert "no folder" in cli.error("resize", "adapter=nowhere", "output=out", "rank=2")
    assert "run=FOLDER" in cli.error("resize", "output=out", "rank=2")
    assert not (tmp_path / "out").exists()


def test_help_shows_the_settings(cli):
    assert cli("resize", "--help") == 0
    assert "lightning-lora resize adapter=user/name output=FOLDER energy=0.95" in cli.out
    assert "max_error: null" in cli.out
