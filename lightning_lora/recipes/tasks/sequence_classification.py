"""Text classification: one label per text."""

from __future__ import annotations

from transformers import PreTrainedModel

from lightning_lora.recipes.tasks.classification import Classification


class SequenceClassification(Classification):
    """Train a text classifier on a transformers encoder or decoder. See `Classification`."""

    task_type = "SEQ_CLS"
    auto_class = "AutoModelForSequenceClassification"

    def build_model(self) -> PreTrainedModel:
        model = super().build_model()
        # Decoders classify by the last token that is not padding, so they must know the data's padding token.
        model.config.get_text_config().pad_token_id = self.source.tokenizer().pad_token_id or 0
        return model
