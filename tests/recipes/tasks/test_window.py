"""Micro-batches of unequal sizes are one batch: under accumulation, cut short, over processes, in every task."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Sampler

from lightning_lora import LoRACallback
from lightning_lora.recipes.tasks import CausalLM, SequenceClassification
from lightning_lora.recipes.tasks.causal_lm import predicted_tokens

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

ANSWERS = [1, 30, 2, 25, 3, 38, 1, 12]
"""How many of a row's 40 tokens are predicted."""
# Two orders of summing some 1e5 products of float32, each within 6e-8 of its size, which partly cancel.
CLOSE: dict[str, Any] = {"rtol": 2e-4, "atol": 1e-6}


class Gradients(pl.Callback):
    """Those that the optimizer is about to step on, of each step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_before_optimizer_step(self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Any) -> None:
        self.steps.append({n: p.grad.clone() for n, p in pl_module.named_parameters() if p.grad is not None})


def text_rows(answers: list[int] = ANSWERS) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    rows = []
    for count in answers:
        ids = torch.randint(3, 259, (40,), generator=generator)
        labels = torch.where(torch.arange(40) >= 40 - count, ids, -100)
        rows.append({"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)})
    return rows


def loader(rows: list[Any], size: int) -> DataLoader[Any]:
    return DataLoader(rows, batch_size=size)


def run(trainer: Any, task: pl.LightningModule, data: Any, **options: Any) -> list[dict[str, Tensor]]:
    """The gradients of each step, the weights staying what they are."""
    seen = Gradients()
    trainer(callbacks=[seen, LoRACallback(rank=2)], max_epochs=1, **options).fit(task, data)
    return seen.steps


def causal(llama: Any, kind: type[CausalLM] = CausalLM) -> CausalLM:
    torch.manual_seed(0)
    return kind(llama, optimizer=lambda parameters, **_: torch.optim.SGD(parameters, lr=0.0))


def closed_form(llama: Any, rows: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """The gradient of the summed loss over all predicted tokens, by their number."""
    from lightning_lora import LoRAConfig, inject

    task = causal(llama)
    task.configure_model()
    inject(task, LoRAConfig(rank=2))
    ids, labels = (torch.stack([row[name] for row in rows]) for name in ("input_ids", "labels"))
    targets = labels[:, 1:].reshape(-1)
    logits = task.model(input_ids=ids).logits[:, :-1]
    loss = F.cross_entropy(logits.reshape(len(targets), -1), targets, reduction="sum")
    (loss / (targets != -100).sum()).backward()
    return {name: p.grad for name, p in task.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(("size", "accumulate"), [(8, 1), (4, 2), (2, 4), (1, 8)])
@pytest.mark.parametrize("clip", [None, 0.1])
def test_micro_batches_with_unequal_answers_give_the_gradient_of_one_batch(
    llama: Any, trainer: Any, size: int, accumulate: int, clip: float | None
) -> None:
    settings = {"accumulate_grad_batches": accumulate, "gradient_clip_val": clip}
    (step,) = run(trainer, causal(llama), loader(text_rows(), size), **settings)
    torch.testing.assert_close(step, closed_form(llama, text_rows()), **CLOSE)


def test_a_window_that_the_epochs_end_cuts_short_is_the_mean_over_what_it_holds(llama: Any, trainer: Any) -> None:
    rows = text_rows()[:6]
    steps = run(trainer, causal(llama), loader(rows, 1), accumulate_grad_batches=4)
    assert len(steps) == 2
    for step, own in zip(steps, (rows[:4], rows[4:])):
        torch.testing.assert_close(step, closed_form(llama, own), **CLOSE)


def test_each_window_of_a_run_stands_by_itself(llama: Any, trainer: Any) -> None:
    rows = text_rows()
    steps = run(trainer, causal(llama), loader(rows, 1), accumulate_grad_batches=2)
    assert len(steps) == 4
    for i, step in enumerate(steps):
        torch.testing.assert_close(step, closed_form(llama, rows[2 * i : 2 * i + 2]), **CLOSE)


@pytest.mark.parametrize("place", [0, 3, 7])
def test_a_micro_batch_without_an_answer_adds_nothing(llama: Any, trainer: Any, place: int) -> None:
    answers = [*ANSWERS[:place], 0, *ANSWERS[place + 1 :]]
    (step,) = run(trainer, causal(llama), loader(text_rows(answers), 1), accumulate_grad_batches=8)
    torch.testing.assert_close(step, closed_form(llama, text_rows(answers)), **CLOSE)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_window_without_any_answer_steps_nowhere(llama: Any, trainer: Any, accumulate: int) -> None:
    (step,) = run(
        trainer, causal(llama), loader(text_rows([0, 0]), 2 // accumulate), accumulate_grad_batches=accumulate
    )
    assert all(not grad.any() for grad in step.values())


@pytest.mark.parametrize("skipped", [0, 1, 3])
def test_a_micro_batch_that_training_step_skips_does_not_count(llama: Any, trainer: Any, skipped: int) -> None:
    class Skips(CausalLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Any:
            return None if batch_idx == skipped else super().training_step(batch, batch_idx)

    rows = text_rows()
    seen = Gradients()
    at_step: list[dict[str, Tensor]] = []

    class Step(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            result = super().step(closure)
            at_step.append({n: p.grad.clone() for n, p in task.named_parameters() if p.grad is not None})
            return result

    torch.manual_seed(0)
    task = Skips(llama, optimizer=lambda parameters, **_: Step(parameters, lr=0.0))
    fitted = trainer(callbacks=[seen, LoRACallback(rank=2)], max_epochs=1, accumulate_grad_batches=4)
    fitted.fit(task, loader(rows, 2))
    kept = [row for i, row in enumerate(rows) if i // 2 != skipped]
    torch.testing.assert_close(at_step[0], closed_form(llama, kept), **CLOSE)


def test_one_micro_batch_in_one_process_is_bitwise_what_it_was(llama: Any, trainer: Any) -> None:
    class Plain(CausalLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self(batch).loss

    ours, plain = (run(trainer, causal(llama, kind), loader(text_rows(), 4)) for kind in (CausalLM, Plain))
    assert len(ours) == len(plain) == 2
    assert all(torch.equal(a[name], b[name]) for a, b in zip(ours, plain) for name in a)


def test_a_loss_that_is_not_weighed_is_left_to_lightning(llama: Any, trainer: Any) -> None:
    class Plain(CausalLM):
        def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
            return self(batch).loss

    rows = text_rows()
    (step,) = run(trainer, causal(llama, Plain), loader(rows, 2), accumulate_grad_batches=4)
    parts = [closed_form(llama, rows[2 * i : 2 * i + 2]) for i in range(4)]
    mean = {name: sum(part[name] for part in parts) / 4 for name in parts[0]}
    torch.testing.assert_close(step, mean, **CLOSE)


class Share(Sampler[int]):
    """Rank 0 has the short answers and rank 1 the long ones, or the other way round."""

    def __init__(self, rank: int, world: int, rows: int) -> None:
        self.own = range(rank, rows, world)

    def __iter__(self) -> Any:
        return iter(self.own)

    def __len__(self) -> int:
        return len(self.own)


class Shared(CausalLM):
    size = 1

    def train_dataloader(self) -> DataLoader[Any]:
        rows = text_rows()
        return DataLoader(rows, batch_size=self.size, sampler=Share(self.global_rank, self.trainer.world_size, 8))


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(("size", "accumulate"), [(4, 1), (1, 4), (1, 3)])
def test_processes_with_unequal_answers_step_as_one(llama: Any, trainer: Any, size: int, accumulate: int) -> None:
    def trained(processes: int, size: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        task = Shared(llama, optimizer=lambda parameters, **_: torch.optim.SGD(parameters, lr=0.5))
        task.size = size
        fitted = trainer(
            callbacks=[LoRACallback(rank=2)],
            max_epochs=1,
            accumulate_grad_batches=accumulate,
            gradient_clip_val=1.0,
            use_distributed_sampler=False,
            **({"strategy": "ddp_fork", "devices": processes} if processes > 1 else {"devices": 1}),
        )
        fitted.fit(task)
        return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}

    torch.testing.assert_close(trained(2, size), trained(1, 2 * size), **CLOSE)


class SavesInWindow(pl.Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        if trainer.fit_loop.epoch_loop.batch_idx == 1:
            trainer.save_checkpoint(self.path)


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_each_process_resumes_its_own_part_of_a_window(llama: Any, trainer: Any, tmp_path: Path) -> None:
    def trained(saved: Path, ckpt: Path | None = None) -> dict[str, Tensor]:
        torch.manual_seed(0)
        task = Shared(llama, optimizer=lambda parameters, **_: torch.optim.SGD(parameters, lr=0.5))
        trainer(
            callbacks=[LoRACallback(rank=2), SavesInWindow(saved)],
            max_epochs=1,
            accumulate_grad_batches=4,
            use_distributed_sampler=False,
            strategy="ddp_fork",
            devices=2,
        ).fit(task, ckpt_path=ckpt)
        return {name: p.detach().clone() for name, p in task.named_parameters() if p.requires_grad}

    whole, resumed = trained(tmp_path / "1.ckpt"), trained(tmp_path / "2.ckpt", tmp_path / "1.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def label_rows(count: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(3, 259, (count, 12), generator=generator)
    return [
        {"input_ids": row, "attention_mask": torch.ones_like(row), "labels": torch.tensor(i % 2)}
        for i, row in enumerate(ids)
    ]


@pytest.mark.parametrize("rows", [7, 8])
def test_a_classifier_counts_rows(bert: Any, trainer: Any, rows: int) -> None:
    def gradients(size: int, accumulate: int) -> dict[str, Tensor]:
        torch.manual_seed(0)
        task = SequenceClassification(
            bert, optimizer=lambda parameters, **_: torch.optim.SGD(parameters, lr=0.0), label_names=["a", "b"]
        )
        (step,) = run(
            trainer, without_dropout(task), loader(label_rows(rows), size), accumulate_grad_batches=accumulate
        )
        return step

    torch.testing.assert_close(gradients(4, 2), gradients(8, 1), **CLOSE)
    torch.testing.assert_close(gradients(3, 3), gradients(8, 1), **CLOSE)


def without_dropout(task: Any) -> Any:
    task.configure_model()
    for module in task.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return task


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_after_backward"])
@pytest.mark.parametrize("at", [0, 1, 2])
def test_a_run_resumed_inside_a_window_takes_the_step_of_the_whole_window(
    hook: str, at: int, llama: Any, trainer: Any, tmp_path: Path
) -> None:
    class Saves(pl.Callback):
        def save(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / f"{trainer.fit_loop.epoch_loop.batch_idx}.ckpt")

    setattr(Saves, hook, Saves.save)
    rows = text_rows()
    first = trainer(callbacks=[Saves(), LoRACallback(rank=2)], max_epochs=1, accumulate_grad_batches=4)
    first.fit(causal(llama), loader(rows, 2))
    seen = Gradients()
    resumed = trainer(callbacks=[seen, LoRACallback(rank=2)], max_epochs=1, accumulate_grad_batches=4)
    resumed.fit(causal(llama), loader(rows, 2), ckpt_path=tmp_path / f"{at}.ckpt")
    torch.testing.assert_close(seen.steps[0], closed_form(llama, rows), **CLOSE)


def test_a_row_counts_the_tokens_that_have_one_before_them() -> None:
    assert predicted_tokens({"labels": torch.stack([row["labels"] for row in text_rows([40, 1])])}) == 39 + 1
