"""One row for each program that serves adapters: what it can do, and what it silently gets wrong.

The rows were read in the sources of vLLM 0.33.0, LoRAX a7394ba and peft 0.21.2. llama.cpp was run, as of
llama-cpp-python 0.3.36 (tests/rewriting/test_llama_cpp.py).
"""

from __future__ import annotations

from dataclasses import dataclass

from lightning_lora.checked import one_of


@dataclass(frozen=True, kw_only=True)
class Consumer:
    """The capabilities of one consumer. An adapter that needs more is rewritten, or refused if that is impossible."""

    title: str
    layout_of_peft: bool = False
    """Reads everything that PEFT writes: patterns, rsLoRA, DoRA, convolutions, whole modules, biases."""
    one_rank: bool = False
    """Needs the same rank in every module."""
    ranks: tuple[int, ...] | None = None
    """The ranks with which it computes rightly; None where it does so with any."""
    most_rank: int | None = None
    """The largest rank that it takes; None where it takes any."""
    limits: tuple[int, ...] = ()
    """The values that its own limit on ranks can have. Its default is `usual_limit`."""
    usual_limit: int | None = None
    flag: str = ""
    """The option that sets this limit."""
    embeddings: bool = True
    """Adapts embeddings."""
    heads: tuple[str, ...] = ()
    """The modules that it takes whole. An adapter may have at most one of them."""
    every_layer: bool = False
    """Needs a kind of module to be adapted in every layer of the model, or in none."""
    transposed: bool = True
    """Adapts transformers' Conv1D (GPT-2), whose weight is stored (in, out)."""
    needs_base_id: bool = False
    """Looks for the base under the id in the config."""
    tied: bool = True
    """Adapts an output head or an embedding even where they share one weight in the base."""
    one_table: tuple[str, ...] = ()
    """transformers' classes for which it uses the embedding as the head, even where the base has a head of its own."""
    word_tables: tuple[str, ...] = ()
    """Last parts of the names of the embeddings that it adapts; empty where it adapts any."""
    latent: bool = True
    """Adapts the projections of latent attention (DeepSeek), and the head of a model that has it."""
    experts_apart: bool = True
    """Can adapt only some of the experts of a layer, or some of their matrices, and can do so with different ranks."""
    tried: tuple[str, ...] = ()
    """transformers' classes with which it was run; empty where it treats all classes alike."""


CONSUMERS: dict[str, Consumer] = {
    # lora/peft_helper.py: rank_pattern and alpha_pattern are read since 0.33 at the latest; before, they were dropped
    # and every module got lora_alpha / r. It refuses lora_bias, any bias, DoRA, and whole modules other than a head for
    # classification (lora/lora_model.py; before, any). config/lora.py: --max-lora-rank ends at 512. lora_weights.py
    # stacks the experts of a layer, which needs one rank. lora/utils.py: lora_A, lora_B and lora_embedding_A, _B are
    # the only tensors; keys with "base_layer" pass its check and are then taken for something else.
    "vllm": Consumer(
        title="vLLM",
        one_rank=True,
        most_rank=512,
        limits=(8, 16, 32, 64, 128, 256, 320, 512),
        usual_limit=16,
        flag="--max-lora-rank",
        heads=("classifier", "score"),
    ),
    # server/lorax_server/adapters/lora.py: it has one scale for all modules. It stacks the layers, so ranks must be
    # equal. It silently drops a kind of module in all layers if one layer lacks it, and ignores tensors of other names.
    # r is set to the padded rank (8, or a multiple of 16: utils/punica.py) after the first kind of module is loaded, so
    # that the others get another scale unless r was such a rank; 128 is the largest of its kernels for decoding.
    "lorax": Consumer(
        title="LoRAX",
        one_rank=True,
        ranks=(8, 16, 32, 64, 128),
        most_rank=128,
        embeddings=False,
        every_layer=True,
    ),
    # src/llama-adapter.h: the scale is lora_alpha / (the rank of the tensor), and 1 where lora_alpha is 0; rsLoRA and
    # alpha_pattern are dropped. convert_lora_to_gguf.py exits on what is no A or B, except for norms, which the runtime
    # then skips. The converter transposes Conv1D's weights, and the adapter's A and B with them. One tensor is head and
    # embedding where they are tied: there is no place for an adapted head, and one of the embedding aborts the process.
    # src/models/deepseek2.cpp and others multiply with the latent attention's weights and leave their adapters out.
    "llama.cpp": Consumer(
        title="llama.cpp",
        transposed=False,
        needs_base_id=True,
        tied=False,
        word_tables=("embed_tokens", "embed_in"),
        latent=False,
        experts_apart=False,
        one_table=("GemmaForCausalLM", "Gemma2ForCausalLM", "CohereForCausalLM"),
        tried=(
            *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "DeepseekV2ForCausalLM"),
            *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "Qwen3MoeForCausalLM"),
            *("GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM", "Phi3ForCausalLM"),
            *("GraniteForCausalLM", "Olmo2ForCausalLM", "Starcoder2ForCausalLM"),
        ),
    ),
    # tuners/lora: it reads all that it writes, but its sort_keys reorders patterns that overlap.
    "peft": Consumer(title="PEFT", layout_of_peft=True),
}


def consumer_called(name: str) -> Consumer:
    """The row for `name`. Raises ConfigError, with the closest name, where there is no such row."""
    return CONSUMERS[one_of("consumer", name.lower() if isinstance(name, str) else name, CONSUMERS)]
