"""generate() under a routing: each row continues as it does with its adapter alone, greedily, by beams and sampled."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

from lightning_lora import AdapterBank
from lightning_lora.errors import AdapterStateError
from tests.hub.models import build, by_peft, peft_folder

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

GREEDY = {"do_sample": False}
WAYS = {
    "greedy": GREEDY,
    "without a cache": {**GREEDY, "use_cache": False},
    "beams": {**GREEDY, "num_beams": 3},
    "several of each": {**GREEDY, "num_beams": 4, "num_return_sequences": 2},
    "a static cache": {**GREEDY, "cache_implementation": "static"},
}
NAMES = ["a1", None, "a0", "a2", "a1"]


def t5() -> nn.Module:
    sizes = {"vocab_size": 32, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


def adapters_on(model: nn.Module, place: Path, targets: list[str]) -> dict[str, nn.Module]:
    """Folders that PEFT wrote, strong enough to change what is said; returns the models alone."""
    alone = {}
    for i in range(3):
        torch.manual_seed(i)
        fields = {"target_modules": targets, "r": 2 + i, "lora_alpha": 32}
        alone[f"a{i}"] = peft_folder(model, place / f"a{i}", **fields)
    return alone


def continued(model: nn.Module, ids: torch.Tensor, mask: torch.Tensor, **way: object) -> torch.Tensor:
    generated = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, min_new_tokens=8, **way)
    return generated[:, -8:]


def check(model: nn.Module, alone: dict[str, nn.Module], bank: AdapterBank, way: dict[str, object]) -> None:
    torch.manual_seed(0)
    ids = torch.randint(3, 32, (len(NAMES), 6))
    mask = torch.ones_like(ids)
    mask[1, :2] = mask[3, :4] = 0  # padded on the left, as prompts of unequal length are
    ids[mask == 0] = 1
    way = {"pad_token_id": 1, "eos_token_id": 2, **way}
    exact = [
        continued(alone[name] if name else model, row[None], keep[None], **way)
        for name, row, keep in zip(NAMES, ids, mask)
    ]
    with bank.use(NAMES):
        found = continued(model, ids, mask, **way)
    assert torch.equal(found, torch.cat(exact))
    assert len({tuple(row.flatten().tolist()) for row in exact}) == len(NAMES)


@pytest.mark.parametrize("way", WAYS)
def test_a_decoder_continues_each_row_with_its_own_adapter(tmp_path, way):
    model, _ = build("llama")
    alone = adapters_on(model, tmp_path, ["q_proj", "v_proj", "down_proj", "lm_head"])
    check(model, alone, AdapterBank.from_folders(model, tmp_path), WAYS[way])


@pytest.mark.parametrize("way", ["greedy", "beams"])
def test_an_encoder_and_its_decoder_do_too(tmp_path, way):
    torch.manual_seed(1)
    model = t5()
    alone = adapters_on(model, tmp_path, ["q", "v", "wi", "wo"])
    check(model, alone, AdapterBank.from_folders(model, tmp_path), WAYS[way])


def test_beams_are_known_inside_of_generate_alone_and_only_for_its_prompts(tmp_path):
    model, _ = build("llama")
    adapters_on(model, tmp_path, ["q_proj", "down_proj"])
    bank = AdapterBank.from_folders(model, tmp_path)
    ids = torch.randint(3, 32, (2, 6))
    beams = {"max_new_tokens": 3, "pad_token_id": 1, "do_sample": False, "num_beams": 3}
    with bank.use(["a0", "a1"]):
        exact = model.generate(ids, **beams)
        with pytest.raises(AdapterStateError, match=r"'model\.layers\.0\.self_attn\.q_proj' got .*\(6, 6, 16\)"):
            model(ids.repeat_interleave(3, 0))
        assert torch.equal(model.generate(ids, **beams), exact)
    with bank.use(["a0", "a1"]), pytest.raises(AdapterStateError, match="given 2 rows"):
        model.generate(torch.cat([ids, ids]), **{**beams, "num_beams": 1})
    with bank.use(["a0", "a1"]), pytest.raises(AdapterStateError, match="given 2 rows"):
        model.generate(torch.cat([ids, ids]), **{**beams, "num_beams": 2})
    with bank.use(["a0", "a1"] * 3), pytest.raises(AdapterStateError, match=r"2 prompts, each .* 3 beams"):
        model.generate(ids, **beams)
    with bank.use(["a0", "a1"], layout="repeated"):
        assert torch.equal(model.generate(ids, **beams), exact)


def test_three_hundred_adapters_as_the_readme_runs_them(tmp_path, monkeypatch, capsys):
    """The README's lines, to the letter, with fewer adapters."""
    readme = Path(__file__).parents[2].joinpath("README.md").read_text(encoding="utf-8")
    (block,) = (b for b in re.findall(r"```python\n(.*?)```", readme, re.DOTALL) if "AdapterBank" in b)
    assert len(block.strip().splitlines()) <= 10
    model, _ = build("llama")
    for i, name in enumerate(("legal", "code", *map(str, range(10)))):
        torch.manual_seed(i)
        fields = {"target_modules": [["q_proj"], ["k_proj", "up_proj"]][i % 2], "r": 2 + i % 3, "lora_alpha": 32}
        peft_folder(model, tmp_path / "adapters" / name, **fields)
    words = {word: i for i, word in enumerate(["[UNK]", "[PAD]", "</s>", *(f"w{i}" for i in range(29))])}
    core = Tokenizer(models.WordLevel(words, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="[UNK]",
        pad_token="[PAD]",
        eos_token="</s>",
        model_input_names=["input_ids", "attention_mask"],
    )
    monkeypatch.chdir(tmp_path)
    model.save_pretrained("base")
    tokenizer.save_pretrained("base")

    ran: dict[str, object] = {}
    exec(compile(block, "README.md", "exec"), ran)

    said = capsys.readouterr().out.strip().splitlines()
    bank, batch = ran["bank"], ran["batch"]
    assert len(bank) == 12
    for row, name in enumerate(("legal", "code", None)):
        one = AutoModelForCausalLM.from_pretrained("base")
        one = by_peft(one, tmp_path / "adapters" / name) if name else one
        alone = one.generate(**{key: value[row : row + 1] for key, value in batch.items()}, max_new_tokens=40)
        assert tokenizer.batch_decode(alone)[0].split()[-40:] == said[row].split()[-40:]
