"""What lies in folders of the wild: mlx-lm's adapters, which load; and files that are not what their names say."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from lightning_lora import (
    AdapterBank,
    LoRAConfig,
    combine_adapters,
    export_adapter,
    inject,
    load_adapter,
    push_adapter,
    save_adapter,
)
from lightning_lora.errors import AdapterFormatError
from tests.hub.models import Linears, assert_same, build, by_peft, edit_tensors, output, shake, state

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
# Two float32 forwards of the same few matmuls, summed in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
RANK, SCALE = 3, 2.5


def mlx_folder(model: nn.Module, folder: Path, *, dora: bool = False, **changes: Any) -> nn.Module:
    """An adapter as mlx-lm writes it, and a copy of the model with W + scale (lora_a lora_b)^T in place of each W."""
    torch.manual_seed(3)
    tensors, adapted = {}, {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "up_proj"))}
    kind = {**build("llama")[0].state_dict()}
    for name, module in adapted.items():
        a, b = torch.randn(module.in_features, RANK), torch.randn(RANK, module.out_features) * 0.1
        W = module.weight.detach()
        new = W + SCALE * (a @ b).T
        tensors |= {f"{name}.lora_a": a, f"{name}.lora_b": b}
        if dora:
            m = W.norm(dim=1) * (1 + 0.1 * torch.rand(len(W)))
            tensors[f"{name}.m"] = m
            new = m[:, None] * new / new.norm(dim=1, keepdim=True)
        kind[f"{name}.weight"] = new
    folder.mkdir(exist_ok=True)
    save_file(tensors, folder / "adapters.safetensors", {"format": "mlx"})
    config = {
        "fine_tune_type": "dora" if dora else "lora",
        "lora_parameters": {"rank": RANK, "scale": SCALE, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]},
        "num_layers": 2,
        "learning_rate": 1e-5,
        "model": "org/base",
    }
    (folder / "adapter_config.json").write_text(json.dumps({**config, **changes}))
    expected, _ = build("llama")
    expected.load_state_dict(kind)
    return expected


@pytest.mark.parametrize("dora", [False, True])
def test_an_adapter_of_mlx_lm_loads_converts_and_serves(dora, tmp_path):
    model, x = build("llama")
    want = output(mlx_folder(model, tmp_path / "mlx", dora=dora), x)
    load_adapter(model, tmp_path / "mlx")
    torch.testing.assert_close(output(model, x), want, **CLOSE)
    export_adapter(tmp_path / "mlx", tmp_path / "peft", consumer="peft")
    base, _ = build("llama")
    torch.testing.assert_close(output(by_peft(base, tmp_path / "peft"), x), want, **CLOSE)
    bank = AdapterBank.from_folders(build("llama")[0], {"mlx": tmp_path / "mlx"})
    with bank.use("mlx"):
        torch.testing.assert_close(output(bank.model, x), want, **CLOSE)
    if not dora:
        combine_adapters([tmp_path / "mlx"], tmp_path / "sum", weights=[1.0])
        torch.testing.assert_close(output(by_peft(base, tmp_path / "sum"), x), want, **CLOSE)
    with pytest.raises(AdapterFormatError, match=r"mlx-lm.*export --for peft"):
        push_adapter(tmp_path / "mlx", "user/name", dry_run=True)


WRONG = {
    "an alpha": ({"lora_parameters": {"rank": 3, "alpha": 16, "scale": 10.0}}, "alpha beside its scale.*scale alone"),
    "no scale": ({"lora_parameters": {"rank": 3}}, "without a rank and a scale"),
    "no rank": ({"lora_parameters": {"scale": 3.0}}, "without a rank and a scale"),
    "a scale that is none": ({"lora_parameters": {"rank": 3, "scale": math.nan}}, "without a rank and a scale"),
    "another rank": ({"lora_parameters": {"rank": 4, "scale": 1.0}}, "shape"),
    "a whole model": ({"fine_tune_type": "full"}, "fine_tune_type='full'"),
    "dora without sizes": ({"fine_tune_type": "dora"}, "missing.*magnitude"),
}


@pytest.mark.parametrize("case", WRONG)
def test_an_adapter_of_mlx_lm_that_cannot_be_read_says_why(case, tmp_path):
    changes, match = WRONG[case]
    model, _ = build("llama")
    mlx_folder(model, tmp_path, **changes)
    before = state(model)
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(model, tmp_path)
    assert_same(before, state(model))


STRANGE = {
    "an embedding": ({"model.embed_tokens.lora_a": (32, 3)}, "embed_tokens is an embedding"),
    "experts": ({"model.layers.0.mlp.switch.lora_a": (2, 3, 4)}, r"no linear layer's: .*switch\.lora_a"),
    "another tensor": ({"model.layers.0.bias": (4,)}, r"no linear layer's: .*bias"),
    "another layer": ({"model.layers.9.x.lora_a": (16, 3), "model.layers.9.x.lora_b": (3, 16)}, r"layers\.9"),
}


@pytest.mark.parametrize("case", STRANGE)
def test_what_else_an_adapter_of_mlx_lm_holds_is_named(case, tmp_path):
    more, match = STRANGE[case]
    model, _ = build("llama")
    mlx_folder(model, tmp_path)
    from safetensors.torch import load_file

    tensors = load_file(tmp_path / "adapters.safetensors") | {key: torch.zeros(shape) for key, shape in more.items()}
    save_file(tensors, tmp_path / "adapters.safetensors")
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(model, tmp_path)


CONTENTS = {
    "a pointer of Git LFS": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        r"pointer of Git LFS .*git lfs pull.*hf download",
    ),
    "GGUF": (b"GGUF\x03\x00\x00\x00", "GGUF file, llama.cpp's own format"),
    "a pickle": (b"PK\x03\x04archive/data.pkl", "pickle as torch.save writes it"),
    "an old pickle": (b"\x80\x02\x8a\nl\xfc\x9c", "is a pickle"),
    "a page": (b"<!doctype html><html>404</html>", "page of HTML"),
}


@pytest.fixture
def folder(tmp_path):
    model = Linears()
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    shake(model)
    return save_adapter(model, tmp_path / "adapter")


READERS = {
    "load_adapter": lambda folder: load_adapter(Linears(), folder),
    "a bank": lambda folder: AdapterBank(Linears()).add("it", folder),
    "export": lambda folder: export_adapter(folder, folder.parent / "out", consumer="vllm"),
    "push": lambda folder: push_adapter(folder, "user/name", dry_run=True),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("case", CONTENTS)
def test_a_file_that_is_not_what_its_name_says_is_named(case, name, reader, folder):
    content, match = CONTENTS[case]
    (folder / name).write_bytes(content)
    with pytest.raises(AdapterFormatError, match=match) as raised:
        READERS[reader](folder)
    assert name in str(raised.value)


def test_a_file_of_llama_cpp_is_named_in_a_folder_and_out_of_one(tmp_path):
    (tmp_path / "adapter-f16.gguf").write_bytes(b"GGUF\x03\x00\x00\x00")
    for place in (tmp_path, tmp_path / "adapter-f16.gguf"):
        with pytest.raises(AdapterFormatError, match=r"llama\.cpp.*cannot be turned back"):
            load_adapter(Linears(), place)


def test_a_header_whose_length_begins_like_a_pickle_is_not_taken_for_one(tmp_path):
    path = tmp_path / "style.safetensors"
    for padding in range(256):
        save_file({"x.hada_w1_a": torch.zeros(1)}, path, {"pad": "p" * padding})
        if path.read_bytes().startswith(b"\x80"):
            break
    assert path.read_bytes().startswith(b"\x80")
    with pytest.raises(AdapterFormatError, match="LyCORIS"):
        load_adapter(Linears(), path)


def renamed(change: Any) -> Any:
    return lambda tensors: [tensors.update({change(key): tensors.pop(key)}) for key in list(tensors)]


P = "base_model.model."
WRAPPERS = {
    "DDP's": lambda k: k.replace(P, P + "module."),
    "compile's": lambda k: k.replace(P, P + "_orig_mod."),
    "FSDP's": lambda k: k.replace(P, P + "_fsdp_wrapped_module."),
    "a checkpoint wrapper's inside": lambda k: k.replace(".fc.", "._checkpoint_wrapped_module.fc."),
    "two at once": lambda k: k.replace(P, P + "module._orig_mod."),
}
PREFIXES = {
    "a model around it": (lambda k: k.replace(P, P + "model."), r"have 'model\.' before the names of this model"),
    "a PeftModel around it": (lambda k: P + k, r"have 'base_model\.model\.' before the names"),
    "none": (lambda k: k.removeprefix(P), r"lack PEFT's prefix 'base_model\.model\.'"),
}


@pytest.mark.parametrize("case", WRAPPERS)
def test_names_of_wrappers_in_keys_are_passed_over(case, folder):
    plain, model = Linears(), Linears()
    model.load_state_dict(plain.state_dict())
    load_adapter(plain, folder, check_base=False)
    edit_tensors(folder, renamed(WRAPPERS[case]))
    load_adapter(model, folder, check_base=False)
    assert_same(state(plain), state(model))


@pytest.mark.parametrize("case", PREFIXES)
def test_a_prefix_that_does_not_belong_is_named(case, folder):
    change, match = PREFIXES[case]
    edit_tensors(folder, renamed(change))
    model = Linears()
    before = state(model)
    with pytest.raises(AdapterFormatError, match=match):
        load_adapter(model, folder)
    assert_same(before, state(model))


def test_a_prefix_that_is_missing_is_named(folder):
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Sequential(Linears())
            self.fc = nn.Linear(2, 2)

    with pytest.raises(AdapterFormatError, match=r"missing|lack 'inner"):
        load_adapter(Around(), folder)


def test_keys_that_differ_in_another_way_get_no_such_advice(folder):
    edit_tensors(folder, renamed(lambda key: key.replace(".fc.", ".other.")))
    with pytest.raises(AdapterFormatError, match="unexpected") as raised:
        load_adapter(Linears(), folder)
    assert "They" not in str(raised.value)
