"""lightning-lora verify: a table, and an exit status that a script can use."""

from __future__ import annotations

import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAConfig, inject, load_adapter, merge, save_adapter
from lightning_lora.engine import adapter_tensors
from tests.analysis.test_served import base, folder, loaded, serving
from tests.tiny_transformers import llama

__all__ = ["folder"]

pytestmark = pytest.mark.filterwarnings("ignore:Merging:UserWarning")


@pytest.fixture
def trained(cli) -> nn.Module:
    """A base in ./base, an adapter in ./adapter, and the merged model in ./merged; returns the base."""
    torch.manual_seed(0)
    model = llama().eval()
    model.save_pretrained("base")
    inject(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.3 * torch.randn_like(tensor))
    save_adapter(model, "adapter", base_model=None)
    merge(model)
    model.save_pretrained("merged")
    return transformers.LlamaForCausalLM.from_pretrained("base")


def test_an_adapter_that_is_loaded_is_applied(cli, trained):
    assert cli("verify", "adapter=adapter", "model=./base") == 0, cli.err
    assert "same: 21 of 21 modules apply the adapter" in cli.out
    assert cli("verify", "adapter=adapter", "model=./base", "model.dtype=bfloat16") == 0, cli.out


def test_a_merged_model_is_compared_with_its_base(cli, trained):
    assert cli("verify", "adapter=adapter", "model=./merged", "base=./base") == 0, cli.err
    assert cli("verify", "adapter=adapter", "model=./base", "base=./base") == 1
    assert "not applied" in cli.out
    assert cli("verify", "adapter=adapter", "model=./merged", "base=./merged") == 1


def test_another_adapter_in_the_merged_model_gives_status_1(cli, trained):
    load_adapter(trained, "adapter")
    with torch.no_grad():
        for tensor in adapter_tensors(trained).values():
            tensor.mul_(2**0.5)
    merge(trained)
    trained.save_pretrained("wrong")
    assert cli("verify", "adapter=adapter", "model=./wrong", "base=./base") == 1
    assert "as if it were added twice, or alpha doubled" in cli.out


def test_what_cannot_be_verified_is_an_error(cli, trained):
    assert "There is no folder" in cli.error("verify", "adapter=./nothing", "model=./base")
    assert "names no base" in cli.error("verify", "adapter=adapter")
    other = llama()
    other.save_pretrained("other")
    assert "another base" in cli.error("verify", "adapter=adapter", "model=./other")


@pytest.mark.slow
def test_a_certificate_is_made_and_a_server_is_asked_by_it(cli, folder):
    where = f"adapter={folder}"
    (folder / "certificate.json").unlink()
    assert "make=true makes it" in cli.error("verify", where, "server=http://127.0.0.1:9")
    assert cli("verify", where, "model=embedded", "make=true") == 0, cli.err
    assert "certificate.json" in cli.out
    assert "modules apply the adapter" in cli.out
    with serving({"base": base(), "legal": loaded(folder)}) as address:
        assert cli("verify", where, f"server={address}", "name=legal", "base_name=base") == 0, cli.err
        assert "same: it applies the adapter" in cli.out
        assert cli("verify", where, f"server={address}", "name=base") == 1
        assert "ignored: it answers as the base does" in cli.out
        assert "exclude each other" in cli.error("verify", where, f"server={address}", "model=embedded")
    assert "there is no server" in cli.error("verify", where, "model=embedded", "name=legal")
