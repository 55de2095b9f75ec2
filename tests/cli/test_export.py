from __future__ import annotations

import json

import pytest

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.cli.export import overrides
from lightning_lora.errors import ConfigError
from tests.hub.models import Linears, shake
from tests.hub_server.plugin import hub  # noqa: F401


@pytest.fixture
def adapter(tmp_path):
    model = Linears()
    inject(model, LoRAConfig(rank=4, target_modules=["fc", "0"], alpha_pattern={"fc": 4}, use_rslora=True))
    shake(model)
    return save_adapter(model, tmp_path / "saved")


@pytest.mark.parametrize("spelling", [["--for", "vllm"], ["--for=vllm"], ["for=vllm"], ["consumer=vllm"]])
def test_export_says_what_was_rewritten_and_where_it_lies(cli, adapter, tmp_path, spelling):
    assert cli("export", *spelling, "adapter=saved", "output=out") == 0, cli.err
    assert "exported for vLLM" in cli.out
    assert "lora_alpha: 8, one scale of 2; what was left of the scales of 1 module went into B" in cli.out
    assert cli.out.splitlines()[-1] == "folder: out"
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert not config["use_rslora"]
    assert not config["alpha_pattern"]
    assert not (tmp_path / "runs").exists(), "nothing is run, so there is no folder of a run"


def test_a_flag_may_stand_anywhere(cli, adapter):
    assert cli("export", "adapter=saved", "--for", "llama.cpp", "output=out", "rank=8") == 0, cli.err
    assert "--base" in cli.out


def test_an_adapter_on_the_hub_is_pulled_first(cli, adapter, hub, tmp_path, monkeypatch):  # noqa: F811
    hub.create_repo("user/adapter", files={path.name: path.read_bytes() for path in adapter.iterdir()})
    assert cli("export", "--for", "lorax", "adapter=user/adapter", "output=out") == 0, cli.err
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["r"] == 8


def test_what_cannot_be_is_one_screen_and_writes_nothing(cli, adapter, tmp_path):
    given = ["adapter=saved", "output=out"]
    assert "Did you mean 'vllm'" in cli.error("export", "--for", "vlm", *given)
    assert "consumer: a value is missing" in cli.error("export", *given)
    assert "--for vllm" in cli.error("export", *given, "--for")
    assert "Did you mean tolerance?" in cli.error("export", "--for", "vllm", *given, "tolerence=1")
    assert "rank: " in cli.error("export", "--for", "vllm", *given, "rank=many")
    assert "choose another folder" in cli.error("export", "--for", "vllm", "adapter=saved", "output=saved")
    assert "here at most rank 2" in cli.error("export", "--for", "vllm", *given, "max_rank=2")
    assert "no folder" in cli.error("export", "--for", "vllm", "adapter=nowhere", "output=out")
    assert not (tmp_path / "out").exists()


def test_help_shows_the_flag_and_the_settings(cli):
    assert cli("export", "--help") == 0
    assert "lightning-lora export --for vllm" in cli.out
    assert "tolerance: 0.01" in cli.out


def test_the_flag_needs_a_name():
    assert overrides(["a=1", "--for", "peft", "b=2"]) == ["a=1", "consumer=peft", "b=2"]
    with pytest.raises(ConfigError, match="--for vllm"):
        overrides(["--for"])
