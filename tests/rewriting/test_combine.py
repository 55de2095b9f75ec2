"""A combined folder, loaded by PEFT itself, computes W x + sum w_i dW_i x; what cannot be combined is refused."""

from __future__ import annotations

import copy
import json
import math
import os
from pathlib import Path

import peft.utils.merge_utils as theirs
import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lightning_lora import LoRAConfig, combine_adapters, export_adapter, inject, load_adapter, save_adapter
from lightning_lora.errors import AdapterFormatError, BaseMismatchError, ConfigError
from lightning_lora.format.inspection import check_adapter
from tests.engine.test_combine import ties_by_entry
from tests.hub.models import build, by_peft, edit_config, edit_tensors, output, peft_folder, shake

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
    pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer with groups > 1"),
    pytest.mark.filterwarnings("ignore:A rank above a layer's smaller side is legal but wasteful"),
]

# float32: the two compute the same products in another order.
CLOSE = {"rtol": 1e-4, "atol": 2e-5}

# Two adapters that differ in all that may differ.
QV = ["q_proj", "v_proj"]
PAIRS = {
    "linears": ({"target_modules": ["fc", "0"], "r": 2}, {"target_modules": ["fc", "2"], "r": 3, "lora_alpha": 7}),
    "convolutions": (
        {"target_modules": ["one", "two"], "r": 2},
        {"target_modules": ["one", "three", "head"], "r": 4, "use_rslora": True},
    ),
    "words": ({"target_modules": ["embed"], "r": 2}, {"target_modules": ["embed", "fc"], "r": 3, "lora_alpha": 4}),
    "gpt2": (
        {"target_modules": ["c_attn"], "r": 2, "fan_in_fan_out": True},
        {"target_modules": ["c_attn", "c_fc"], "r": 3, "fan_in_fan_out": True, "use_rslora": True},
    ),
    "llama": (
        {"target_modules": QV, "r": 4, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": r".*\.(q_proj|up_proj)", "r": 3, "use_rslora": True},
    ),
    "layers": (
        {"target_modules": QV, "r": 2, "layers_to_transform": [1]},
        {"target_modules": QV, "r": 2},
    ),
}


def pair(kind, tmp_path, pairs=PAIRS):
    """A model, an input, two folders that PEFT wrote, and the adapted copies of the model that it wrote them from."""
    model, x = build({"layers": "llama"}.get(kind, kind))
    torch.manual_seed(11)
    folders = [tmp_path / name for name in ("a", "b")]
    return model, x, folders, [peft_folder(model, f, **fields) for f, fields in zip(folders, pairs[kind])]


def config_of(folder):
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder):
    return load_file(folder / "adapter_model.safetensors")


def module_inputs(model, x):
    """What each module with a weight is given when the model sees x."""
    seen = {}
    names = {module: name for name, module in model.named_modules() if "weight" in module._parameters}
    hooks = [module.register_forward_pre_hook(lambda m, args: seen.update({names[m]: args[0]})) for module in names]
    output(model, x)
    for hook in hooks:
        hook.remove()
    return seen


def updates(adapted, inputs, base):
    """What the adapted copy changes in the output of each module, given the same inputs."""
    modules = dict(adapted.base_model.model.named_modules())
    with torch.no_grad():
        return {n: (modules[n](x) - base.get_submodule(n)(x)).double() for n, x in inputs.items()}


@pytest.mark.parametrize("weights", [(0.7, 0.3), (1, -2), (-0.5, 1.25)])
@pytest.mark.parametrize("kind", PAIRS)
def test_in_peft_each_module_s_change_is_the_weighted_sum_of_the_adapters(tmp_path, kind, weights):
    model, x, folders, adapted = pair(kind, tmp_path)
    report = combine_adapters(folders, tmp_path / "out", weights=weights)
    check_adapter(tmp_path / "out")
    inputs = module_inputs(model, x)
    a, b = (updates(each, inputs, model) for each in adapted)
    loaded = by_peft(model, tmp_path / "out")
    combined = updates(loaded, inputs, model)
    for name in inputs:
        torch.testing.assert_close(combined[name], weights[0] * a[name] + weights[1] * b[name], **CLOSE)
    changed = {name for name in inputs if a[name].any() or b[name].any()}
    assert set(report.modules) == changed
    assert report.error < 1e-6

    ours = copy.deepcopy(model)
    load_adapter(ours, tmp_path / "out")
    torch.testing.assert_close(output(ours.eval(), x), output(loaded, x), **CLOSE)


def delta_weights(adapted):
    return {
        name: module.get_delta_weight("default").detach().double()
        for name, module in adapted.base_model.model.named_modules()
        if hasattr(module, "get_delta_weight")
    }


def with_weights(model, changes):
    """A copy of `model` in float64 with `changes` added to its weights."""
    model = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight += change
    return model


def cut(matrix, rank):
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return U[:, :rank] * S[:rank] @ Vh[:rank]


ALIKE = {
    "llama": (
        {"target_modules": QV, "r": 2, "lora_alpha": 3},
        {"target_modules": QV, "r": 4, "lora_alpha": 8, "use_rslora": True},
    )
}
METHODS = {
    "sum": ({}, lambda a, b: 0.75 * a - 0.5 * b),
    "svd": ({"rank": 3}, lambda a, b: cut(0.75 * a - 0.5 * b, 3)),
    "ties": ({"rank": 3, "density": 0.5}, lambda a, b: cut(ties_by_entry([0.75 * a, -0.5 * b], 0.5), 3)),
}


@pytest.mark.parametrize("method", METHODS)
def test_the_outputs_in_peft_are_those_of_the_closed_form(tmp_path, method):
    settings, closed_form = METHODS[method]
    model, x, folders, adapted = pair("llama", tmp_path, ALIKE)
    report = combine_adapters(folders, tmp_path / "out", weights=[0.75, -0.5], method=method, **settings)
    a, b = map(delta_weights, adapted)
    expected = {name: closed_form(a[name], b[name]) for name in a}
    loaded = by_peft(model, tmp_path / "out")
    torch.testing.assert_close(output(loaded, x).double(), output(with_weights(model, expected), x), **CLOSE)
    torch.testing.assert_close(delta_weights(loaded), expected, **CLOSE)
    # The error in the report is that of what was written.
    whole = {n: METHODS["sum"][1](a[n], b[n]) if method != "ties" else None for n in a}
    if method == "ties":
        whole = {n: ties_by_entry([0.75 * a[n], -0.5 * b[n]], 0.5) for n in a}
    norm = math.sqrt(sum(float(w.square().sum()) for w in whole.values()))
    error = math.sqrt(sum(float((whole[n] - expected[n]).square().sum()) for n in a)) / norm
    assert report.error == pytest.approx(error, abs=1e-5)


@pytest.mark.parametrize(
    ("method", "settings", "peft_s", "its_settings"),
    [
        ("sum", {}, "cat", {}),
        ("svd", {"rank": 3}, "svd", {"svd_rank": 3}),
        ("ties", {"rank": 3, "density": 0.5}, "ties_svd", {"svd_rank": 3, "density": 0.5}),
        ("dare", {"rank": 3, "density": 0.5}, "dare_linear_svd", {"svd_rank": 3, "density": 0.5}),
        ("dare_ties", {"rank": 3, "density": 0.5}, "dare_ties_svd", {"svd_rank": 3, "density": 0.5}),
    ],
)
def test_peft_s_add_weighted_adapter_agrees(tmp_path, monkeypatch, method, settings, peft_s, its_settings):
    """With one weight for all, since it elects signs before it applies the weights; and with our draws for DARE."""
    generator = torch.Generator().manual_seed(9)

    def same_draws(tensor, density, rescale):
        return tensor * (torch.rand(tensor.shape, generator=generator) < density) / density

    monkeypatch.setattr(theirs, "random_pruning", same_draws)
    model, x, folders, _ = pair("llama", tmp_path, ALIKE)
    combine_adapters(folders, tmp_path / "out", weights=[0.8, 0.8], method=method, seed=9, **settings)
    both = PeftModel.from_pretrained(copy.deepcopy(model), folders[0], adapter_name="a").eval()
    both.load_adapter(folders[1], adapter_name="b")
    both.add_weighted_adapter(["a", "b"], [0.8, 0.8], "both", combination_type=peft_s, **its_settings)
    both.set_adapter("both")
    torch.testing.assert_close(output(by_peft(model, tmp_path / "out"), x), output(both, x), **CLOSE)


@pytest.mark.parametrize("kind", PAIRS)
def test_one_adapter_times_one_is_that_adapter_bit_for_bit(tmp_path, kind):
    model, x, folders, adapted = pair(kind, tmp_path)
    for folder, each in zip(folders, adapted):
        report = combine_adapters([folder], tmp_path / "out", weights=[1])
        before, after = tensors_of(folder), tensors_of(tmp_path / "out")
        assert before.keys() == after.keys()
        # With alpha_pattern or a scale by sqrt(rank) under a rank_pattern, one alpha cannot leave all B alone.
        exact = not config_of(folder)["alpha_pattern"]
        assert all(torch.equal(t, after[key]) for key, t in before.items() if exact or "lora_A" in key)
        torch.testing.assert_close(output(by_peft(model, tmp_path / "out"), x), output(each, x), **CLOSE)
        assert report.error < 1e-7


def test_a_plain_adapter_keeps_its_config(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    combine_adapters(folders[1:], tmp_path / "out", weights=[1.0])
    before, after = config_of(folders[1]), config_of(tmp_path / "out")
    different = {key for key in before if before[key] != after.get(key)}
    assert different <= {"target_modules", "auto_mapping", "init_lora_weights"}
    assert sorted(before["target_modules"]) == after["target_modules"]


@pytest.mark.parametrize("kind", PAIRS)
def test_a_negated_adapter_changes_the_sign_of_b_alone(tmp_path, kind):
    model, x, folders, adapted = pair(kind, tmp_path)
    combine_adapters(folders[1:], tmp_path / "out", weights=[-1])
    for key, tensor in tensors_of(folders[1]).items():
        sign = -1 if key.endswith(("lora_B.weight", "lora_embedding_B")) else 1
        assert torch.equal(tensors_of(tmp_path / "out")[key], sign * tensor)
    inputs = module_inputs(model, x)
    before, after = updates(adapted[1], inputs, model), updates(by_peft(model, tmp_path / "out"), inputs, model)
    for name in inputs:
        torch.testing.assert_close(after[name], -before[name], **CLOSE)


def test_what_was_added_can_be_taken_away(tmp_path):
    model, x, folders, adapted = pair("llama", tmp_path)
    combine_adapters(folders, tmp_path / "both", weights=[1, 1])
    combine_adapters([tmp_path / "both", folders[0]], tmp_path / "out", weights=[1, -1], method="svd")
    torch.testing.assert_close(output(by_peft(model, tmp_path / "out"), x), output(adapted[1], x), **CLOSE)


def test_ranks_are_padded_to_one_unless_an_adapter_has_several(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    report = combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    config = config_of(tmp_path / "out")
    assert (config["r"], config["rank_pattern"], config["alpha_pattern"]) == (5, {}, {})
    assert {name: m.ranks for name, m in report.modules.items()} == {
        "block.0": (2, None),
        "block.2": (None, 3),
        "fc": (2, 3),
    }
    # With one rank and one alpha, what vLLM and LoRAX compute is right as it is.
    exported = export_adapter(tmp_path / "out", tmp_path / "vllm", consumer="vllm")
    assert exported.largest_error == 0
    _, _, folders, _ = pair("llama", tmp_path / "several")
    report = combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    config = config_of(tmp_path / "out")
    assert {m.rank for m in report.modules.values()} == {4, 5, 3}
    assert config["rank_pattern"]
    assert not config["alpha_pattern"]
    assert "run lightning-lora export" in str(report)


def test_targets_that_no_list_can_name_are_a_regular_expression(tmp_path):
    model, _, folders, _ = pair("layers", tmp_path)
    combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    assert isinstance(config_of(tmp_path / "out")["target_modules"], str)
    combine_adapters([folders[0]] * 2, tmp_path / "out", weights=[1, 1])
    config = config_of(tmp_path / "out")
    assert (sorted(config["target_modules"]), config["layers_to_transform"]) == (QV, [1])
    load_adapter(model, tmp_path / "out")


def with_dtype(folder, dtype):
    tensors = {key: t.to(dtype) for key, t in tensors_of(folder).items()}
    save_file(tensors, folder / "adapter_model.safetensors", {"format": "pt"})


def test_it_is_saved_in_the_widest_precision_of_the_files(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    dtypes = [(torch.bfloat16, torch.bfloat16, torch.bfloat16), (torch.bfloat16, torch.float16, torch.float32)]
    for one, two, widest in [*dtypes, (torch.float32, torch.float64, torch.float64)]:
        with_dtype(folders[0], one)
        with_dtype(folders[1], two)
        report = combine_adapters(folders, tmp_path / "out", weights=[0.7, 0.3])
        assert {t.dtype for t in tensors_of(tmp_path / "out").values()} == {widest}
        # bfloat16 has 8 bits: rounded to nearest, at most 2^-9 of each entry is off.
        assert report.error < {torch.bfloat16: 2**-8, torch.float32: 2**-23, torch.float64: 2**-51}[widest]
    with_dtype(folders[0], torch.bfloat16)
    report = combine_adapters([folders[0]] * 3, tmp_path / "out", weights=[0.5, -2, 1])
    assert report.error == 0, "powers of two lose nothing"
    assert "error: none\n" in f"{report}\n"


def test_alpha_is_the_one_that_leaves_most_factors_alone(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)  # the first has a scale of 4 and rank 2
    with_dtype(folders[0], torch.bfloat16)
    before = tensors_of(folders[0])["base_model.model.fc.lora_B.weight"]
    combine_adapters([folders[0]] * 3, tmp_path / "out", weights=[0.6, 0.1, -0.3])
    after = tensors_of(tmp_path / "out")["base_model.model.fc.lora_B.weight"]
    assert config_of(tmp_path / "out")["lora_alpha"] == pytest.approx(0.3 * 4 * 6)
    assert torch.equal(after[:, :2], 2 * before)
    assert torch.equal(after[:, 4:], -before)


def test_values_too_large_for_the_precision_are_refused(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    for folder in folders:
        with_dtype(folder, torch.float16)
    with pytest.raises(AdapterFormatError, match=r"too large for float16, .* take smaller weights"):
        combine_adapters(folders, tmp_path / "out", weights=[1, 1e7])
    assert not (tmp_path / "out").exists()


def content(folder):
    return {path.name: path.read_bytes() for path in Path(folder).iterdir()}


def test_a_seed_repeats_bit_for_bit(tmp_path):
    _, _, folders, _ = pair("llama", tmp_path)

    def combined(seed):
        settings = {"weights": [1, 1], "method": "dare", "density": 0.5, "seed": seed}
        combine_adapters(folders, tmp_path / "out", **settings)
        return tensors_of(tmp_path / "out")

    first, again, other = combined(1), combined(1), combined(2)
    assert all(torch.equal(t, again[key]) for key, t in first.items())
    assert not any(torch.equal(t, other[key]) for key, t in first.items())


@pytest.mark.parametrize("weight", [1e-300, 1e-6, 1e9])
def test_weights_of_any_size_give_an_adapter_that_can_be_read_again(tmp_path, weight):
    _, _, folders, _ = pair("linears", tmp_path)
    for folder in folders:
        with_dtype(folder, torch.float64)
    combine_adapters(folders, tmp_path / "out", weights=[weight, 1])
    check_adapter(tmp_path / "out")
    config = config_of(tmp_path / "out")
    A, B = (tensors_of(tmp_path / "out")[f"base_model.model.fc.lora_{factor}.weight"] for factor in "AB")
    one, two = (tensors_of(folder) for folder in folders)
    expected = sum(
        w * scale * t["base_model.model.fc.lora_B.weight"] @ t["base_model.model.fc.lora_A.weight"]
        for w, scale, t in ((weight, 4, one), (1, 7 / 3, two))
    )
    torch.testing.assert_close(config["lora_alpha"] / config["r"] * B @ A, expected, rtol=1e-9, atol=0)


def test_an_adapter_of_weight_zero_is_left_out(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    report = combine_adapters(folders, tmp_path / "out", weights=[0, 1])
    assert report.adapters == (("b", 1.0),)
    assert all(torch.equal(t, tensors_of(folders[1])[key]) for key, t in tensors_of(tmp_path / "out").items())


def test_the_card_and_the_header_name_the_adapters_and_no_place_on_this_disk(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    run = tmp_path / "2026-01-31" / "adapter"
    run.parent.mkdir()
    folders[1].rename(run)
    combine_adapters([folders[0], run, folders[0]], tmp_path / "out", weights=[1, 0.5, 2], method="svd", rank=3)
    text = (tmp_path / "out" / "README.md").read_text()
    assert "| combined from | 1 x `a`, 0.5 x `2026-01-31/adapter`, 2 x `a (2)` |" in text
    assert "| combined by | svd, rank 3 |" in text
    assert "| error | 0." in text
    assert not any(str(tmp_path).encode() in data for data in content(tmp_path / "out").values())
    with safe_open(tmp_path / "out" / "adapter_model.safetensors", "pt") as file:
        note = json.loads(file.metadata()["lightning_lora"])
    assert note["combined"] == {
        "method": "svd, rank 3",
        "adapters": [["a", 1.0], ["2026-01-31/adapter", 0.5], ["a (2)", 2.0]],
    }


def test_the_report_is_a_table(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    report = combine_adapters(folders, tmp_path / "out", weights=[1, -0.5], method="svd", rank=3)
    assert str(report).splitlines()[:8] == [
        "combined by svd, rank 3",
        "     1 x a",
        "  -0.5 x b",
        "module  number  ranks  rank  largest error",
        "------  ------  -----  ----  -------------",
        "0            1  2 + -     3        " + f"{report.modules['block.0'].error:.2g}".rjust(7),
        "fc           1  2 + 3     3        " + f"{report.modules['fc'].error:.2g}".rjust(7),
        "2            1  - + 3     3        " + f"{report.modules['block.2'].error:.2g}".rjust(7),
    ]
    assert report.largest_error == report.modules["fc"].error > report.error > 0.01


def test_an_adapter_on_the_hub_is_pulled_first(tmp_path, repository, files):
    folder = tmp_path / "here"
    folder.mkdir()
    for name, data in files.items():
        (folder / name).write_bytes(data)
    report = combine_adapters(["user/adapter", folder], tmp_path / "out", weights=[1, 1])
    assert [name for name, _ in report.adapters] == ["user/adapter", "here"]


# What replaces the base's tensors.


def ours(tmp_path, name, seed=0, **fields):
    torch.manual_seed(0)
    model, _ = build("linears")
    inject(model, LoRAConfig(**{"rank": 2, "target_modules": ["fc"], **fields}))
    torch.manual_seed(seed)
    shake(model)
    return save_adapter(model, tmp_path / name)


def test_modules_trained_whole_are_kept_where_all_agree(tmp_path):
    a = ours(tmp_path, "a", modules_to_save=["head"])
    report = combine_adapters([a, a], tmp_path / "out", weights=[1, 2])
    assert "kept without a weight: head.bias, head.weight" in str(report)
    before, after = tensors_of(a), tensors_of(tmp_path / "out")
    key = "base_model.model.head.weight"
    assert torch.equal(before[key], after[key])
    model, _ = build("linears")
    load_adapter(model, tmp_path / "out")
    assert torch.equal(model.head.weight, after[key])
    assert torch.equal(by_peft(build("linears")[0], tmp_path / "out").base_model.model.head.weight, after[key])


def test_modules_trained_whole_that_differ_are_refused(tmp_path):
    a, b = (ours(tmp_path, name, i, modules_to_save=["head"]) for i, name in enumerate("ab"))
    with pytest.raises(AdapterFormatError, match=r"modules_to_save: they differ in head\..*cannot be weighted"):
        combine_adapters([a, b], tmp_path / "out", weights=[1, 1])
    with pytest.raises(AdapterFormatError, match=r"modules_to_save: only some have head\."):
        combine_adapters([a, ours(tmp_path, "c")], tmp_path / "out", weights=[1, 1])


def test_biases_are_kept_where_all_agree_and_the_weights_add_up_to_one(tmp_path):
    a = ours(tmp_path, "a", bias="lora_only")
    combine_adapters([a, a], tmp_path / "out", weights=[0.25, 0.75])
    model, _ = build("linears")
    load_adapter(model, tmp_path / "out")
    assert torch.equal(model.fc.bias, tensors_of(a)["base_model.model.fc.base_layer.bias"])
    with pytest.raises(AdapterFormatError, match=r"biases: fc\.bias are the base's plus what was trained"):
        combine_adapters([a], tmp_path / "out2", weights=[-1])
    assert not (tmp_path / "out2").exists()


def test_weights_of_the_base_that_peft_saved_as_well_stay_under_the_key_that_they_have_then(tmp_path):
    model, x = build("llama")
    targets = {"a": ["embed_tokens", "q_proj"], "b": ["q_proj"]}
    for name, names in targets.items():
        peft_folder(model, tmp_path / name, target_modules=names, save={"save_embedding_layers": True})
    assert "base_model.model.model.embed_tokens.weight" in tensors_of(tmp_path / "b")
    combine_adapters([tmp_path / "b", tmp_path / "a"], tmp_path / "out", weights=[1, 1])
    keys = [key for key in tensors_of(tmp_path / "out") if "embed_tokens" in key and "lora" not in key]
    assert keys == ["base_model.model.model.embed_tokens.base_layer.weight"]
    loaded = by_peft(model, tmp_path / "out")
    load_adapter(model, tmp_path / "out")
    torch.testing.assert_close(output(model, x), output(loaded, x), **CLOSE)
    edit_tensors(tmp_path / "b", lambda t: t["base_model.model.model.embed_tokens.weight"].add_(1))
    with pytest.raises(AdapterFormatError, match=r"weights of the base: they differ in model.embed_tokens.weight"):
        combine_adapters([tmp_path / "b", tmp_path / "a"], tmp_path / "out", weights=[1, 1])


def test_dora_is_refused_with_the_way_around_it(tmp_path):
    model, _, folders, _ = pair("linears", tmp_path)
    peft_folder(model, tmp_path / "dora", target_modules=["fc"], use_dora=True)
    with pytest.raises(AdapterFormatError, match=r"dora: DoRA rescales .* lightning-lora export"):
        combine_adapters([folders[0], tmp_path / "dora"], tmp_path / "out", weights=[1, 1])
    export_adapter(tmp_path / "dora", tmp_path / "plain", consumer="vllm", base=model, tolerance=0.5)
    combine_adapters([folders[0], tmp_path / "plain"], tmp_path / "out", weights=[1, 1])


def test_factors_of_other_shapes_are_refused(tmp_path):
    model, _, folders, _ = pair("linears", tmp_path)
    wider = copy.deepcopy(model)
    wider.fc = torch.nn.Linear(8, 12)
    peft_folder(wider, tmp_path / "wider", target_modules=["fc"])
    with pytest.raises(AdapterFormatError, match="'fc' is a layer 8 -> 8 for a, and a layer 8 -> 12 for wider"):
        combine_adapters([folders[0], tmp_path / "wider"], tmp_path / "out", weights=[1, 1])
    convolutions, _ = build("convolutions")
    peft_folder(convolutions, tmp_path / "c", target_modules=["one"])
    convolutions.one = torch.nn.Conv1d(4, 4, 3, padding=1)
    peft_folder(convolutions, tmp_path / "d", target_modules=["one"])
    with pytest.raises(AdapterFormatError, match="kernel 3 in 2 groups for c, and a convolution 4 -> 4 with kernel 3 "):
        combine_adapters([tmp_path / "c", tmp_path / "d"], tmp_path / "out", weights=[1, 1])
    key = "base_model.model.one.lora_B.weight"
    edit_tensors(tmp_path / "c", lambda t: t.update({key: t[key][:3].clone()}))
    with pytest.raises(AdapterFormatError, match=r"the factors of 'one', .* do not fit one another"):
        combine_adapters([tmp_path / "c"], tmp_path / "out", weights=[1])
    assert not (tmp_path / "out").exists()


def test_adapters_of_two_bases_are_refused_by_fingerprint(tmp_path):
    a = ours(tmp_path, "a")
    torch.manual_seed(5)
    model = type(build("linears")[0])()
    inject(model, LoRAConfig(rank=2, target_modules=["fc"]))
    b = save_adapter(model, tmp_path / "b")
    with pytest.raises(BaseMismatchError, match="a and b were trained on different bases: the fingerprints"):
        combine_adapters([a, b], tmp_path / "out", weights=[1, 1])
    combine_adapters([a, b], tmp_path / "out", weights=[1, 1], check_base=False)
    # The combination remembers its base.
    with pytest.raises(BaseMismatchError):
        load_adapter(model.__class__(), tmp_path / "out")
    load_adapter(build("linears")[0], tmp_path / "out")


def test_adapters_of_two_bases_are_refused_by_their_ids(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    for folder, base in zip(folders, ("user/base", "user/other")):
        edit_config(folder, base_model_name_or_path=base)
    with pytest.raises(BaseMismatchError, match="different bases: user/base and user/other"):
        combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    edit_config(folders[1], base_model_name_or_path="/disk/user/base", revision="v1")
    combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    assert config_of(tmp_path / "out")["base_model_name_or_path"] == "user/base"
    a, b = ours(tmp_path, "fine"), ours(tmp_path, "tuned")
    edit_config(a, base_model_name_or_path="user/base")
    edit_config(b, base_model_name_or_path="user/renamed")
    combine_adapters([a, b], tmp_path / "out", weights=[1, 1])  # the fingerprints know better


# Arguments.

REFUSED = {
    "too few weights": ({"weights": [1]}, "a number for each of the 2 adapters"),
    "one number": ({"weights": 1.0}, "a number for each of the 2 adapters"),
    "NaN": ({"weights": [1, math.nan]}, "each of weights is a finite number"),
    "infinity": ({"weights": [1, math.inf]}, "finite number, not inf"),
    "a string": ({"weights": [1, "1"]}, "finite number, not '1'"),
    "only zeros": ({"weights": [0, 0.0]}, "nothing would be left"),
    "misspelt method": ({"method": "tie"}, "Did you mean 'ties'"),
    "PEFT's cat": ({"method": "cat"}, "That is 'sum' here"),
    "PEFT's linear": ({"method": "linear"}, "'sum' adds the updates"),
    "rank 0": ({"method": "svd", "rank": 0}, "rank is a whole number from 1 on"),
    "rank 2.5": ({"method": "svd", "rank": 2.5}, "rank is a whole number from 1 on"),
    "rank of a sum": ({"rank": 4}, "use method='svd'"),
    "no density": ({"method": "ties"}, "needs a density"),
    "density 0": ({"method": "ties", "density": 0}, "above 0 and at most 1"),
    "density 1.1": ({"method": "dare", "density": 1.1}, "above 0 and at most 1"),
    "density NaN": ({"method": "dare", "density": math.nan}, "above 0 and at most 1"),
    "density of a sum": ({"density": 0.5}, "keeps everything"),
    "negative seed": ({"method": "dare", "density": 0.5, "seed": -1}, "seed is a whole number"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_an_argument_that_cannot_be_is_refused(tmp_path, case):
    changes, message = REFUSED[case]
    _, _, folders, _ = pair("linears", tmp_path)
    with pytest.raises(ConfigError, match=message):
        combine_adapters(folders, tmp_path / "out", **{"weights": [1, 1], **changes})
    assert not (tmp_path / "out").exists()


def test_adapters_that_are_none_are_refused(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    for sources in ([], str(folders[0])):
        with pytest.raises(ConfigError, match="are a list"):
            combine_adapters(sources, tmp_path / "out", weights=[1])
    with pytest.raises(ConfigError, match="3 is neither"):
        combine_adapters([folders[0], 3], tmp_path / "out", weights=[1, 1])
    with pytest.raises(AdapterFormatError, match="no folder"):
        combine_adapters([folders[0], tmp_path / "nowhere"], tmp_path / "out", weights=[1, 1])
    edit_tensors(folders[1], lambda t: t["base_model.model.fc.lora_A.weight"].fill_(math.nan))
    with pytest.raises(AdapterFormatError, match="not finite"):
        combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    assert not (tmp_path / "out").exists()


def test_a_rank_that_groups_do_not_divide_is_refused(tmp_path):
    _, _, folders, _ = pair("convolutions", tmp_path)
    with pytest.raises(ConfigError, match="rank=3 is no multiple of 2, the groups of the convolution 'one'"):
        combine_adapters(folders, tmp_path / "out", weights=[1, 1], method="svd", rank=3)


@pytest.mark.parametrize("kind", ["convolutions", "words", "gpt2"])
def test_svd_at_the_full_rank_is_the_sum_for_every_geometry(tmp_path, kind):
    model, x, folders, _ = pair(kind, tmp_path)
    combine_adapters(folders, tmp_path / "sum", weights=[1, -0.5])
    for method, settings in (("svd", {}), ("dare", {"density": 1.0})):
        combine_adapters(folders, tmp_path / "svd", weights=[1, -0.5], method=method, rank=12, **settings)
        expected = output(by_peft(model, tmp_path / "sum"), x)
        torch.testing.assert_close(output(by_peft(model, tmp_path / "svd"), x), expected, **CLOSE)


def test_the_output_is_never_one_of_the_adapters(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    before = content(folders[0])
    os.symlink(folders[0], tmp_path / "link")
    for target in (folders[0], tmp_path / "link", tmp_path / "b" / ".." / "a"):
        for weights in ([1, 1], [0, 1]):
            with pytest.raises(ConfigError, match="would replace one of its adapters"):
                combine_adapters(folders, target, weights=weights)
    with pytest.raises(ConfigError, match="is a file"):
        combine_adapters(folders, folders[0] / "README.md", weights=[1, 1])
    assert content(folders[0]) == before


def test_an_earlier_output_is_replaced(tmp_path):
    _, _, folders, _ = pair("linears", tmp_path)
    combine_adapters(folders, tmp_path / "out", weights=[1, 1])
    combine_adapters(folders[:1], tmp_path / "out", weights=[1])
    assert config_of(tmp_path / "out")["r"] == 2
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b", "out"]
