from __future__ import annotations

import shutil

import pytest
import torch

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.embedded import BASE
from tests.hub.models import Linears, shake
from tests.hub_server.plugin import hub  # noqa: F401


@pytest.fixture
def adapters(tmp_path):
    for seed, name in enumerate("ab"):
        torch.manual_seed(0)
        model = Linears()
        torch.manual_seed(seed)
        inject(model, LoRAConfig(rank=2, target_modules=["fc", "block.0"]))
        shake(model)
        save_adapter(model, tmp_path / name)


def test_inspect_prints_a_table_and_writes_a_page(cli, adapters, tmp_path):
    assert cli("inspect", "adapter=a", "adapter2=b", "output=page.html") == 0, cli.err
    lines = cli.out.splitlines()
    assert lines[0] == "a beside b"
    assert lines[1].split("  ")[0] == "layer"
    assert any(line.startswith("fc ") for line in lines)
    assert lines[-2:] == ["nothing odd was found", "page: page.html"]
    assert "Beside b" in (tmp_path / "page.html").read_text()
    assert not (tmp_path / "runs").exists(), "nothing is run, so there is no folder of a run"


def test_the_curves_of_a_run_are_shown_where_its_adapter_lies(cli, adapters, tmp_path):
    for place in ("run/adapter", "run/checkpoints/best-adapter"):
        shutil.copytree(tmp_path / "a", tmp_path / place)
        (tmp_path / "run/metrics.csv").write_text("epoch,step,train_loss,val_loss\n0,1,2.0,\n0,2,,1.5\n")
        assert cli("inspect", f"adapter={place}") == 0, cli.err
        assert "The training run" in (tmp_path / "inspection.html").read_text()
        (tmp_path / "run/metrics.csv").write_text("theirs\n1\n")
        assert cli("inspect", f"adapter={place}") == 0, cli.err
        assert "The training run" not in (tmp_path / "inspection.html").read_text()


def test_a_base_is_named_as_for_any_command(cli, tmp_path):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(BASE)
    inject(model, LoRAConfig(rank=2, target_modules=["layers.0.self_attn.q_proj", "layers.3.self_attn.q_proj"]))
    shake(model)
    save_adapter(model, tmp_path / "a")
    for base in ("embedded", str(BASE)):
        assert cli("inspect", "adapter=a", f"model={base}") == 0, cli.err
        assert cli.out.splitlines()[0] == f"a, on {base}"
        assert "amplification" in cli.out
    assert "Amplification" in (tmp_path / "inspection.html").read_text()


def test_an_adapter_on_the_hub_is_pulled_first(cli, adapters, hub, tmp_path):  # noqa: F811
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    hub.create_repo("user/a", files=files)
    assert cli("inspect", "adapter=user/a", "adapter2=b") == 0, cli.err
    assert cli.out.startswith("user/a beside b")


def test_what_cannot_be_is_one_screen_and_writes_nothing(cli, adapters, tmp_path):
    assert "no folder" in cli.error("inspect", "adapter=nowhere")
    assert "adapter: a value is missing" in cli.error("inspect")
    assert "Did you mean adapter2?" in cli.error("inspect", "adapter=a", "adaptor2=b")
    assert "give the name of a file" in cli.error("inspect", "adapter=a", "output=a")
    assert "give the name of a file" in cli.error("inspect", "adapter=a", "output=nowhere/page.html")
    assert "has no weight" in cli.error("inspect", "adapter=a", "model=embedded")
    assert not list(tmp_path.glob("*.html"))
