"""LightningModules of many kinds, which know nothing of adapters, with a few batches for each."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DataLoader

from tests.tiny_transformers import bert, llama, t5

LR = 2e-3


class Lit(pl.LightningModule):
    """A loss on a net, AdamW, and a schedule by step."""

    def __init__(self, kind: Kind, lr: float = LR) -> None:
        super().__init__()
        self.kind, self.lr = kind, lr
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.net = kind.net()
        self.automatic_optimization = not kind.is_manual

    def training_step(self, batch: Any, index: int) -> Tensor | None:
        loss = self.kind.loss(self.net, batch)
        self.log("train_loss", loss.detach(), batch_size=4)
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        self.clip_gradients(optimizer, 0.1, "norm")
        optimizer.step()
        self.lr_schedulers().step()  # type: ignore[union-attr]
        return None

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_loss", self.kind.loss(self.net, batch), batch_size=4)

    def configure_optimizers(self) -> Any:
        optimizer = AdamW([p for p in self.parameters() if p.requires_grad], lr=self.lr, weight_decay=0.01)
        schedule = LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 3) * 0.9**step)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def train_dataloader(self) -> Any:
        return DataLoader(self.kind.batches(), batch_size=None, shuffle=True)

    def val_dataloader(self) -> Any:
        return DataLoader(self.kind.batches()[:2], batch_size=None)


Batches = list[Any]


@dataclass
class Kind:
    """What a module trains, and how."""

    net: Callable[[], nn.Module]
    loss: Callable[[nn.Module, Any], Tensor]
    batches: Callable[[], Batches]
    targets: Any = "all-linear"
    is_manual: bool = False
    fields: dict[str, Any] = field(default_factory=dict)


def drawn(count: int, make: Callable[[torch.Generator], Any]) -> Callable[[], Batches]:
    return lambda: [make(torch.Generator().manual_seed(i)) for i in range(count)]


def texts(g: torch.Generator, rows: int = 4, length: int = 12) -> dict[str, Tensor]:
    """Rows of different lengths, padded, and the labels of a language model."""
    ids = torch.randint(3, 32, (rows, length), generator=g)
    mask = torch.arange(length) < torch.randint(length // 2, length + 1, (rows, 1), generator=g)
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


def classes(g: torch.Generator) -> dict[str, Tensor]:
    return {**texts(g), "labels": torch.randint(0, 3, (4,), generator=g)}


def sums(net: nn.Module, batch: Any) -> Tensor:
    logits = net(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return F.cross_entropy(logits, batch["labels"], reduction="sum")


def images(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(6, 3, 8, 8, generator=g), torch.randint(0, 3, (6,), generator=g)


def convolutional() -> nn.Module:
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, stride=2), nn.ReLU(),
        nn.Flatten(), nn.Linear(72, 16), nn.ReLU(), nn.Linear(16, 3),
    )  # fmt: skip
    net(torch.randn(8, 3, 8, 8))  # running statistics
    return net


def cross_entropy(net: nn.Module, batch: Any) -> Tensor:
    return F.cross_entropy(net(batch[0]), batch[1])


def rows(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(8, 16, generator=g), torch.randint(0, 3, (8,), generator=g)


def mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(16, 24), nn.SiLU(), nn.Dropout(0.2), nn.Linear(24, 24), nn.SiLU(), nn.Linear(24, 3))


def noise(net: nn.Module, batch: Any) -> Tensor:
    """As a diffusion model: times and noise are drawn in the step."""
    x = batch[0]
    t, e = torch.rand(len(x), 1, dtype=x.dtype), torch.randn_like(x)
    return F.mse_loss(net(x * (1 - t) + e * t), e[:, :3])


def contrastive(net: nn.Module, batch: Any) -> Tensor:
    """Each row against all others of its batch."""
    a, b = F.normalize(net(batch[0]), dim=-1), F.normalize(net(-batch[0]), dim=-1)
    return F.cross_entropy(a @ b.T / 0.1, torch.arange(len(a)))


class Attending(nn.Module):
    """nn.MultiheadAttention reads the weight of its out_proj and does not call it; an LSTM reads all of its weights."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.TransformerEncoderLayer(16, 2, 24, 0.1, batch_first=True)
        self.lstm = nn.LSTM(16, 8, batch_first=True)
        self.out = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.lstm(self.encoder(x))[0].mean(1))


def sequences(g: torch.Generator) -> tuple[Tensor, Tensor]:
    return torch.randn(4, 5, 16, generator=g), torch.randint(0, 3, (4,), generator=g)


def of_transformers(net: nn.Module, batch: Any) -> Tensor:
    loss: Tensor = net(**batch).loss
    return loss


KINDS = {
    "causal language model": Kind(lambda: llama(2), of_transformers, drawn(6, texts)),
    "classifier with dropout": Kind(bert, of_transformers, drawn(6, classes)),
    "encoder and decoder": Kind(t5, of_transformers, drawn(6, texts)),
    "sum of losses": Kind(bert, sums, drawn(6, classes)),
    "convolutions": Kind(convolutional, cross_entropy, drawn(6, images), ["0", "3", "6"]),
    "noise in the step": Kind(mlp, noise, drawn(6, rows)),
    "contrastive": Kind(mlp, contrastive, drawn(6, rows)),
    "weights that are read": Kind(Attending, cross_entropy, drawn(6, sequences), ["out_proj", "lstm", "linear1"]),
    "manual optimization": Kind(mlp, cross_entropy, drawn(6, rows), is_manual=True),
    "embeddings and a new head": Kind(
        lambda: llama(1), of_transformers, drawn(6, texts), ["embed_tokens", "q_proj"],
        fields={"modules_to_save": ["lm_head"]},
    ),
}  # fmt: skip
