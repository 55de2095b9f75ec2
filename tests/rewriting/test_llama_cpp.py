"""llama.cpp itself computes what an export promises, and gets wrong what the export refuses."""

from __future__ import annotations

import copy
import itertools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import Tensor, nn

from lightning_lora import LoRAConfig, export_adapter, inject, load_adapter, save_adapter
from lightning_lora.cli.merged_model import merge_adapter
from lightning_lora.errors import AdapterFormatError
from lightning_lora.recipes.models import ModelSource
from tests.hub.models import output, peft_folder, shake
from tests.rewriting import llama_cpp

pytestmark = [
    pytest.mark.llama,
    pytest.mark.skipif(not llama_cpp.LIBRARY.exists(), reason=llama_cpp.ABSENT),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'.*lora_B.bias"),
    pytest.mark.filterwarnings("ignore:.*tie"),
]

TOKENS = [3, 17, 5, 29, 8, 41, 11, 30, 4, 22, 9, 35]
X = torch.tensor([TOKENS])

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 32}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "head_dim": 8}
EXPERTS |= {"norm_topk_prob": True}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "num_key_value_heads": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
}
BASES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": False}),
    "llama-tied": ("Llama", {"tie_word_embeddings": True}),
    "mistral": ("Mistral", {}),
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 8}),
    "qwen3-moe": ("Qwen3Moe", EXPERTS),
    "gemma": ("Gemma", {"head_dim": 8}),
    "gemma2": ("Gemma2", GEMMA),
    "gemma3": ("Gemma3", GEMMA),
    "deepseek": ("DeepseekV2", LATENT),
    "phi3": ("Phi3", {"original_max_position_embeddings": 64}),
    "granite": ("Granite", {}),
    "olmo2": ("Olmo2", {}),
    "starcoder2": ("Starcoder2", {}),
}


@dataclass(frozen=True)
class Base:
    """A base as torch has it and as llama.cpp has it."""

    model: nn.Module
    folder: Path
    gguf: Path
    bound: float
    """How far the outputs of the two may be from each other."""

    def runs(self, adapter: Path | None) -> Tensor:
        """The logits of llama.cpp, with the adapter in that folder."""
        gguf = None if adapter is None else llama_cpp.convert_adapter(adapter, self.folder)
        return torch.from_numpy(llama_cpp.logits(self.gguf, TOKENS, gguf))


def off(got: Tensor, wanted: Tensor) -> float:
    return float((got[:, : wanted.shape[-1]] - wanted[0]).abs().max())


def random_model(kind: str) -> Any:
    """Weights large enough that all layers count."""
    torch.manual_seed(1)
    name, changes = BASES[kind]
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Gemma3" else f"{name}Config")
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**{**SIZES, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(4 * parameter if parameter.ndim > 1 else parameter + 0.1 * torch.randn(parameter.shape))
    return model


@pytest.fixture(scope="module")
def base_of(tmp_path_factory) -> Callable[[str], Base]:
    made: dict[str, Base] = {}

    def base(kind: str) -> Base:
        if kind not in made:
            model, folder = random_model(kind), tmp_path_factory.mktemp(kind) / "base"
            model.save_pretrained(folder)
            gguf, wanted = llama_cpp.convert(folder), output(model, X)
            floor = off(torch.from_numpy(llama_cpp.logits(gguf, TOKENS)), wanted)
            # What the base itself is off by: other orders of summation, and GELU from a table in float16. Not less
            # than float32 can tell at all, or a lucky base would ask too much of its adapters.
            floor = max(floor, 4 * torch.finfo(torch.float32).eps * float(wanted.abs().max()))
            assert floor < 1e-3 * float(wanted.abs().max())
            # An adapted model does what the base does, two products more for each module, on larger activations.
            made[kind] = Base(model, folder, gguf, 16 * floor)
        return made[kind]

    return base


def adapted(base: Base, folder: Path, **fields: Any) -> Tensor:
    """Save what PEFT makes of `fields` (`by_us`: what this package makes of them); returns its logits."""
    if fields.pop("by_us", False):
        model = copy.deepcopy(base.model)
        inject(model, LoRAConfig(**fields))
        shake(model)
        save_adapter(model, folder)
    else:
        model = peft_folder(base.model, folder, **fields)
    wanted = output(model, X)
    # Else nothing is tested.
    assert float((wanted - output(base.model, X)).abs().max()) > 100 * base.bound
    return wanted


ALL = "all-linear"
QV = ["q_proj", "v_proj"]
RIGHT: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("llama", {"target_modules": ALL, "r": 4, "lora_alpha": 6}),
    "rslora": ("llama", {"target_modules": ALL, "r": 3, "use_rslora": True}),
    "rank-pattern": ("llama", {"target_modules": ALL, "r": 4, "rank_pattern": {"q_proj": 2, "layers.1.*up_proj": 3}}),
    "alpha-pattern": (
        "llama",
        {"target_modules": QV, "r": 4, "alpha_pattern": {"q_proj": 3, "1.self_attn.v_proj": 5.5}},
    ),
    "both-patterns": (
        "llama",
        {
            "target_modules": QV,
            "r": 3,
            "rank_pattern": {"q_proj": 5},
            "alpha_pattern": {"v_proj": 1},
            "use_rslora": True,
        },
    ),
    "dora": ("llama", {"target_modules": ALL, "r": 2, "use_dora": True}),
    "pissa": ("llama", {"by_us": True, "init": "pissa", "rank": 3}),
    "olora": ("llama", {"by_us": True, "init": "olora", "rank": 3}),
    "ours": ("llama", {"by_us": True, "rank": 4, "rank_pattern": {"q_proj": 2}, "use_rslora": True}),
    "layers": ("llama", {"target_modules": QV, "layers_to_transform": [1], "r": 4}),
    "head": ("llama", {"target_modules": ["lm_head", "q_proj"], "r": 2, "rank_pattern": {"lm_head": 3}}),
    "embedding": ("llama", {"target_modules": ["embed_tokens", "q_proj"], "r": 2, "rank_pattern": {"embed_tokens": 3}}),
    "head-and-embedding": ("llama", {"target_modules": ["embed_tokens", "lm_head"], "r": 2, "use_rslora": True}),
    "tied": ("llama-tied", {"target_modules": ALL, "r": 2}),
    **{
        kind: (kind, {"target_modules": ALL, "r": 3, "use_rslora": True})
        for kind in ("mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "granite", "olmo2", "starcoder2")
    },
    **{
        kind: (kind, {"target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"], "r": 3, "use_rslora": True})
        for kind in ("mixtral", "qwen3-moe")
    },
}


@pytest.mark.parametrize("case", RIGHT)
def test_what_is_exported_is_computed_there(case, base_of, tmp_path):
    kind, fields = RIGHT[case]
    base = base_of(kind)
    wanted = adapted(base, tmp_path / "a", **fields)
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp", base=base.folder, tolerance=1e-6)
    assert not [note for note in report.notes if "tried" in note]
    assert off(base.runs(tmp_path / "b"), wanted) <= base.bound


WRONG: dict[str, tuple[str, dict[str, Any], str]] = {
    "head-tied": ("llama-tied", {"target_modules": ["lm_head", "q_proj"]}, "share one weight.*lm_head.*merge"),
    "embedding-tied": ("llama-tied", {"target_modules": ["embed_tokens"]}, "share one weight.*embed_tokens.*merge"),
    "head-gemma": ("gemma", {"target_modules": ["lm_head"]}, "no separate head for GemmaForCausalLM.*train without"),
    "latent": (
        "deepseek",
        {"target_modules": ["q_a_proj", "q_b_proj"]},
        "applies no adapters of.*latent.*q_a_proj.*merge",
    ),
    "latent-keys": ("deepseek", {"target_modules": ["kv_a_proj_with_mqa", "kv_b_proj"]}, "applies no adapters of"),
    "latent-head": ("deepseek", {"target_modules": ["lm_head"]}, "applies no adapters of.*lm_head"),
    "bias": ("qwen2", {"target_modules": QV, "bias": "lora_only"}, "trained biases"),
    "lora-bias": ("qwen2", {"target_modules": QV, "lora_bias": True}, "lora_bias"),
    "whole": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}, "lm_head.*merge"),
    "norms": ("llama", {"target_modules": QV, "modules_to_save": ["norm"]}, "norm.*merge"),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_refused_it_refuses_or_gets_wrong(case, base_of, tmp_path):
    kind, fields, match = WRONG[case]
    base = base_of(kind)
    # r and lora_alpha as llama.cpp understands them: nothing but the case itself is in its way.
    wanted = adapted(base, tmp_path / "a", r=2, lora_alpha=4, **fields)
    with pytest.raises(AdapterFormatError, match=match):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp", base=base.folder)
    assert not (tmp_path / "b").exists()
    try:
        got = base.runs(tmp_path / "a")
    except llama_cpp.LlamaError:
        return
    assert off(got, wanted) > 10 * base.bound


def experts(folder: Path, kinds: dict[str, tuple[int, int]], rank_of: Callable[[int], int]) -> None:
    """An adapter of Mixtral's experts as transformers 4 named them: `kinds` are the (out, in) of each matrix."""
    tensors = {}
    for layer, expert, (kind, (out, into)) in itertools.product(range(2), range(4), kinds.items()):
        stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{kind}"
        rank = rank_of(expert)
        tensors |= {f"{stem}.lora_A.weight": torch.randn(rank, into), f"{stem}.lora_B.weight": torch.randn(out, rank)}
    folder.mkdir()
    save_file({key: 0.2 * tensor for key, tensor in tensors.items()}, folder / "adapter_model.safetensors")
    ranks = {f"experts.{expert}.{kind}": rank_of(expert) for expert in range(4) for kind in kinds}
    config = {"peft_type": "LORA", "target_modules": list(kinds), "r": 2, "lora_alpha": 4, "use_rslora": True}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "rank_pattern": ranks}))


KINDS = {"w1": (48, 32), "w2": (32, 48), "w3": (48, 32)}


def test_experts_are_computed_there_all_together_or_refused(base_of, tmp_path):
    base = base_of("mixtral")
    experts(tmp_path / "a", KINDS, lambda expert: 2)
    model = copy.deepcopy(base.model)
    load_adapter(model, tmp_path / "a")
    wanted = output(model, X)
    assert float((wanted - output(base.model, X)).abs().max()) > 100 * base.bound
    export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp", base=base.folder)
    assert off(base.runs(tmp_path / "b"), wanted) <= base.bound
    experts(tmp_path / "some", {"w1": KINDS["w1"]}, lambda expert: 2)
    experts(tmp_path / "ranks", KINDS, lambda expert: 2 + expert)
    for folder in (tmp_path / "some", tmp_path / "ranks"):
        with pytest.raises(AdapterFormatError, match=r"experts of a layer .*merge"):
            export_adapter(folder, tmp_path / "c", consumer="llama.cpp", base=base.folder)
        with pytest.raises(llama_cpp.LlamaError):
            base.runs(folder)


@pytest.mark.parametrize("targets", [["q_proj", "v_proj"], ["lm_head"], ["embed_tokens"], ["embed_tokens", "lm_head"]])
@pytest.mark.parametrize("kind", ["llama", "llama-tied", "gemma3"])
def test_a_merged_model_is_computed_there(kind, targets, base_of, tmp_path):
    base = base_of(kind)
    wanted = adapted(base, tmp_path / "a", target_modules=targets)
    merge_adapter(tmp_path / "a", ModelSource(name=str(base.folder)), tmp_path / "merged")
    got = llama_cpp.logits(llama_cpp.convert(tmp_path / "merged"), TOKENS)
    assert off(torch.from_numpy(got), wanted) <= base.bound


def test_a_merge_says_where_llama_cpp_would_leave_the_head_out(base_of, tmp_path):
    base = base_of("gemma")
    wanted = adapted(base, tmp_path / "a", target_modules=["lm_head"])
    report = merge_adapter(tmp_path / "a", ModelSource(name=str(base.folder)), tmp_path / "merged")
    assert "llama.cpp has no separate head for GemmaForCausalLM" in str(report)
    got = llama_cpp.logits(llama_cpp.convert(tmp_path / "merged"), TOKENS)
    assert off(torch.from_numpy(got), wanted) > 10 * base.bound
