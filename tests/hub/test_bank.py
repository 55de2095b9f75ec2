"""Folders that PEFT wrote, in one bank: every row gets what PEFT itself gives it with that adapter alone."""

from __future__ import annotations

import gc
import math
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from safetensors.torch import load_file
from torch import nn

from lightning_lora import AdapterBank, LoRAConfig, adapter_state_dict, inject, save_adapter
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BankError, BaseMismatchError, ConfigError
from tests.hub.models import Linears, build, by_peft, edit_config, edit_tensors, output, peft_folder, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:Adapter 'default'. 1 LoRA tensor:peft.utils.warning.PeftWarning"),
    pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side is legal but wasteful"),
]

# float32: the two compute the same products in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

QV = ["q_proj", "v_proj"]
KINDS: dict[str, list[dict[str, Any]]] = {
    "linears": [
        {"target_modules": ["fc", "0"], "r": 2},
        {"target_modules": ["head", "2"], "r": 3, "lora_alpha": 7, "use_rslora": True},
        {"target_modules": ["fc", "head"], "r": 2, "use_dora": True},
        {"target_modules": ["fc"], "r": 2, "lora_bias": True},
    ],
    "convolutions": [
        {"target_modules": ["one", "two"], "r": 2},
        {"target_modules": ["one", "three", "head"], "r": 4, "use_rslora": True},
        {"target_modules": ["two", "three"], "r": 2, "use_dora": True},
    ],
    "words": [
        {"target_modules": ["embed"], "r": 2},
        {"target_modules": ["embed", "fc"], "r": 3, "lora_alpha": 4},
        {"target_modules": ["embed"], "r": 2, "use_dora": True},
    ],
    "shared": [{"target_modules": ["fc"], "r": 2}, {"target_modules": ["fc", "head"], "r": 1}],
    "gpt2": [
        {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True, "use_rslora": True},
    ],
    "llama": [
        {"target_modules": QV, "r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": r".*\.(q_proj|up_proj)", "r": 3, "use_rslora": True},
        {"target_modules": "all-linear", "r": 2, "use_dora": True},
        {"target_modules": QV, "r": 2, "layers_to_transform": [1]},
        {"target_modules": ["lm_head", "embed_tokens"], "r": 2},
    ],
}


def folders_of(kind: str, place: Path) -> tuple[nn.Module, torch.Tensor, dict[str, Path], dict[str, nn.Module]]:
    """A model, an input, folders that PEFT wrote for it, and the adapted copies that it wrote them from."""
    model, x = build(kind)
    torch.manual_seed(11)
    folders = {f"a{i}": place / f"a{i}" for i in range(len(KINDS[kind]))}
    alone = {name: peft_folder(model, folders[name], **fields) for name, fields in zip(folders, KINDS[kind])}
    return model, x, folders, alone


def ours(folder: Path, seed: int = 0, **fields: Any) -> nn.Module:
    """An adapter of ours on Linears, saved into `folder`."""
    model, _ = build("linears")
    torch.manual_seed(seed)
    inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["fc"], **fields}))
    shake(model)
    save_adapter(model, folder)
    return model


@pytest.mark.parametrize("kind", KINDS)
def test_each_row_of_a_batch_gets_what_peft_gives_it(tmp_path, kind):
    model, x, folders, alone = folders_of(kind, tmp_path)
    plain = output(model, x)
    bank = AdapterBank.from_folders(model, tmp_path)
    assert sorted(bank.names) == sorted(folders)
    for name, peft_s in alone.items():
        with bank.use(name):
            torch.testing.assert_close(output(model, x), output(peft_s, x), **CLOSE)
    names = [[*alone, None][i % (len(alone) + 1)] for i in range(len(x))][::-1]
    exact = torch.stack([(output(alone[n], x) if n else plain)[i] for i, n in enumerate(names)])
    with bank.use(names):
        torch.testing.assert_close(output(model, x), exact, **CLOSE)
    assert torch.equal(output(model, x), plain)
    bank.close()
    assert torch.equal(output(model, x), plain)


def test_an_adapter_comes_from_a_folder_the_hub_a_state_dict_or_a_model(tmp_path, hub):
    trained = ours(tmp_path / "a")
    files = {path.name: path.read_bytes() for path in (tmp_path / "a").iterdir()}
    repository = hub.create_repo("user/adapter", files=files)
    model, x = build("linears")
    config = LoRAConfig(rank=2, target_modules=["fc"])
    bank = AdapterBank(model, 8, target_modules=["fc"])
    bank.add("folder", tmp_path / "a")
    bank.add("hub", "user/adapter")
    bank.add("revision", "user/adapter", revision=repository.commits()[0].oid)
    bank.add("state dict", adapter_state_dict(trained), config=config)
    bank.add("PEFT's state dict", load_file(tmp_path / "a" / "adapter_model.safetensors"), config=config)
    bank.add("model", trained)
    for name in bank.names:
        with bank.use(name):
            torch.testing.assert_close(output(model, x), output(trained, x), **CLOSE)


def test_names_inside_of_a_lightning_module_are_found(tmp_path):
    class Lit(LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = build("linears")[0]

    trained = ours(tmp_path / "a")
    lit = Lit().eval()
    bank = AdapterBank.from_folders(lit, tmp_path)
    bank.add("model", trained)
    _, x = build("linears")
    for name in bank.names:
        with bank.use(name):
            torch.testing.assert_close(output(lit.model, x), output(trained, x), **CLOSE)


def test_a_start_that_is_left_out_is_served_as_further_ranks(tmp_path):
    model, x = build("linears")
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    shake(model)
    for name in ("lora_A", "lora_B"):  # as an initialiser leaves it whose B A is not zero
        model.fc.register_buffer(f"{name}0", getattr(model.fc, name).detach().clone())
    model.fc.lora_names += ("lora_A0", "lora_B0")
    shake(model)
    base, _ = build("linears")
    bank = AdapterBank(base, 2, max_rank=4, target_modules=["fc"])
    bank.add("started", model)
    with bank.use("started"):
        torch.testing.assert_close(output(base, x), output(model.eval(), x), **CLOSE)


@pytest.mark.parametrize("batch_first", [True, False])
def test_torchs_own_transformer_is_served_from_a_folder_a_state_dict_and_a_model(tmp_path, batch_first):
    def network():
        torch.manual_seed(0)
        layer = {"dim_feedforward": 12, "dropout": 0.0, "batch_first": batch_first}
        encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, **layer), 2, enable_nested_tensor=False)
        decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(8, 2, **layer), 1)
        return nn.ModuleDict({"encoder": encoder, "decoder": decoder}).eval()

    def computed(model):
        x = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            h = model["encoder"](x)
            return model["decoder"](h, h)

    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        for i, targets in enumerate((["encoder.layers.0.linear1"], ["linear1", "linear2"])):
            config = LoRAConfig(rank=2, target_modules=targets)
            trained = network()
            inject(trained, config)
            shake(trained)
            save_adapter(trained, tmp_path / str(i))
            model = network()
            plain = computed(model)
            bank = AdapterBank(model, 3, max_rank=4, target_modules=["linear1", "linear2"])
            bank.add("folder", tmp_path / str(i))
            bank.add("model", trained)
            bank.add("state dict", adapter_state_dict(trained), config=config)
            for name in bank.names:
                with bank.use(name):
                    torch.testing.assert_close(computed(model), computed(trained), **CLOSE)
                if batch_first:
                    with bank.use([name, None]):
                        found = computed(model)
                    torch.testing.assert_close(found, torch.stack([computed(trained)[0], plain[1]]), **CLOSE)
                else:
                    with bank.use([name, None]), pytest.raises(AdapterStateError, match="sequence first"):
                        computed(model)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)


def test_what_a_bank_does_not_serve_is_refused_by_name(tmp_path):
    model, _ = build("linears")
    bank = AdapterBank(model, 2, max_rank=4)
    for i, (fields, what) in enumerate(
        (
            ({"bias": "all"}, r"bias.*A bank serves low-rank updates"),
            ({"bias": "lora_only"}, r"fc\.bias"),
            ({"rank": 8}, r"rank 8, and the bank has max_rank=4"),
            ({"target_modules": ["head"]}, r"adapts head, which this bank does not serve .* name 'head' too"),
        )
    ):
        trained = ours(tmp_path / str(i), **fields)
        for source in (tmp_path / str(i), trained):
            with pytest.raises(AdapterFormatError, match=what):
                bank.add("x", source)
    assert not len(bank)


@pytest.mark.parametrize(
    ("kind", "fields", "what"),
    [
        ("words", {"target_modules": ["fc"], "trainable_token_indices": {"embed": [1, 2]}}, "embed"),
        ("linears", {"target_modules": ["head"], "target_parameters": ["fc.weight"]}, "fc"),
    ],
)
def test_tokens_and_parameters_beside_a_weight_are_refused_too(tmp_path, kind, fields, what):
    trained, _ = build(kind)
    inject(trained, LoRAConfig(rank=2, **fields))
    shake(trained)
    save_adapter(trained, tmp_path / "a")
    model, _ = build(kind)
    bank = AdapterBank(model, 2, max_rank=4, target_modules=["fc", "head"] if kind == "linears" else ["fc"])
    for source in (tmp_path / "a", trained):
        with pytest.raises(AdapterFormatError, match=f"{what}.*A bank serves low-rank updates of its layers"):
            bank.add("x", source)
    with pytest.raises(AdapterFormatError, match=what):
        AdapterBank.from_folders(build(kind)[0], tmp_path)
    assert not len(bank)


@pytest.mark.filterwarnings("ignore:PEFT cannot load this adapter")
def test_adapters_without_a_low_rank_update_make_no_bank(tmp_path):
    trained, _ = build("words")
    inject(trained, LoRAConfig(target_modules=None, trainable_token_indices={"embed": [1, 2]}))
    shake(trained)
    save_adapter(trained, tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="A bank serves low-rank updates"):
        AdapterBank.from_folders(build("words")[0], tmp_path)


def test_a_file_that_does_not_fit_is_refused(tmp_path):
    ours(tmp_path / "a")
    model, _ = build("linears")
    bank = AdapterBank(model, 2, max_rank=4)
    torch.manual_seed(5)
    other = Linears()
    inject(other, LoRAConfig(rank=2, target_modules=["fc"]))
    save_adapter(other, tmp_path / "b")
    with pytest.raises(BaseMismatchError, match="trained on another base"):
        bank.add("b", tmp_path / "b")
    bank.add("b", tmp_path / "b", check_base=False)
    with pytest.raises(BankError, match="already"):
        bank.add("b", tmp_path / "a")
    bank.add("b", tmp_path / "a", replace=True)
    with pytest.raises(AdapterFormatError, match="no folder"):
        bank.add("c", tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="does not say its scale"):
        bank.add("c", {"fc.lora_A": torch.ones(2, 8)})
    with pytest.raises(AdapterFormatError, match=r"missing: .*fc\.lora_B"):
        bank.add("c", {"fc.lora_A": torch.ones(2, 8)}, config=LoRAConfig(rank=2, target_modules=["fc"]))
    edit_config(tmp_path / "a", target_modules=["nothing"])
    with pytest.raises(AdapterFormatError, match=r"does not fit Linears.*'nothing'"):
        bank.add("c", tmp_path / "a")
    ours(tmp_path / "a")
    edit_tensors(tmp_path / "a", lambda t: t["base_model.model.fc.lora_A.weight"].fill_(math.nan))
    with pytest.raises(AdapterFormatError, match="not finite"):
        bank.add("c", tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="an adapter itself"):
        AdapterBank.from_folders(build("linears")[0], tmp_path / "a")
    with pytest.raises(AdapterFormatError, match="There are no adapters in"):
        AdapterBank.from_folders(build("linears")[0], {})
    assert bank.names == ["b"]


def test_a_bank_from_folders_that_cannot_be_leaves_the_model_as_it_was(tmp_path):
    ours(tmp_path / "a")
    ours(tmp_path / "b", seed=1)
    edit_tensors(tmp_path / "b", lambda t: t["base_model.model.fc.lora_A.weight"].fill_(math.inf))
    model, _ = build("linears")
    with pytest.raises(AdapterFormatError, match="'b' holds values that are not finite"):
        AdapterBank.from_folders(model, tmp_path)
    assert type(model.fc) is nn.Linear


def test_weights_of_the_base_that_peft_saved_as_well_must_be_the_models(tmp_path):
    model, x = build("llama")
    peft_s = peft_folder(model, tmp_path / "a", target_modules=["embed_tokens"], save={"save_embedding_layers": True})
    bank = AdapterBank.from_folders(model, tmp_path)
    with bank.use("a"):
        torch.testing.assert_close(output(model, x), output(peft_s, x), **CLOSE)
    edit_tensors(tmp_path / "a", lambda t: next(v for k, v in t.items() if "base_layer" in k).add_(1))
    with pytest.raises(AdapterFormatError, match="a weight of the base"):
        bank.add("b", tmp_path / "a")


def test_adapters_beyond_memory_lie_on_disk_and_come_back(tmp_path):
    alone = {f"a{i}": ours(tmp_path / "in" / f"a{i}", seed=i) for i in range(9)}
    model, x = build("linears")
    bank = AdapterBank.from_folders(model, tmp_path / "in", 2, host_capacity=3, disk=tmp_path / "out")
    (folder,) = (tmp_path / "out").iterdir()
    assert len(list(folder.iterdir())) == 4, "two are resident, three are in memory"
    for i in (0, 8, 3, 3, 5, 1, 7, 2, 6, 4, 0):
        bank.prefetch(f"a{(i + 1) % 9}")
        with bank.use(f"a{i}"):
            torch.testing.assert_close(output(model, x), output(alone[f"a{i}"], x), **CLOSE)
    bank.remove("a3")
    assert len(list(folder.iterdir())) <= 8
    bank.prefetch("a1").result()
    bank.close()
    del bank
    gc.collect()
    assert not list((tmp_path / "out").iterdir()), "the files go with the bank"


def test_a_disk_that_fails_loses_no_adapter(tmp_path):
    alone = {f"a{i}": ours(tmp_path / "in" / f"a{i}", seed=i) for i in range(3)}
    model, x = build("linears")
    bank = AdapterBank(model, 2, max_rank=2, host_capacity=0, disk=tmp_path / "out", target_modules=["fc"])
    bank.add("a0", tmp_path / "in" / "a0")
    bank.add("a1", tmp_path / "in" / "a1")
    (folder,) = (tmp_path / "out").iterdir()
    shutil.rmtree(folder)
    folder.write_text("in its place")
    with pytest.raises(BankError, match="'a0' cannot be moved out"):
        bank.add("a2", tmp_path / "in" / "a2")
    assert bank.resident == bank.names == ["a0", "a1"]
    folder.unlink()
    bank.add("a2", tmp_path / "in" / "a2")
    (file,) = folder.iterdir()
    content = file.read_bytes()
    file.write_bytes(content[:-8])
    with pytest.raises(BankError, match="'a0' cannot be read back"), bank.use("a0"):
        pass
    file.write_bytes(content)
    for name in alone:
        with bank.use(name):
            torch.testing.assert_close(output(model, x), output(alone[name], x), **CLOSE)
    with pytest.raises(ConfigError, match="cannot be written to"):
        AdapterBank(build("linears")[0], disk=file)


def test_a_disk_that_was_cleaned_up_takes_what_is_added_again(tmp_path):
    alone = {f"a{i}": ours(tmp_path / "in" / f"a{i}", seed=i) for i in range(4)}
    model, x = build("linears")
    bank = AdapterBank.from_folders(model, tmp_path / "in", 2, host_capacity=0, disk=tmp_path / "out")
    shutil.rmtree(tmp_path / "out")
    with pytest.raises(BankError, match=r"'a0' cannot be read back.*Add it again, with replace=True"), bank.use("a0"):
        pass
    bank.remove("a1")
    for name in ("a0", "a1"):
        bank.add(name, tmp_path / "in" / name, replace=True)
    for _ in range(2):
        for name in alone:
            with bank.use(name):
                torch.testing.assert_close(output(model, x), output(alone[name], x), **CLOSE)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are not forked here")
def test_processes_that_are_forked_do_not_see_each_others_adapters(tmp_path):
    alone = {f"a{i}": ours(tmp_path / "in" / f"a{i}", seed=i) for i in range(6)}
    model, x = build("linears")
    bank = AdapterBank.from_folders(model, tmp_path / "in", 2, host_capacity=1, disk=tmp_path / "out")
    bank.prefetch("a5").result()  # there is a thread, which a fork does not have
    (folder,) = (tmp_path / "out").iterdir()
    files = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}

    def check(bank, names):
        for name, right in names.items():
            bank.prefetch(name).result(timeout=20)
            with bank.use(name):
                torch.testing.assert_close(output(model, x), output(alone[right], x), **CLOSE)

    def child(bank):
        bank.add("a0", tmp_path / "in" / "a5", replace=True)
        bank.add("a4", tmp_path / "in" / "a1", replace=True)
        bank.remove("a1")
        bank.add("a1", tmp_path / "in" / "a2")
        check(bank, {"a0": "a5", "a4": "a1", "a1": "a2", "a2": "a2", "a3": "a3"})
        bank.remove("a2")
        bank.close()
        raise SystemExit(0)  # leaves in the way of a worker, with all that is to be done at exit

    process = multiprocessing.get_context("fork").Process(target=child, args=(bank,))
    process.start()
    bank.add("a5", tmp_path / "in" / "a0", replace=True)
    process.join(60)
    assert process.exitcode == 0
    assert all(path.read_bytes() == content for path, content in files.items() if path.exists())
    check(bank, {**{name: name for name in alone}, "a5": "a0"})
    del bank, process
    gc.collect()
    assert not list((tmp_path / "out").iterdir()), "the files go with the bank"


def test_peft_loads_what_the_bank_serves(tmp_path):
    ours(tmp_path / "a")
    model, x = build("linears")
    bank = AdapterBank.from_folders(model, tmp_path)
    with bank.use("a"):
        torch.testing.assert_close(output(model, x), output(by_peft(build("linears")[0], tmp_path / "a"), x), **CLOSE)


def test_a_head_that_was_trained_whole_is_served_row_by_row_as_peft_does(tmp_path):
    model, x = build("linears")
    fields = {"one": {"modules_to_save": ["head"]}, "none": {}, "other": {"modules_to_save": ["head"]}}
    alone = {n: peft_folder(model, tmp_path / n, target_modules=["fc"], **given) for n, given in fields.items()}
    exact = torch.stack([output(alone[name], x)[i] for i, name in enumerate(alone)])
    bank = AdapterBank.from_folders(model, tmp_path)
    for name, peft_s in alone.items():
        with bank.use(name):
            torch.testing.assert_close(output(model, x), output(peft_s, x), **CLOSE)
    with bank.use(list(alone)):
        torch.testing.assert_close(output(model, x[:3]), exact, **CLOSE)
    trained = ours(tmp_path / "ours", seed=3, modules_to_save=["head"])
    for source in (tmp_path / "ours", trained):  # the folder knows its base, of which the head is no part
        bank.add("ours", source, replace=True)
        with bank.use("ours"):
            torch.testing.assert_close(output(model, x), output(trained, x), **CLOSE)


def test_a_head_for_which_a_bank_has_no_room_is_refused_with_the_way_out(tmp_path):
    trained = ours(tmp_path / "it", modules_to_save=["head"])
    model, x = build("linears")
    plain = output(model, x)
    for settings, said in (
        ({"target_modules": ["fc"]}, r"adapts head, which this bank does not serve .* name 'head' too"),
        (
            {"target_modules": ["fc", "head"], "max_rank": 2},
            r"head, which was trained whole.*make the bank with max_rank=3",
        ),
    ):
        bank = AdapterBank(model, 2, **settings)
        for source in (tmp_path / "it", trained):
            with pytest.raises(AdapterFormatError, match=said):
                bank.add("it", source)
        assert len(bank) == 0
        bank.close()
    with pytest.raises(AdapterFormatError, match="make the bank with max_rank=3"):
        AdapterBank.from_folders(model, {"it": tmp_path / "it"}, max_rank=2)
    assert torch.equal(output(model, x), plain)
