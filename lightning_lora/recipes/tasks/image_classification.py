"""Image classification: one label per image."""

from __future__ import annotations

from lightning_lora.recipes.tasks.classification import Classification


class ImageClassification(Classification):
    """Train an image classifier; batches have `pixel_values` (rows, channels, height, width). See `Classification`."""

    auto_class = "AutoModelForImageClassification"
