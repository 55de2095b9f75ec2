"""lightning-lora merge: a folder that transformers loads without this package, and that computes the same."""

from __future__ import annotations

import json
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from lightning_lora import LoRAConfig, inject, save_adapter
from lightning_lora.engine import adapter_tensors
from tests.tiny_transformers import bert, gpt2, llama, t5

TOKENS = torch.arange(10).reshape(2, 5)


def trained(model: nn.Module, folder: str, size: float = 0.3, **config: object) -> torch.Tensor:
    """Save the base and an adapter that is not zero below `folder`; returns the adapted logits."""
    model.eval().save_pretrained(f"{folder}/base")
    model.name_or_path = f"{folder}/base"
    inject(model, LoRAConfig(rank=2, **config))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(size * torch.randn_like(tensor))
    save_adapter(model, f"{folder}/adapter")
    return logits(model)


def logits(model: nn.Module) -> torch.Tensor:
    more = {"decoder_input_ids": TOKENS} if model.config.is_encoder_decoder else {}
    with torch.no_grad():
        return model(input_ids=TOKENS, **more).logits.float()


def reloaded(folder: str = "out") -> nn.Module:
    config = transformers.AutoConfig.from_pretrained(folder)
    model, info = getattr(transformers, config.architectures[0]).from_pretrained(folder, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    return model.eval()


def assert_close(got: torch.Tensor, wanted: torch.Tensor, dtype: torch.dtype = torch.float32) -> None:
    # Some ten layers of a few dozen terms each, rounded at other places: a few hundred ulps of the largest logit.
    assert (got - wanted).abs().max() <= 500 * torch.finfo(dtype).eps * wanted.abs().max()


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (llama, {}),
        (lambda: llama(tied=True), {}),
        (lambda: llama(tied=True), {"target_modules": ["lm_head", "q_proj"]}),
        (lambda: llama(tied=True), {"target_modules": ["embed_tokens"]}),
        (llama, {"use_dora": True}),
        (gpt2, {}),
        (t5, {}),
        (bert, {"modules_to_save": ["classifier"]}),
    ],
)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_the_merged_model_computes_what_the_adapted_one_did(cli, make, config):
    wanted = trained(make(), ".", **config)
    assert cli("merge", "adapter=adapter", "model=./base", "output=out") == 0, cli.err
    assert_close(logits(reloaded()), wanted)
    assert "100 % of the update survives" in cli.out
    assert "folder: out" in cli.out
    assert f"{Path('out/model.safetensors').stat().st_size:,}  model.safetensors" in cli.out


@pytest.mark.parametrize(
    ("targets", "stays"),
    [(["q_proj"], True), (["lm_head"], False), (["embed_tokens"], False), (["q_proj", "lm_head"], False)],
)
@pytest.mark.filterwarnings("ignore:.*tie")
def test_whether_head_and_embedding_are_tied_is_what_the_config_says(cli, targets, stays):
    trained(llama(tied=True), ".", target_modules=targets)
    assert cli("merge", "adapter=adapter", "model=./base", "output=out") == 0
    model = reloaded()
    assert model.config.tie_word_embeddings is stays
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is stays
    assert f"tie_word_embeddings={str(stays).lower()}" in cli.out


def test_the_share_that_survives_the_bases_precision_is_said(cli):
    trained(llama().bfloat16(), ".", size=2e-5)
    assert cli("merge", "adapter=adapter", "model=./base", "output=out") == 0
    line = next(line for line in cli.out.splitlines() if "survives" in line)
    assert float(line.split()[0]) < 90
    assert "(the least: " in line
    assert reloaded().dtype == torch.bfloat16
    assert cli("merge", "adapter=adapter", "model=./base", "model.dtype=float32", "output=wide") == 0
    assert "100 % of the update survives" in cli.out
    assert reloaded("wide").dtype == torch.float32


def test_an_adapter_of_a_run_merges_into_the_base_that_ships_and_keeps_its_tokenizer(cli):
    from lightning_lora.recipes.models import ModelSource

    model = ModelSource().load("AutoModelForCausalLM")
    inject(model, LoRAConfig(rank=2))
    with torch.no_grad():
        for tensor in adapter_tensors(model).values():
            tensor.add_(0.05 * torch.randn_like(tensor))
    save_adapter(model, "adapter")
    assert cli("merge", "adapter=adapter", "model=embedded", "output=out") == 0, cli.err
    assert_close(logits(reloaded()), logits(model))
    assert transformers.AutoTokenizer.from_pretrained("out").encode("a") == ModelSource().tokenizer().encode("a")


@pytest.mark.parametrize("form", [["model=pretrained", "model.name=./base"], ["model=./base"], ["model=base"]])
def test_the_base_is_named_as_elsewhere_or_by_itself(cli, form):
    trained(llama(), ".")
    assert cli("merge", "adapter=adapter", *form, "output=out") == 0, cli.err


def test_what_cannot_be_merged_is_said_and_nothing_is_written(cli):
    trained(llama(), ".")
    Path("taken").mkdir()
    Path("taken/file").write_text("mine")
    other = llama()
    other.save_pretrained("other")
    for arguments, said in (
        (["model=./base", "output=taken"], "output=taken is there already"),
        (["output=out"], "names no base. Give model="),
        (["model=./nowhere", "output=out"], "There is no folder"),
        (["model=./other", "output=out"], "base"),
    ):
        assert cli("merge", "adapter=adapter", *arguments) == 2
        assert said in cli.err
        assert "Traceback" not in cli.err
    assert cli("merge", "adapter=base", "model=./base", "output=out") == 2
    assert "lacks adapter_config.json" in cli.err
    assert sorted(path.name for path in Path().iterdir()) == ["adapter", "base", "other", "taken"]
    assert [path.name for path in Path("taken").iterdir()] == ["file"]


def test_a_head_that_neither_base_nor_adapter_has_is_an_error(cli):
    trained(bert(), ".", target_modules=["query"])
    config = json.loads(Path("adapter/adapter_config.json").read_text())
    Path("adapter/adapter_config.json").write_text(json.dumps({**config, "task_type": "SEQ_CLS"}))
    transformers.BertModel.from_pretrained("base").save_pretrained("headless")
    assert cli("merge", "adapter=adapter", "model=./headless", "output=out", "check_base=false") == 2
    assert "would have random weights there" in cli.err


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:.*tie")
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT asks for it
def test_a_vocabulary_that_was_resized_for_the_adapter_is_merged_too(cli, tied):
    from lightning_lora.recipes.models import ModelSource

    llama(tied=tied).save_pretrained("base")
    model = transformers.AutoModelForCausalLM.from_pretrained("base")
    model.resize_token_embeddings(40, mean_resizing=False)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    adapted.save_pretrained("adapter", save_embedding_layers=True)
    wanted = logits(adapted.eval())
    assert cli("merge", "adapter=adapter", "model=./base", "output=out") == 2
    assert "load_embedding_layers" in cli.err
    assert cli("merge", "adapter=adapter", "model=./base", "output=out", "load_embedding_layers=true") == 0, cli.err
    assert "not in the base's" in cli.out
    assert_close(logits(reloaded()), wanted)
    tokenizer = ModelSource().tokenizer()
    tokenizer.add_tokens(["<new>"])
    tokenizer.save_pretrained("adapter")
    assert cli("merge", "adapter=adapter", "model=./base", "output=again", "load_embedding_layers=true") == 0, cli.err
    assert transformers.AutoTokenizer.from_pretrained("again").encode("<new>") == tokenizer.encode("<new>")


@pytest.mark.slow
def test_every_command_that_takes_an_adapter_takes_it_from_a_run_with_the_runs_base(cli):
    assert cli("train", "debug=fast", "trainer=cpu", "trainer.max_steps=1", "lora.target_modules=[q_proj]") == 0, (
        cli.err
    )
    run = f"run={cli.folder}"
    assert cli("merge", run, "output=merged") == 0, cli.err
    assert cli("verify", run, "model=./merged", "base=embedded") == 0, cli.err
    assert cli("verify", run) == 0, cli.err
    assert cli("inspect", run) == 0, cli.err
    assert "on embedded" in cli.out
    assert cli("export", "--for", "llama.cpp", run, "base=embedded", "output=exported") == 0, cli.err
    assert cli("push", run, "repo_id=user/a", "dry_run=true") == 0, cli.err
    for command in ("combine", "pull"):
        assert cli(command, run) == 2
        assert f"{command} takes no run" in cli.err
