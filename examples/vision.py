"""LoRA on convolutions: a small network that knows bright shapes on dark noise learns dark shapes on light noise.

    python examples/vision.py

The network is trained here on drawn circles, crosses, squares and triangles (a few seconds), then adapted to their
negatives with low-rank updates of its Conv2d layers, from a third of the images.
"""

from __future__ import annotations

import tempfile

import lightning.pytorch as pl
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_lora import LoRACallback, save_adapter
from lightning_lora.recipes.data import Shapes


class Classifier(pl.LightningModule):
    """Four shapes in images (rows, 3, 32, 32) of values from -1 to 1."""

    def __init__(self, learning_rate: float) -> None:
        super().__init__()
        self.learning_rate = learning_rate
        self.net = nn.Sequential(
            *(nn.Conv2d(3, 16, 3, padding=1), nn.GroupNorm(4, 16), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(16, 32, 3, padding=1), nn.GroupNorm(4, 32), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(32, 64, 3, padding=1), nn.GroupNorm(4, 64), nn.ReLU(), nn.AdaptiveMaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(256, 4)),
        )

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.net(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.learning_rate)


def images_of(rows: object) -> tuple[Tensor, Tensor]:
    pixels = np.stack([np.asarray(image) for image in rows["image"]])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 127.5 - 1, torch.tensor(rows["label"])


def batches(images: Tensor, labels: Tensor) -> DataLoader:
    return DataLoader(TensorDataset(images, labels), batch_size=64, shuffle=True)


def fit(module: Classifier, data: DataLoader, **options: object) -> None:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    pl.Trainer(accelerator="cpu", enable_model_summary=False, **quiet, **options).fit(module, data)


@torch.no_grad()
def accuracy(module: Classifier, images: Tensor, labels: Tensor) -> float:
    return (module.net(images).argmax(dim=1) == labels).float().mean().item()


torch.set_num_threads(1)  # so small a network gains little from more
pl.seed_everything(0)
splits = Shapes(count=2400).load()
images, labels = images_of(splits.train)
test_images, test_labels = images_of(splits.test)

module = Classifier(learning_rate=3e-3)
fit(module, batches(images, labels), max_epochs=10)
known = accuracy(module, test_images, test_labels)
before = accuracy(module, -test_images, test_labels)

# Names may be given as a regular expression; this one takes the three convolutions, and no other layer.
lora = LoRACallback(rank=4, alpha=8, target_modules=r"net\.(0|4|8)")
few = slice(0, len(images) // 3)
fit(module, batches(-images[few], labels[few]), max_epochs=15, callbacks=[lora])
after = accuracy(module, -test_images, test_labels)
folder = save_adapter(module, tempfile.mkdtemp(prefix="vision-"))

print(f"accuracy on bright shapes, which the base learned: {known:.1%}")
print(
    f"accuracy on dark shapes: {before:.1%} before, {after:.1%} after training {lora.report.trainable_share:.1%} "
    "of the parameters"
)
print(f"adapter: {folder}")
