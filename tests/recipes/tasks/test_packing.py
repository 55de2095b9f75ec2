"""Packed examples have the very outputs that they have alone, for each kind of attention, or are refused."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import modeling_flash_attention_utils as flash

from lightning_lora import LoRAConfig, inject
from lightning_lora.errors import ConfigError
from lightning_lora.recipes.data import InstructionData
from lightning_lora.recipes.tasks import CausalLM
from lightning_lora.recipes.tasks.causal_lm import check_apart, is_packed
from tests.recipes.data.rows import Rows

SIZES = {"vocab_size": 259, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 4, "head_dim": 8}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0, "num_experts_per_tok": 2}
WINDOW = {"sliding_window": 5}  # shorter than the examples
APART = {
    "Llama": {},
    "Qwen3": {},
    "Mistral": WINDOW,
    "Gemma2": WINDOW,
    "Gemma3": WINDOW,
    "Phi3": WINDOW,
}
MIXING = {
    "Bloom": {"n_layer": 2, "n_head": 4},
    "Falcon": {},
    "OPT": {"ffn_dim": 24, "word_embed_proj_dim": 16},
    "Mamba": {"state_size": 4},
    "GptOss": {**WINDOW, "num_local_experts": 4},
    "Lfm2": {"layer_types": ["conv", "full_attention", "conv", "conv"]},
    "Qwen3Next": {"num_experts": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
}


def model_of(name: str, attention: str = "eager", **fields: object) -> nn.Module:
    tail = "TextConfig" if name == "Gemma3" else "Config"
    sizes = {key: value for key, value in SIZES.items() if (name, key) != ("Falcon", "head_dim")}
    config = getattr(transformers, name + tail)(**sizes, **HEADS, **fields)
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config).to(torch.float64 if name in APART else None).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.3)
    model.config._attn_implementation = attention  # from_pretrained would ask for the package of flash attention
    return model


def flash_fn(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0, **_):
    """flash_attn.flash_attn_func by its documentation; all are (rows, tokens, heads, width)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    scores = q @ k.transpose(-1, -2) * (softmax_scale or q.shape[-1] ** -0.5)
    scores = softcap * (scores / softcap).tanh() if softcap else scores
    back = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
    seen = (back >= 0) | (not causal)
    seen &= back <= window_size[0] if window_size[0] >= 0 else True
    return (scores.masked_fill(~seen, -torch.inf).softmax(-1) @ v).transpose(1, 2)


def flash_varlen_fn(
    q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=0, max_seqlen_k=0, dropout_p=0.0, softmax_scale=None,
    causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """flash_attn.flash_attn_varlen_func by its documentation; all are (tokens, heads, width)."""
    assert cu_seqlens_q.dtype == torch.int32
    parts = [slice(start, end) for start, end in pairwise(cu_seqlens_q.tolist())]
    assert max_seqlen_q == max(part.stop - part.start for part in parts)
    options = {"softmax_scale": softmax_scale, "causal": causal, "window_size": window_size, "softcap": softcap}
    return torch.cat([flash_fn(q[None, part], k[None, part], v[None, part], **options)[0] for part in parts])


@pytest.fixture(autouse=True)
def emulated_flash(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(flash, "_lazy_imports", lambda *_, **__: (flash_fn, flash_varlen_fn, None, None, None))
    monkeypatch.setattr(flash, "_loaded_implementation", None)
    yield
    flash._loaded_implementation = None


def batches_of(llama, packing: bool) -> list[dict]:
    rows = [{"prompt": "Say " + "a" * n, "response": "b" * (3 * n + 1)} for n in range(1, 8)]
    data = InstructionData(
        llama, Rows(rows), chat_template="plain", packing=packing, max_length=150, batch_size=3 if packing else 1
    )
    data.setup("validate")
    return list(data.val_dataloader())


def loader(batches: list[dict]) -> DataLoader:
    return DataLoader(batches, batch_size=None)


def losses(model: nn.Module, batch: dict) -> list[float]:
    with torch.no_grad():
        logits = model(**batch, use_cache=False).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    each: Tensor = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none", ignore_index=-100)
    return each[targets != -100].tolist()


@pytest.mark.parametrize(
    ("name", "attention"),
    [
        (name, attention)
        for name in APART
        for attention in ("eager", "sdpa", "flash_attention_2")
        if (name, attention) != ("Gemma2", "sdpa")  # transformers refuses its softcap there
    ],
)
def test_packed_examples_have_the_losses_that_they_have_alone(llama, name, attention):
    alone = [loss for batch in batches_of(llama, False) for loss in losses(model_of(name, **APART[name]), batch)]
    model = model_of(name, attention, **APART[name])
    packed = batches_of(llama, True)
    assert is_packed(packed[0])
    assert len(packed[0]["input_ids"]) > 1
    check_apart(model, packed[0])
    found = [loss for batch in packed for loss in losses(model, batch)]
    # Eager softmax and norms are in float32 whatever the dtype: eps 6e-8 times sums of 40 terms, through four layers.
    # An example that sees another is off by 0.01 and more.
    assert sorted(found) == pytest.approx(sorted(alone), abs=1e-5)


def test_flash_attention_without_the_lengths_is_refused(llama):
    batch = {name: value for name, value in batches_of(llama, True)[0].items() if not name.startswith(("cu_", "max_"))}
    check_apart(model_of("Llama", "sdpa"), batch)
    with pytest.raises(ConfigError, match=r"LlamaForCausalLM .attention: flash_attention_2. lets packed examples see"):
        check_apart(model_of("Llama", "flash_attention_2"), batch)


@pytest.mark.parametrize("name", MIXING)
def test_a_model_that_mixes_packed_examples_is_refused(llama, trainer, name):
    task = CausalLM(llama)
    task.configure_model()
    task.model = model_of(name, **MIXING[name])
    with pytest.raises(ConfigError, match=r"packed examples"):
        trainer().validate(task, loader(batches_of(llama, True)), verbose=False)
    trainer().validate(task, loader(batches_of(llama, False)), verbose=False)


def test_an_activated_lora_is_refused(llama):
    model = model_of("Llama")
    inject(model, LoRAConfig(rank=2, alora_invocation_tokens=[5, 6]))
    with pytest.raises(ConfigError, match=r"activated LoRA .* packing=false"):
        check_apart(model, batches_of(llama, True)[0])


def test_the_trial_leaves_modes_and_random_numbers_as_they_were(llama):
    model = model_of("Llama").train()
    model.lm_head.eval()
    batch = batches_of(llama, True)[0]
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    check_apart(model, batch)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)


def test_rows_of_one_example_are_not_packed():
    ids, mask = torch.ones(2, 4, dtype=torch.long), torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    assert not is_packed({"input_ids": ids})
    assert not is_packed({"input_ids": ids, "position_ids": torch.arange(4).expand(2, 4)})
    padded = {"input_ids": ids, "attention_mask": mask, "position_ids": (mask.cumsum(1) - 1).clamp(min=0)}
    assert not is_packed(padded)
    assert is_packed({"input_ids": ids, "position_ids": torch.tensor([[0, 1, 0, 1], [0, 1, 2, 3]])})
