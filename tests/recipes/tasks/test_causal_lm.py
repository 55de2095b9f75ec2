"""CausalLM trains, measures perplexity over tokens, and continues prompts."""

from __future__ import annotations

import math
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch.optim.lr_scheduler import ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import get_linear_schedule_with_warmup

from lightning_lora.errors import ConfigError
from lightning_lora.recipes.tasks import CausalLM
from lightning_lora.recipes.tasks.causal_lm import predicted_tokens


def batch_of(rows: int, tokens: int, ignored: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 259, (rows, tokens))
    labels = ids.clone()
    labels[:, :ignored] = -100
    return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def loader(*batches: dict[str, torch.Tensor]) -> DataLoader:
    return DataLoader(list(batches), batch_size=None)


@pytest.mark.parametrize("precision", ["32-true", "bf16-true"])
def test_perplexity_counts_every_token_the_same_over_the_epoch(llama, trainer, precision):
    batches = [batch_of(1, 5), batch_of(3, 40), batch_of(2, 20, ignored=15), batch_of(2, 8, ignored=8)] * 4
    task = CausalLM(llama)
    logged = trainer(precision=precision).validate(task, loader(*batches), verbose=False)[0]
    loss, tokens = 0.0, 0
    with torch.no_grad():
        for batch in batches:
            logits = task.model(input_ids=batch["input_ids"]).logits.double()
            targets = batch["labels"][:, 1:].reshape(-1)
            loss += float(F.cross_entropy(logits[:, :-1].reshape(len(targets), -1), targets, reduction="sum"))
            tokens += int((targets != -100).sum())
    assert tokens == 4 * (4 + 3 * 39 + 2 * 5)
    # float32 sums of some hundred terms, whatever the model computes in
    assert logged["val_loss"] == pytest.approx(loss / tokens, rel=1e-5)
    assert logged["val_perplexity"] == pytest.approx(math.exp(loss / tokens), rel=1e-5)


def test_a_model_that_knows_nothing_has_the_vocabulary_as_perplexity(llama, trainer):
    task = CausalLM(llama)
    task.configure_model()
    task.model.lm_head.weight.data.zero_()
    logged = trainer().test(task, loader(batch_of(2, 30)), verbose=False)[0]
    assert logged["test_perplexity"] == pytest.approx(259, rel=1e-5)


def test_training_lowers_the_loss_and_logs_it_by_step_and_epoch(llama, trainer):
    batch = batch_of(4, 16)
    task = CausalLM(llama, learning_rate=1e-2)
    run = trainer(max_epochs=15)
    run.fit(task, loader(batch), loader(batch))
    logged = run.callback_metrics
    assert {"train_loss", "train_loss_epoch", "val_loss", "val_perplexity"} <= logged.keys()
    assert logged["val_loss"] < 0.7 * math.log(259)


def test_the_model_is_built_once_and_in_training_mode(llama):
    task = CausalLM(llama)
    assert task.model is None
    task.configure_model()
    model = task.model
    task.configure_model()
    assert task.model is model
    assert model.training


def test_the_default_optimizer_is_adamw_over_what_is_trainable(llama):
    task = CausalLM(llama, learning_rate=0.5)
    task.configure_model()
    task.model.model.requires_grad_(False)
    optimizer = task.configure_optimizers()
    assert isinstance(optimizer, torch.optim.AdamW)
    assert [id(p) for group in optimizer.param_groups for p in group["params"]] == [id(task.model.lm_head.weight)]
    assert optimizer.param_groups[0]["lr"] == 0.5


def test_the_learning_rate_of_a_given_optimizer_is_known_and_can_be_overruled(llama):
    factory = partial(torch.optim.SGD, lr=0.25, momentum=0.5)
    task = CausalLM(llama, optimizer=factory)
    assert task.learning_rate == 0.25
    task.configure_model()
    task.learning_rate = 0.125  # as the learning-rate finder does
    group = task.configure_optimizers().param_groups[0]
    assert (group["lr"], group["momentum"]) == (0.125, 0.5)


def test_a_schedule_gets_the_number_of_steps_from_the_trainer(llama, trainer):
    task = CausalLM(llama, learning_rate=1.0, scheduler=partial(get_linear_schedule_with_warmup, num_warmup_steps=0))
    batch = batch_of(1, 4)
    run = trainer(max_epochs=2)
    run.fit(task, loader(batch, batch), loader(batch))
    # Linear to zero over all four steps, stepped after each of them.
    assert run.global_step == 4
    assert task.lr_schedulers().get_last_lr() == [0.0]


def test_a_plateau_schedule_watches_the_validation_loss(llama, trainer):
    task = CausalLM(llama, scheduler=partial(ReduceLROnPlateau, patience=3))
    task.configure_model()
    schedule = task.configure_optimizers()["lr_scheduler"]
    assert schedule["monitor"] == "val_loss"


def test_prediction_continues_each_prompt(llama, trainer):
    tokenizer = llama.tokenizer()
    rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a longer prompt", "short")]
    width = max(map(len, rows))
    prompts = {
        "input_ids": torch.tensor([[0] * (width - len(row)) + row for row in rows]),
        "attention_mask": torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows]),
    }
    alone = {name: value[1:, width - len(rows[1]) :] for name, value in prompts.items()}
    task = CausalLM(llama, max_new_tokens=6)
    together, single = trainer().predict(task, loader(prompts, alone))
    assert [row["prompt"] for row in together] == ["a longer prompt", "short"]
    assert together[1] == single[0]  # padding on the left changes nothing
    ids = torch.tensor([rows[1]])
    with torch.no_grad():
        for _ in range(6):
            ids = torch.cat([ids, task.model(ids).logits[:, -1:].argmax(-1)], dim=1)
    assert tokenizer.decode(ids[0, len(rows[1]) :], skip_special_tokens=True) == single[0]["text"]


def test_gradient_checkpointing_changes_no_gradient(llama):
    batch = batch_of(2, 12)
    gradients = []
    for checkpointing in (False, True):
        task = CausalLM(llama, gradient_checkpointing=checkpointing)
        task.configure_model()
        task(batch).loss.backward()
        assert task.model.model.layers[0].gradient_checkpointing == checkpointing
        gradients.append(task.model.model.layers[0].mlp.up_proj.weight.grad)
    assert torch.equal(*gradients)


def test_a_checkpoint_is_loaded_with_the_model_given_again(llama, trainer, tmp_path):
    task = CausalLM(llama, max_new_tokens=7)
    run = trainer(max_steps=1, limit_val_batches=0)
    run.fit(task, loader(batch_of(1, 4)), loader(batch_of(1, 4)))
    run.save_checkpoint(tmp_path / "a.ckpt")
    loaded = CausalLM.load_from_checkpoint(tmp_path / "a.ckpt", model=llama)
    assert loaded.max_new_tokens == 7
    assert torch.equal(loaded.model.lm_head.weight, task.model.lm_head.weight)


def test_predicted_tokens_leave_out_the_first_of_each_row():
    assert predicted_tokens({"labels": torch.tensor([[1, 2, -100], [-100, 3, 4]])}) == 3


def test_settings_that_cannot_be_are_refused(llama):
    with pytest.raises(ConfigError, match=r"max_new_tokens is 0"):
        CausalLM(llama, max_new_tokens=0)
    with pytest.raises(ConfigError, match=r"temperature is nan"):
        CausalLM(llama, temperature=float("nan"))


def test_it_has_pefts_name_and_no_new_modules(llama):
    assert (CausalLM.task_type, CausalLM(llama).head_modules) == ("CAUSAL_LM", [])
