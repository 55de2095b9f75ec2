"""What is supported, layer by layer and variant by variant: every cell of examples/supported.md is tried here.

    python tests/support.py     # writes the table

tests/test_support.py tries the same cells, and fails where the table says otherwise.
"""

from __future__ import annotations

import copy
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch
from cases import CASES, Case, randomise
from peft import PeftModel
from snapshot import assert_same, snapshot
from torch import nn

from lightning_lora.engine import LoRAConfig, inject, merged, remove
from lightning_lora.engine.inits import INITS
from lightning_lora.errors import ConfigError, TargetError
from lightning_lora.hub import save_adapter

TABLE = Path(__file__).parents[1] / "examples" / "supported.md"

KINDS = {
    "nn.Linear and all that derives from it": "linear",
    "transformers' Conv1D": "transformers-conv1d",
    "nn.Embedding": "embedding",
    "nn.EmbeddingBag (sum, mean)": "embedding-bag",
    "nn.Conv1d, 2d, 3d": "conv2d-stride-padding",
    "the same with groups": "conv2d-groups",
    "nn.ConvTranspose1d, 2d, 3d": "conv-transpose2d",
    "nn.MultiheadAttention": "attention-packed",
    "the same with kdim, vdim": "attention-separate",
    "nn.LSTM, GRU, RNN": "lstm",
    "nn.LSTMCell, GRUCell, RNNCell": "LSTMCell",
    "nn.Bilinear": "bilinear",
    "any matrix, by target_parameters": "linear-parameter",
    "stacked experts, by target_parameters": "experts",
    "a layer type of your own": "own-layer",
}
VARIANTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "DoRA": {"use_dora": True},
    "dropout": {"dropout": 0.5},
    "rank dropout": {"rank_dropout": 0.5},
    "module dropout": {"module_dropout": 0.5},
    "bias of B": {"lora_bias": True},
    "LoRA-FA": {"freeze_a": True},
    "rsLoRA": {"use_rslora": True},
    **{f"init: {name}": {"init": name} for name, init in INITS.items() if not init.measures},
}
READ_BY_PEFT = "in PEFT the same"
CELLS = [(kind, variant) for kind in KINDS for variant in (*VARIANTS, READ_BY_PEFT)]


def cell(kind: str, variant: str) -> str:
    """What the table says: "yes", "no effect", or "-" where it is refused. Fails where a promise is not kept."""
    case = next(case for case in CASES if case.name == KINDS[kind])
    if variant == READ_BY_PEFT:
        return _peft_reads(case)
    model, x = _trainable(case), _input(case)
    before, output = snapshot(model), model.eval()(x).detach()
    model.train()
    try:
        inject(model, _config(case, VARIANTS[variant]))
    except (ConfigError, TargetError):
        assert_same(snapshot(model), before)
        return "-"
    # Where B A is not zero at first, what is left out of it is left out bit for bit.
    torch.testing.assert_close(model.eval()(x), output)
    randomise(model)
    (model.train()(x).square().sum()).backward()
    trained = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
    assert not trained, f"no gradient: {trained}"
    is_random = not all(model(x).equal(model(x)) for _ in range(20))
    model.eval()
    adapted = model(x).detach()
    assert not adapted.allclose(output, atol=1e-3)
    with torch.no_grad(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Merged, a convolution with groups")
        with merged(model):
            torch.testing.assert_close(model(x), adapted, rtol=1e-4, atol=1e-4)
    remove(model)
    assert_same(snapshot(model.train()), before)
    return "no effect" if "dropout" in variant and not is_random else "yes"


def table() -> str:
    """The page that holds the table."""
    columns = [*VARIANTS, READ_BY_PEFT]
    lines = [
        "# What is supported",
        "",
        "Every cell was tried: a fresh adapter changes nothing, all that is trained gets a gradient, `merged` gives",
        "the adapted output, and `remove` gives back the layer bit for bit. `-` is refused, with the reason, before",
        "anything is changed; in the last column, PEFT has no adapter for the layer. `computes otherwise` is said when",
        "an adapter is saved: PEFT wraps a layer that is never called. Every row can be merged.",
        "Initialisers that start from data are not listed. Written by `python tests/support.py`.",
        "",
        f"| layer | {' | '.join(columns)} |",
        f"|---{'|---' * len(columns)}|",
        *(f"| {kind} | {' | '.join(cell(kind, column) for column in columns)} |" for kind in KINDS),
        "",
    ]
    return "\n".join(lines)


def _config(case: Case, fields: dict[str, Any]) -> LoRAConfig:
    common = {"rank": 2, "alpha": 3.0, "target_modules": ["layer"]}
    return LoRAConfig(**{**common, **case.config, "rank_pattern": {}, **fields})


def _trainable(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return case.model()


def _input(case: Case) -> torch.Tensor:
    return case.input()


def _peft_reads(case: Case) -> str:
    """Whether PEFT, given the folder and the base, computes the same."""
    base = case.model().eval()
    model = copy.deepcopy(base)
    inject(model, _config(case, {}))
    randomise(model)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        save_adapter(model, Path(folder) / "adapter")
        if any("PEFT cannot" in str(w.message) for w in said):
            return "-"
        theirs = PeftModel.from_pretrained(base, Path(folder) / "adapter").eval()
    return "yes" if theirs(case.input()).allclose(model.eval()(case.input()), atol=1e-4) else "computes otherwise"


if __name__ == "__main__":
    TABLE.write_text(table(), encoding="utf-8")
