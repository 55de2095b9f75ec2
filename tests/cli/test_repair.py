from __future__ import annotations

import json

import pytest
import torch
from conftest import THEIRS
from transformers import AutoTokenizer

from lightning_lora import LoRAConfig, inject, pairs, save_adapter
from lightning_lora.embedded import BASE
from tests.tiny_transformers import llama


@pytest.fixture
def adapter(tmp_path):
    """A tiny causal language model with the embedded base's tokenizer, in "base"; and an adapter with intruders."""
    torch.manual_seed(0)
    model = llama(layers=1, words=259)
    model.save_pretrained(tmp_path / "base")
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path / "base")
    inject(model, LoRAConfig(rank=2, alpha=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for pair in pairs(model):
            pair.B.normal_(std=0.5)
    return save_adapter(model, tmp_path / "a")


def curve(text):
    """The rows of the printed curve: strength -> its cells."""
    lines = text.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("strength"))
    rows = [line.split() for line in lines[head + 2 :] if line.strip()[:1].isdigit()]
    return [name for name in lines[head].split("  ") if name], {float(row[0]): row[1:] for row in rows}


def test_the_curve_is_printed_and_the_chosen_strength_is_written(cli, adapter, tmp_path):
    given = ["repair", "adapter=a", "output=out", "model=pretrained", "model.name=base", "trainer=cpu"]
    assert cli(*given, "strength=0.25", "strengths=[0.25,0]", "threshold=0.8") == 0, cli.err
    head, rows = curve(cli.out)
    assert [name.strip() for name in head] == ["strength", "intruders", "update kept", "bits per byte"]
    assert list(rows) == [1.0, 0.25, 0.0]
    before, chosen, none = rows.values()
    assert int(before[0]) >= int(chosen[0]) > 0 or int(none[0]) < int(before[0])
    assert before[1] == "100.0"
    assert float(chosen[1]) < 100
    assert all(0 < float(row[3]) < 20 for row in rows.values())
    assert chosen[-1] == "written"
    assert cli.out.splitlines()[-1] == "folder: out"
    assert json.loads((tmp_path / "out/adapter_config.json").read_text())["r"] == 2
    assert not (tmp_path / "runs").exists(), "nothing is run, so there is no folder of a run"


@pytest.mark.slow
def test_where_data_is_given_the_loss_is_measured_at_each_strength(cli, tmp_path):
    assert cli.train("lora.rank=4", "optimizer.lr=0.5") == 0, cli.err
    run, after = cli.folder, cli.results["after"]
    assert cli("repair", f"run={run}", "output=out", "threshold=1.5", "strengths=[0]") == 0, cli.err
    head, rows = curve(cli.out)
    names = [name.strip() for name in head]
    assert sorted(names[3:]) == sorted(after)
    at = names.index("val_loss") + 1  # the cell "100.0 %" is two words
    assert float(rows[1.0][at - 1]) == pytest.approx(after["val_loss"], rel=1e-3)
    assert "note: no bits per byte of general text" in cli.out
    assert cli("evaluate", f"run={run}", "adapter=out") == 0, cli.err
    repaired = json.loads((cli.folder / "metrics.json").read_text())
    assert float(rows[0.5][at - 1]) == pytest.approx(repaired["val_loss"], rel=1e-3)

    given = ["repair", *THEIRS[:5], f"adapter={run}/adapter"]
    assert cli(*given, "output=other", "data._target_=standin.Sumz") == 2
    assert "Did you mean standin.Sums?" in cli.err
    assert not (tmp_path / "other").exists(), "what is wrong with the data is said before anything is written"


def test_where_there_is_no_intruder_it_is_said(cli, adapter, tmp_path):
    given = ["repair", "adapter=a", "output=out", "model=pretrained", "model.name=base", "trainer=cpu"]
    assert cli(*given, "threshold=0.001") == 0, cli.err
    assert "nothing was written" in cli.out
    assert "folder:" not in cli.out
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_is_one_screen_and_writes_nothing(cli, adapter, tmp_path):
    given = ["repair", "adapter=a", "output=out", "model=pretrained", "model.name=base", "trainer=cpu"]
    assert "would leave the adapter as it is" in cli.error(*given, "strength=1.0")
    assert "Did you mean strength" in cli.error(*given, "strenght=0.5")
    assert "no such folder" in cli.error("repair", "adapter=./nowhere", "output=out", "trainer=cpu")
    assert "run=FOLDER" in cli.error("repair", "output=out")
    assert "Nothing was changed" in cli.error("repair", "adapter=a", "output=out", "trainer=cpu")
    assert not (tmp_path / "out").exists()


def test_help_shows_the_settings(cli):
    assert cli("repair", "--help") == 0
    assert "lightning-lora repair run=RUN output=REPAIRED" in cli.out
    assert "strength: 0.5" in cli.out
