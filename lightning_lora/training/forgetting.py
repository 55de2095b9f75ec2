"""A callback that shows what a model forgets while its adapters train: how well it still predicts general text."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from lightning_lora.analysis.bits_per_byte import ScoredTexts
from lightning_lora.checked import whole
from lightning_lora.embedded import general_texts
from lightning_lora.engine import disabled
from lightning_lora.engine.intruders import LIMIT, directions, intruders, is_one_matrix, matrix_of_pair
from lightning_lora.engine.layers import Pair, pairs
from lightning_lora.engine.present import check_some_of_ours
from lightning_lora.engine.tree import Tree
from lightning_lora.errors import ConfigError
from lightning_lora.training.validated import OwnValidation, apart


class ForgettingMonitor(Callback):
    """Log what is forgotten, beside LoRACallback: `Trainer(callbacks=[LoRACallback(rank=8), ForgettingMonitor()])`.

    At each validation of a fit these are logged as the module's own metrics are, so loggers get them, the progress bar
    shows them, and an EarlyStopping or a ModelCheckpoint can monitor them:

    - `general/bits_per_byte`: how well the model with its adapters predicts general text, in bits per byte of the text:
      the sum of -log2 p over the predicted tokens, divided by the UTF-8 bytes that they stand for. Lower is better.
      `lightning_lora.analysis.bits_per_byte` says which tokens are predicted and which bytes count.
    - `general/bits_per_byte_base`: the same of the bare base. It is measured and logged once; a resumed run has it from
      the checkpoint.
    - `lora/intruders`: how many intruder dimensions the adapted weights have, over all layers: among the first ten
      singular vectors of each, those that resemble none of the base's (Shuttleworth et al. 2024, arXiv:2410.21228). The
      base's singular vectors are computed once and kept in main memory, as large as the weights in float32. Each
      validation takes one SVD for each layer (0.4 s on one core for a weight of 576 x 1536; 1.4 s for 1024 x 1024).

    With a dataloader, `general/METRIC` and `general/METRIC_base` take the place of bits per byte: the mean of the
    metric that the module's validation_step logs under that name, in the unit of that metric.

    Training is not changed: modes, random numbers, gradients and metrics are left as they were. Every process measures
    the same. With MultiLoRACallback each adapter is measured (`general/bits_per_byte/r4`).

    Raises ConfigError for an argument that is not valid, and when training starts on a module that cannot be measured;
    AdapterStateError when it starts on a model without adapters.

    Example:
        >>> from lightning_lora import ForgettingMonitor
        >>> monitor = ForgettingMonitor(["Some text that the base should still know when it has learnt the task."])
    """

    def __init__(
        self,
        texts_or_dataloader: Sequence[str] | Iterable[Any] | None = None,
        *,
        tokenizer: Any = None,
        metric: str = "val_loss",
        max_tokens: int = 1024,
        intruder_limit: int = LIMIT,
    ) -> None:
        """
        Args:
            texts_or_dataloader: Texts, for a causal language model; or a dataloader whose batches the module's
                validation_step takes, for any other. None takes the passages of English works that come with this
                package (`lightning_lora.embedded.general_texts`).
            tokenizer: The model's, for texts; by default the module's own (`module.tokenizer`).
            metric: What the module's validation_step logs, for a dataloader.
            max_tokens: Texts are cut into windows of so many tokens, or of what the model can read where that is less.
            intruder_limit: Count intruder dimensions of weights whose smaller side is at most this; 0 counts none.
        """
        given = general_texts() if texts_or_dataloader is None else texts_or_dataloader
        is_texts = isinstance(given, Sequence) and all(isinstance(text, str) for text in given)
        is_once = isinstance(given, (str, Iterator)) or (is_texts and not given)
        if is_once or not isinstance(given, Iterable):
            raise ConfigError(
                "ForgettingMonitor takes a list of texts, or a dataloader, which it reads at each validation, not "
                f"{given!r:.80}."
            )
        self._texts: tuple[str, ...] | None = tuple(given) if is_texts else None
        self._loader: Iterable[Any] = given
        self.tokenizer, self.metric = tokenizer, metric
        self.max_tokens = whole("max_tokens", max_tokens, least=2)
        self.intruder_limit = whole("intruder_limit", intruder_limit, least=0)
        self._scored: ScoredTexts | None = None
        self._validation: OwnValidation | None = None
        self._base: float | None = None
        self._base_step: int | None = None
        """The step of the validation at which the base was measured."""
        self._directions: dict[str, Tensor | None] = {}
        """The left singular vectors of the base's weight of each pair; None for one that is not looked at."""

    def __repr__(self) -> str:
        what = type(self._loader).__name__ if self._texts is None else f"{len(self._texts)} texts"
        return f"ForgettingMonitor({what}, measures {self.name})"

    @property
    def name(self) -> str:
        """The name of what is measured of general text."""
        return f"general/{'bits_per_byte' if self._texts is not None else self.metric}"

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._base, self._base_step, self._directions = None, None, {}

    def state_dict(self) -> dict[str, Any]:
        # A dataloader may be another one in the next run, which nothing here would show: the base is measured again.
        return {} if self._base is None or self._texts is None else {"base": self._base, "of": self._key()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._base = state_dict["base"] if self._texts is not None and state_dict.get("of") == self._key() else None

    def _key(self) -> str:
        return hashlib.sha256(repr((self._texts, self.max_tokens)).encode()).hexdigest()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_some_of_ours(pl_module, Tree.of(pl_module))
        self._measured = False
        if self._texts is None:
            self._validation = OwnValidation(trainer, pl_module, self._loader, self.metric)
            return
        tokenizer = self.tokenizer if self.tokenizer is not None else getattr(pl_module, "tokenizer", None)
        try:
            with apart(trainer, pl_module):
                self._scored = ScoredTexts(pl_module, tokenizer, self._texts, max_tokens=self.max_tokens)
        except ConfigError as error:
            raise ConfigError(
                f"ForgettingMonitor cannot score texts: {error} Or give it a dataloader whose batches the module's "
                "validation_step takes, and the metric that it logs: ForgettingMonitor(loader, metric='val_loss')."
            ) from error

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != TrainerFn.FITTING or trainer.sanity_checking:
            return
        values = {self.name: self._value(trainer, pl_module)}
        if self._base is None:
            with disabled(pl_module):
                self._base, self._base_step = self._value(trainer, pl_module), trainer.global_step
        if self._base_step == trainer.global_step:  # MultiLoRACallback validates each adapter
            values[f"{self.name}_base"] = self._base
        if self.intruder_limit:
            with apart(trainer, pl_module):
                own = list(pairs(pl_module))
                counts = [count for pair in own if (count := self._intruders(pair)) is not None]
            if counts:
                values["lora/intruders"] = sum(counts)
            if not self._measured and len(counts) < len(own):
                rank_zero_warn(
                    f"ForgettingMonitor counts the intruder dimensions of {len(counts)} of {len(own)} layers. The "
                    f"others have weights with more than {self.intruder_limit} rows and columns (intruder_limit), "
                    "groups, experts, or weights whose numbers are not known."
                )
        self._measured = True
        for name, value in values.items():
            pl_module.log(name, value, prog_bar=name == self.name, sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not self._measured:
            rank_zero_warn("ForgettingMonitor measures at validations, and there was none: nothing was measured.")

    def _value(self, trainer: Trainer, module: LightningModule) -> float:
        if self._validation is not None:
            return self._validation.measure()
        assert self._scored is not None
        with apart(trainer, module):
            return self._scored.bits_per_byte()

    def _intruders(self, pair: Pair) -> float | None:
        """The number of intruder dimensions; NaN for a weight that is not finite, None for one not looked at."""
        if pair.name not in self._directions:
            W = matrix_of_pair(pair) if is_one_matrix(pair) else None
            is_small = W is not None and min(W.shape) <= self.intruder_limit
            self._directions[pair.name] = directions(W) if W is not None and is_small else None
        base = self._directions[pair.name]
        if base is None:
            return None
        changed = matrix_of_pair(pair, adapted=True)
        return float(len(intruders(base, changed))) if bool(changed.isfinite().all()) else math.nan
