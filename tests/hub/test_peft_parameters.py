"""Adapters of parameters, and of layers that read their own: what PEFT can read of them, and what it cannot."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import LoRAConfig, inject, load_adapter, remove, save_adapter
from lightning_lora.engine.inits import INITS, Factors, Init
from lightning_lora.errors import AdapterFormatError
from tests.hub.models import assert_same, build, by_peft, edit_config, output, peft_folder, shake, state

# float32: the two compute the same products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
EXPERTS = ["experts.up", "experts.down"]

OURS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixture", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts-transposed": ("mixture-transposed", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts-one": ("mixture", {"target_modules": [], "target_parameters": ["down"]}),
    "experts-and-router": ("mixture", {"target_modules": ["router"], "target_parameters": EXPERTS}),
    "experts-rslora": ("mixture", {"target_modules": [], "target_parameters": EXPERTS, "use_rslora": True}),
    "experts-patterns": (
        "mixture",
        {
            "target_modules": ["router"],
            "target_parameters": EXPERTS,
            "rank_pattern": {"experts.up": 3, "router": 1},
            "alpha_pattern": {"down": 5},
        },
    ),
    "experts-head": ("mixture", {"target_modules": [], "target_parameters": EXPERTS, "modules_to_save": ["head"]}),
    "matrix": ("linears", {"target_modules": ["0"], "target_parameters": ["fc.weight"]}),
    "attention": ("attention", {"target_modules": ["inp", "attention"]}),
    "attention-patterns": (
        "attention",
        {"target_modules": ["inp", "attention"], "rank_pattern": {"attention": 3}, "alpha_pattern": {"attention": 5}},
    ),
    "attention-projections": ("attention", {"target_modules": [], "target_parameters": ["attention.in_proj_weight"]}),
    "attention-parts": (
        "attention-parts",
        {"target_modules": [], "target_parameters": ["k_proj_weight"]},
    ),
    "cell": ("odd", {"target_modules": ["cell"]}),
    "recurrent": ("odd", {"target_modules": ["rnn"]}),
    "bilinear": ("odd", {"target_modules": ["pair"]}),
    "tokens": ("words", {"target_modules": ["fc"], "trainable_token_indices": {"embed": [3, 1, 7]}}),
    "tokens-of-the-input": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}),
    "tokens-tied": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}),
}

ALONE: dict[str, tuple[str, dict[str, Any], str]] = {
    "experts-dora": ("mixture", {"target_modules": [], "target_parameters": EXPERTS, "use_dora": True}, "cannot load"),
    "attention-dora": ("attention", {"target_modules": ["attention"], "use_dora": True}, "cannot load"),
    "attention-uneven": (
        "attention",
        {"target_modules": ["attention"], "rank_pattern": {"out_proj": 1}},
        "ignores.*attention.out_proj",
    ),
    "attention-parts-whole": ("attention-parts", {"target_modules": ["attention"]}, "ignores.*attention.out_proj"),
    "bag": ("odd", {"target_modules": ["bag"]}, "cannot load.*bag"),
    "transposed-convolution": ("odd", {"target_modules": ["up"]}, "cannot load.*up"),
    "transposed-convolution-dora": ("odd", {"target_modules": ["up"], "use_dora": True}, "cannot load.*up"),
    "tokens-alone": (
        "words",
        {"target_modules": [], "trainable_token_indices": {"embed": [3]}},
        "cannot load.* rows alone: embed",
    ),
    "odd": ("odd", {"target_modules": ["bag", "cell", "pair", "rnn", "up"]}, "cannot load.*bag, up"),
}

THEIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "experts": ("mixture", {"target_modules": [], "target_parameters": EXPERTS}),
    "experts-transposed": ("mixture-transposed", {"target_modules": ["router"], "target_parameters": EXPERTS}),
    "experts-patterns": (
        "mixture",
        {"target_modules": [], "target_parameters": ["up", "down"], "rank_pattern": {"experts.up": 3}, "lora_alpha": 3},
    ),
    "matrix": ("linears", {"target_modules": [], "target_parameters": ["fc.weight", "head.weight"]}),
    "unmatched": ("mixture", {"target_modules": [], "target_parameters": ["experts.up", "experts.gate"]}),
    "attention": ("attention", {"target_modules": ["attention"]}),
    "attention-patterns": (
        "attention",
        {"target_modules": ["attention", "head"], "rank_pattern": {"attention": 4}, "use_rslora": True},
    ),
    "tokens": ("words", {"target_modules": ["fc"], "trainable_token_indices": {"bed": [3, 1, 7]}}),
    "tokens-of-the-input": ("llama", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}),
    "tokens-tied": ("llama-tied", {"target_modules": ["q_proj"], "trainable_token_indices": [5, 2]}),
}


def ours(kind: str, fields: dict[str, Any]) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    base, x = build(kind)
    model = copy.deepcopy(base)
    inject(model, LoRAConfig(**{"rank": 2, **fields}))
    shake(model)
    return base, model, x


@pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning")
@pytest.mark.parametrize("case", OURS)
def test_peft_loads_what_we_save(case, tmp_path):
    base, model, x = ours(*OURS[case])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*(rank|alpha)_pattern keys did not match", RuntimeWarning)
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)
        folder = save_adapter(model, tmp_path / "adapter")
        loaded = by_peft(base, folder)
    expected = output(model, x)
    assert not torch.allclose(expected, output(base, x), **CLOSE)
    torch.testing.assert_close(output(loaded, x), expected, **CLOSE)


@pytest.mark.filterwarnings("ignore:PEFT (cannot load|loads)")
@pytest.mark.parametrize("case", [*OURS, *ALONE])
def test_we_load_what_we_save(case, tmp_path):
    kind, fields, *_ = {**OURS, **ALONE}[case]
    base, model, x = ours(kind, fields)
    folder = save_adapter(model, tmp_path / "adapter")
    loaded = copy.deepcopy(base)
    load_adapter(loaded, folder)
    assert torch.equal(output(loaded, x), output(model, x))
    again = save_adapter(loaded, tmp_path / "again")
    assert (again / "adapter_config.json").read_text() == (folder / "adapter_config.json").read_text()
    remove(loaded)
    assert_same(state(base), state(loaded))
    holder = pl.LightningModule()
    holder.net = copy.deepcopy(base)
    load_adapter(holder, folder)
    assert torch.equal(output(holder.net, x), output(model, x))


@pytest.mark.filterwarnings("ignore:PEFT (cannot load|loads)")
@pytest.mark.parametrize("case", ALONE)
def test_what_peft_cannot_read_is_said(case, tmp_path):
    kind, fields, said = ALONE[case]
    base, model, x = ours(kind, fields)
    with pytest.warns(UserWarning, match=said):
        folder = save_adapter(model, tmp_path / "adapter")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            loaded = by_peft(base, folder)
    except (ValueError, RuntimeError, TypeError):
        assert "cannot load" in said
    else:
        assert not torch.allclose(output(loaded, x), output(model, x), **CLOSE)


@pytest.mark.parametrize("case", THEIRS)
def test_we_load_what_peft_saves_and_it_loads_what_we_save_of_that(case, tmp_path):
    kind, fields = THEIRS[case]
    base, x = build(kind)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        adapted = peft_folder(base, tmp_path / "theirs", **fields)
    model = copy.deepcopy(base)
    load_adapter(model, tmp_path / "theirs")
    expected = output(adapted, x)
    assert not torch.allclose(expected, output(base, x), **CLOSE)
    torch.testing.assert_close(output(model, x), expected, **CLOSE)
    folder = save_adapter(model, tmp_path / "ours")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.testing.assert_close(output(by_peft(base, folder), x), expected, **CLOSE)


@pytest.mark.parametrize("kind", ["mixture", "mixture-transposed", "attention"])
def test_a_start_away_from_zero_becomes_further_ranks_of_each_matrix(kind, tmp_path, monkeypatch):
    def ones(rank: int, d_in: int, d_out: int) -> Factors:
        return Factors(A=torch.ones(rank, d_in), B=torch.full((d_out, rank), 0.25))

    monkeypatch.setitem(INITS, "ones", Init(ones, frozenset(("rank", "d_in", "d_out"))))
    fields = {"target_modules": ["attention"]} if kind == "attention" else {"target_parameters": EXPERTS}
    base, model, x = ours(kind, {"target_modules": [], "init": "ones", **fields})
    folder = save_adapter(model, tmp_path / "adapter")
    expected = output(model, x)
    torch.testing.assert_close(output(by_peft(base, folder), x), expected, **CLOSE)
    load_adapter(base, folder)
    torch.testing.assert_close(output(base, x), expected, **CLOSE)


def test_dropout_that_peft_refuses_beside_parameters_is_kept_in_the_metadata(tmp_path):
    base, model, x = ours("mixture", {"target_modules": ["router"], "target_parameters": EXPERTS, "dropout": 0.25})
    folder = save_adapter(model, tmp_path / "adapter")
    torch.testing.assert_close(output(by_peft(base, folder), x), output(model, x), **CLOSE)
    load_adapter(base, folder)
    assert base.router.lora.dropout == 0.25


@pytest.mark.parametrize("version", ["0.18.1", None, "?"])
def test_stacks_of_an_older_peft_are_refused(version, tmp_path):
    base, _, _ = ours("mixture", OURS["experts"][1])
    peft_folder(base, tmp_path, target_modules=[], target_parameters=EXPERTS)
    edit_config(tmp_path, peft_version=version)
    with pytest.raises(AdapterFormatError, match=r"before PEFT 0\.19"):
        load_adapter(base, tmp_path)


def test_the_keys_are_those_of_peft(tmp_path):
    _, model, _ = ours("mixture", OURS["experts"][1])
    base, _ = build("mixture")
    save_adapter(model, tmp_path / "ours")
    peft_folder(base, tmp_path / "theirs", target_modules=[], target_parameters=EXPERTS)
    written, theirs = (load_file(tmp_path / who / "adapter_model.safetensors") for who in ("ours", "theirs"))
    assert {key: t.shape for key, t in written.items()} == {key: t.shape for key, t in theirs.items()}
