"""A callback that shows how adapters train: how many of their ranks they use, how large the update is, who gets the
gradient."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from torch.optim import Optimizer

from lightning_lora.checked import flag, whole
from lightning_lora.engine.layers import Pair, pairs
from lightning_lora.engine.low_rank import effective_ranks, quarter_shares, stable_ranks, stacked_singular_values
from lightning_lora.engine.present import check_some_of_ours
from lightning_lora.engine.tree import Tree
from lightning_lora.engine.weights import is_plain
from lightning_lora.engine.weights import whole as gathered
from lightning_lora.errors import listed
from lightning_lora.training.lightning_private import batches_that_stepped

Values = dict[str, Tensor]
"""A metric -> its value for each pair, in the order of the pairs."""


class AdapterMonitor(Callback):
    """Log how adapters train, beside LoRACallback: `Trainer(callbacks=[LoRACallback(rank=8), AdapterMonitor()])`.

    Every `every_n_steps` optimizer steps these go to all loggers of the Trainer, as `lora/METRIC` over all layers and
    `lora/METRIC/LAYER` for each one. An update is dW = s B A; with rank r it has r directions (singular vectors), each
    of a size (singular value).

    - `effective_rank`: how many directions the update uses, from the entropy of their sizes (Roy and Vetterli 2007);
      `stable_rank`: the same from their squares, which counts only large ones. Both are between 1 and r. Over all
      layers, the mean.
    - `energy_top_quarter`, `energy_last_quarter`: the share of ||dW||^2 that lies in the largest quarter of the
      directions, and in the smallest one. Over all layers, the mean.
    - `relative_norm`: ||dW|| / ||W|| (Frobenius norms), how far the adapted weight is from the base's.
    - `gradient_share_A`, `gradient_share_B`: the part of the whole gradient's squared norm that falls on this A or
      this B. All shares add up to 1. With several optimizers, each gradient is that of its optimizer's last step; NaN
      where that was not among the last steps.
    - `is_zero`: 1 where the update is still zero, so that the layer computes what the base computes; over all layers,
      how many there are.

    The numbers describe; none of them says by itself that a rank is too high or too low. The mean effective rank is
    shown in the progress bar. Layers without a gradient, and updates that stay zero although training goes on, are
    named once in a warning. Training is not changed: no random number is drawn, no gradient touched. With
    MultiLoRACallback each adapter is looked at (`lora/effective_rank/r4`, `lora/effective_rank/LAYER/r4`), and the
    progress bar shows the mean of all.

    Raises ConfigError for an argument that is not valid, and AdapterStateError when training starts on a model without
    adapters.
    """

    def __init__(self, every_n_steps: int = 50, *, by_layer: bool = True) -> None:
        """
        Args:
            every_n_steps: How many optimizer steps lie between two looks.
            by_layer: Log the numbers of each layer too; else only those over all layers.
        """
        self.every_n_steps = whole("every_n_steps", every_n_steps)
        self.by_layer = flag("by_layer", by_layer)
        self._base_norms: dict[str, float] = {}
        self._silent: dict[str, Pair] = {}
        """Pairs that have had no gradient so far, by what a warning calls them."""
        self._gradients: dict[str | None, dict[tuple[str, str], float]] = {}
        """Adapter, of several -> layer and factor -> the squared norm of its gradient."""
        self._is_due = False
        """Whether the step of a look has begun."""
        self._trains = False
        """Whether the step of a look had finite gradients and a learning rate above zero."""
        self._has_warned = False

    def __repr__(self) -> str:
        return f"AdapterMonitor(every_n_steps={self.every_n_steps}, by_layer={self.by_layer})"

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        check_some_of_ours(pl_module, Tree.of(pl_module))
        self._base_norms, self._silent, self._gradients = {}, {}, {}
        self._is_due = self._has_warned = False
        several = _several(trainer)
        for name in (None,) if several is None else several.names:
            with _using(several, name):
                self._silent |= {_called(pair, name): pair for pair in pairs(pl_module)}

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        # Here an accumulation window is complete, processes have exchanged gradients, and a GradScaler has unscaled.
        if self._silent:
            self._silent = {n: pair for n, pair in self._silent.items() if pair.A.grad is None and pair.B.grad is None}
        # Each optimizer steps by itself, and another one's gradients may be gone already.
        left, several = -(trainer.global_step + 1) % self.every_n_steps, _several(trainer)
        if left >= len(trainer.optimizers):
            return
        held = {id(p) for group in optimizer.param_groups for p in group["params"]}
        takes_all = len(trainer.optimizers) == 1
        factors = {(pair.name, side): p for pair in pairs(pl_module) for side, p in (("A", pair.A), ("B", pair.B))}
        factors = {key: p for key, p in factors.items() if takes_all or id(p) in held}
        squares = _squares([p.grad for p in factors.values()])
        of_adapter = self._gradients.setdefault(None if several is None else several.current, {})
        of_adapter.update(zip(factors, squares.tolist()))
        self._is_due = left == 0
        has_gradient = bool(squares.isfinite().all()) and bool(squares.any())
        self._trains = has_gradient and any(float(group["lr"]) > 0 for group in optimizer.param_groups)

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not self._is_due:
            return
        gradients, self._gradients, self._is_due = self._gradients, {}, False
        metrics: dict[str, float] = {}
        used, zero = [], []
        for adapter, squares in gradients.items():
            with _using(_several(trainer), adapter):
                own = list(pairs(pl_module))
                found = self._look(own, squares)
                zero += [_called(pair, adapter) for pair in own if found[f"lora/is_zero/{pair.name}"]]
            used.append(found["lora/effective_rank"])
            shown = found if self.by_layer else {key: value for key, value in found.items() if key.count("/") == 1}
            metrics |= {key if adapter is None else f"{key}/{adapter}": value for key, value in shown.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=batches_that_stepped(trainer))
        mean = sum(used) / len(used)
        pl_module.log("effective_rank", mean, prog_bar=True, logger=False, on_step=True, on_epoch=False, batch_size=1)
        if self._trains and not self._has_warned:
            self._warn(zero, trainer)

    def _look(self, own: Sequence[Pair], squares: Mapping[tuple[str, str], float]) -> dict[str, float]:
        """The metrics of the adapter with these pairs, over all layers and by layer."""
        layers, total = _spectra(own), torch.tensor(sum(squares.values()), dtype=torch.float64)
        shares = {}
        for side in ("A", "B"):
            known = [squares.get((p.name, side), math.nan if getattr(p, side).requires_grad else 0.0) for p in own]
            layers[f"gradient_share_{side}"] = torch.tensor(known, dtype=torch.float64) / total
            shares[f"gradient_share_{side}"] = sum(square for (_, s), square in squares.items() if s == side) / total
        norms, base = layers.pop("norm"), self._norms_of_base(own)
        layers |= {"relative_norm": norms / base, "is_zero": (norms == 0).float()}
        overall = {name: values.mean() for name, values in layers.items()}
        overall |= {**shares, "is_zero": layers["is_zero"].sum()}
        overall["relative_norm"] = norms[~base.isnan()].norm() / base[~base.isnan()].norm()
        metrics = {f"lora/{name}": float(value) for name, value in overall.items()}
        for name, values in layers.items():
            metrics |= {f"lora/{name}/{pair.name}": value for pair, value in zip(own, values.tolist())}
        return metrics

    def _norms_of_base(self, own: Sequence[Pair]) -> Tensor:
        """||W|| of each pair, which is computed once: the base is frozen. NaN for a layer without a weight."""
        for pair in own:
            if pair.name not in self._base_norms:
                W = pair.module.own(pair.parameter)
                W = W if W is None or is_plain(W) else pair.module.dense_weight(pair.parameter)
                norm = math.nan if W is None else torch.linalg.vector_norm(gathered(W), dtype=torch.float32)
                self._base_norms[pair.name] = float(norm)
        return torch.tensor([self._base_norms[pair.name] for pair in own])

    def _warn(self, zero: Iterable[str], trainer: Trainer) -> None:
        still = [name for name in zero if name not in self._silent]
        said = []
        if self._silent:
            said.append(
                f"{len(self._silent)} adapters have had no gradient since training began, so they do not train: "
                f"{listed(self._silent)}. Their layers are not called, or their outputs do not reach the loss"
            )
        if still:
            said.append(
                f"{len(still)} updates are still zero although gradients arrive: {listed(still)}. Look whether the "
                "optimizer holds their A and B, and with which learning rate"
            )
        if said:
            self._has_warned = True
            rank_zero_warn(f"AdapterMonitor, at step {trainer.global_step}: {'. '.join(said)}.")


def _several(trainer: Any) -> Any:
    """The adapters that the run of `trainer` trains, if MultiLoRACallback trains several; else None."""
    pack = getattr(trainer.strategy, "pack", None)
    return None if pack is None else pack.several


def _using(several: Any, name: str | None) -> AbstractContextManager[None]:
    return nullcontext() if name is None else several.using(name)


def _called(pair: Pair, adapter: str | None) -> str:
    return pair.name if adapter is None else f"{pair.name} of {adapter}"


def _squares(gradients: Sequence[Tensor | None]) -> Tensor:
    """The squared norm of each gradient, in float64 on the CPU; 0 for None."""
    held = [torch.linalg.vector_norm(gathered(g), dtype=torch.float32) for g in gradients if g is not None]
    norms = iter(torch.stack(held).cpu().tolist() if held else [])
    return torch.tensor([0.0 if g is None else next(norms) for g in gradients], dtype=torch.float64).square()


def _spectra(own: Sequence[Pair]) -> Values:
    """What the singular values of each pair's update say, and its Frobenius norm."""
    alike: dict[Any, list[int]] = defaultdict(list)
    factors = [tuple(map(gathered, pair.module.matrices(pair.parameter))) for pair in own]
    for place, (A, B) in enumerate(factors):
        alike[A.shape, B.shape, A.dtype, A.device].append(place)
    found = {name: torch.zeros(len(own)) for name in (*_OF_SPECTRUM, "norm")}
    for places in alike.values():  # pairs of one shape at once: a small product costs less than the call for it
        A, B = (torch.stack([factors[place][side] for place in places]) for side in (0, 1))
        S = stacked_singular_values(B.flatten(0, -3), A.flatten(0, -3))  # groups of a convolution are blocks
        S = S.view(len(places), -1).sort(-1, descending=True).values
        for name, of in _OF_SPECTRUM.items():
            found[name][places] = of(S).float()
        scales = torch.tensor([abs(own[place].spec.scale) for place in places])
        found["norm"][places] = scales * S.norm(dim=-1).float()
    return found


_OF_SPECTRUM = {
    "effective_rank": effective_ranks,
    "stable_rank": stable_ranks,
    "energy_top_quarter": lambda S: quarter_shares(S)[0],
    "energy_last_quarter": lambda S: quarter_shares(S)[1],
}
