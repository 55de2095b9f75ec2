"""Private names of huggingface_hub, transformers and Hydra do what we rely on, or are done without."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from huggingface_hub import CommitOperationAdd
from huggingface_hub.utils import get_session

from lightning_lora.cli import hydra_private
from lightning_lora.cli.commands import suggestions
from lightning_lora.errors import MovedError
from lightning_lora.format import transformers_private
from lightning_lora.hub import hub_private
from tests.private_names.moved import take_away


def test_a_file_that_goes_into_no_commit_is_known():
    operation = CommitOperationAdd("a", b"content")
    assert not hub_private.is_left_out(operation)
    operation._should_ignore = True
    assert hub_private.is_left_out(operation)
    with pytest.raises(MovedError, match="_should_ignore"):
        hub_private.is_left_out(SimpleNamespace())


def test_the_client_lets_a_process_fork(monkeypatch: pytest.MonkeyPatch):
    client = get_session()
    assert client is get_session()
    forks = hub_private.Forks()
    forks.before()
    assert forks.lock.locked()
    forks.in_parent()
    assert get_session() is client
    forks.before()
    forks.in_child()
    assert get_session() is not client
    take_away(monkeypatch, *(f"huggingface_hub.utils._http:{name}" for name in ("_CLIENT_LOCK", "_GLOBAL_CLIENT")))
    client, forks = get_session(), hub_private.Forks()
    forks.before()
    forks.in_child()
    assert get_session() is client


def _mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    with torch.device("meta"):
        return MixtralForCausalLM(MixtralConfig(vocab_size=8, num_key_value_heads=1, **sizes))


def test_a_model_tells_how_its_old_weights_are_read(monkeypatch: pytest.MonkeyPatch):
    from transformers.core_model_loading import WeightRenaming

    model = _mixtral()
    assert transformers_private.conversions(model, "WeightConverter")
    assert transformers_private.renamed("a.old.b", [WeightRenaming("old", "new")]) == "a.new.b"
    assert (transformers_private.commit_of(model.config), transformers_private.old_prefixes(model)) == (None, {})
    assert transformers_private.attention_of(model.config) is not None
    for name in ("core_model_loading:rename_source_key", "conversion_mapping:get_model_conversion_mapping"):
        take_away(monkeypatch, f"transformers.{name}")
    assert transformers_private.conversions(model, "WeightConverter") == []
    assert transformers_private.renamed("a.old.b", [WeightRenaming("old", "new")]) == "a.old.b"


def test_hydra_reads_a_command_line_and_completes_it(monkeypatch: pytest.MonkeyPatch):
    args = hydra_private.hydra_parser().parse_args(["-m", "a=1"])
    assert (args.multirun, args.overrides) == (True, ["a=1"])
    assert hydra_private.located("torch.optim.Adam") is torch.optim.Adam
    assert "lora.rank=" in suggestions("lightning-lora train lora.ran")
    for name in ("utils:_locate", "core_plugins.bash_completion:BashCompletion"):
        take_away(monkeypatch, f"hydra._internal.{name}")
    assert hydra_private.located("torch.optim.Adam") is torch.optim.Adam
    assert suggestions("lightning-lora train lora.ran") == []
    take_away(monkeypatch, "hydra._internal.utils:get_args_parser")
    with pytest.raises(MovedError, match="get_args_parser"):
        hydra_private.hydra_parser()
