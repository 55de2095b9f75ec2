"""An export computes the same in its consumer's own arithmetic as the original does in PEFT; or it is refused."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from lightning_lora import LoRAConfig, export_adapter, inject, load_adapter, save_adapter
from lightning_lora.errors import AdapterFormatError, CheckpointError, ConfigError
from lightning_lora.format import peft
from lightning_lora.hub.consumers import CONSUMERS
from tests.hub.models import build, by_peft, edit_config, edit_tensors, output, peft_folder, shake
from tests.rewriting.consumers import SERVERS, lorax, vllm, with_updates

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*rank_pattern keys did not match:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:Setting `save_embedding_layers`"),
]

# float32: the two compute the same products in another order.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}

QV = ["q_proj", "v_proj"]
CASES = {
    "plain": {"target_modules": QV, "r": 4, "lora_alpha": 6},
    "rank-pattern": {"target_modules": [*QV, "up_proj"], "r": 4, "rank_pattern": {"q_proj": 2, "layers.1.*up_proj": 3}},
    "alpha-pattern": {"target_modules": QV, "r": 4, "alpha_pattern": {"q_proj": 3, "layers.1.self_attn.v_proj": 5.5}},
    "both-patterns": {
        "target_modules": QV,
        "r": 3,
        "rank_pattern": {"q_proj": 5},
        "alpha_pattern": {"v_proj": 1},
        "use_rslora": True,
    },
    "rslora": {"target_modules": QV, "r": 3, "use_rslora": True},
    "regex": {"target_modules": r".*\.(q_proj|down_proj)", "r": 2},
    "layers": {"target_modules": QV, "layers_to_transform": [1], "r": 4},
}


def config_of(folder: Path) -> dict:
    return json.loads((folder / "adapter_config.json").read_text())


def tensors_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def served(model, folder, consumer, x):
    """The outputs of each version of the consumer."""
    return [output(with_updates(model, server(folder)), x) for server in SERVERS[consumer]]


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("consumer", CONSUMERS)
def test_an_exported_adapter_computes_there_what_the_original_does_in_peft(consumer, case, tmp_path):
    base, x = build("llama")
    wanted = output(peft_folder(base, tmp_path / "a", **CASES[case]), x)
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer=consumer, base=base)
    for got in served(base, tmp_path / "b", consumer, x) if consumer != "peft" else []:
        torch.testing.assert_close(got, wanted, **CLOSE)
    torch.testing.assert_close(output(by_peft(base, tmp_path / "b"), x), wanted, **CLOSE)
    loaded, _ = build("llama")
    load_adapter(loaded, tmp_path / "b")
    torch.testing.assert_close(output(loaded, x), wanted, **CLOSE)
    # Half a unit in the last place of float32, and twice that for the norms' own rounding.
    assert report.largest_error <= 2**-23
    assert str(report).startswith(f"exported for {CONSUMERS[consumer].title}")


@pytest.mark.parametrize(
    ("consumer", "case"),
    [
        ("vllm", "alpha-pattern"),
        ("vllm", "both-patterns"),
        ("lorax", "plain"),
        ("lorax", "layers"),
        ("llama.cpp", "rslora"),
        ("llama.cpp", "alpha-pattern"),
    ],
)
def test_without_the_export_it_would_have_computed_something_else(consumer, case, tmp_path):
    base, x = build("llama")
    wanted = output(peft_folder(base, tmp_path / "a", **CASES[case]), x)
    try:
        got = served(base, tmp_path / "a", consumer, x)[0]
    except AssertionError:
        return  # the consumer itself refuses it
    assert (got - wanted).abs().max() > 1e-3


@pytest.mark.parametrize("consumer", ["vllm", "llama.cpp"])
def test_an_adapted_embedding_is_exported(consumer, tmp_path):
    base, x = build("llama")
    fields = {"target_modules": ["embed_tokens", "q_proj"], "rank_pattern": {"embed_tokens": 3}, "use_rslora": True}
    wanted = output(peft_folder(base, tmp_path / "a", **fields), x)
    export_adapter(tmp_path / "a", tmp_path / "b", consumer=consumer, base=base)
    for got in served(base, tmp_path / "b", consumer, x):
        torch.testing.assert_close(got, wanted, **CLOSE)
    with pytest.raises(AdapterFormatError, match="LoRAX would silently leave out the embeddings"):
        export_adapter(tmp_path / "a", tmp_path / "c", consumer="lorax")


def test_transposed_layers_are_exported_where_the_consumer_has_them(tmp_path):
    base, x = build("gpt2")
    wanted = output(peft_folder(base, tmp_path / "a", target_modules=["c_attn"], fan_in_fan_out=True, r=3), x)
    export_adapter(tmp_path / "a", tmp_path / "b", consumer="lorax")
    torch.testing.assert_close(served(base, tmp_path / "b", "lorax", x)[0], wanted, **CLOSE)
    with pytest.raises(AdapterFormatError, match="Conv1D"):
        export_adapter(tmp_path / "a", tmp_path / "c", consumer="llama.cpp")


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_an_adapter_of_this_package_is_exported(consumer, tmp_path):
    base, x = build("llama")
    model, _ = build("llama")
    inject(model, LoRAConfig(rank=4, rank_pattern={"q_proj": 2}, alpha_pattern={"up_proj": 3}, use_rslora=True))
    shake(model)
    export_adapter(save_adapter(model, tmp_path / "a"), tmp_path / "b", consumer=consumer)
    for got in served(base, tmp_path / "b", consumer, x) if consumer != "peft" else []:
        torch.testing.assert_close(got, output(model, x), **CLOSE)
    load_adapter(base, tmp_path / "b")  # with the fingerprint of its base, which is checked
    torch.testing.assert_close(output(base, x), output(model, x), **CLOSE)


# Precision.


def test_one_scale_needs_no_new_numbers(tmp_path):
    base, _ = build("llama")
    peft_folder(base, tmp_path / "a", target_modules=QV, r=3, lora_alpha=7, use_rslora=True)
    edit_tensors(tmp_path / "a", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm")
    before, after = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    assert before.keys() == after.keys()
    assert all(after[k].dtype == torch.bfloat16 and torch.equal(after[k], before[k]) for k in after)
    assert report.largest_error == 0
    assert "bit for bit" in str(report)


def test_scales_apart_by_a_power_of_two_cost_bfloat16_nothing_and_others_say_what(tmp_path):
    base, _ = build("llama")
    for alpha, most in ((4, 0), (3, 2**-8)):
        peft_folder(base, tmp_path / "a", target_modules=QV, r=4, lora_alpha=8, alpha_pattern={"q_proj": alpha})
        edit_tensors(tmp_path / "a", lambda t: t.update({k: v.bfloat16() for k, v in t.items()}))
        report = export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm")
        assert report.largest_error <= most
        exact, got = vllm_of_peft(tmp_path / "a"), vllm(tmp_path / "b")
        errors = {name: float((got[name] - exact[name]).norm() / exact[name].norm()) for name in exact}
        for name, module in report.modules.items():
            assert module.error == pytest.approx(errors[name], abs=1e-12)
        wide = export_adapter(tmp_path / "a", tmp_path / "c", consumer="vllm", dtype="float32")
        assert wide.largest_error < 1e-7
        assert all(t.dtype == torch.float32 for t in tensors_of(tmp_path / "c").values())
    with pytest.raises(AdapterFormatError, match=r"rounding changes .* more than tolerance=0.0001"):
        export_adapter(tmp_path / "a", tmp_path / "d", consumer="vllm", tolerance=1e-4)


def vllm_of_peft(folder):
    """What PEFT adds, in float64: alpha_pattern holds names' endings here."""
    config, tensors = config_of(folder), {k: t.double() for k, t in tensors_of(folder).items()}
    updates = {}
    for key in tensors:
        if key.endswith("lora_A.weight"):
            name = key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
            alpha = config["alpha_pattern"].get(name.rpartition(".")[2], config["lora_alpha"])
            updates[name] = alpha / config["r"] * tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
    return updates


def test_a_scale_that_overflows_half_precision_is_refused(tmp_path):
    base, _ = build("llama")
    peft_folder(base, tmp_path / "a", target_modules=QV, r=2, lora_alpha=2, alpha_pattern={"q_proj": 3})
    big = {"lora_B": 30_000.0, "lora_A": 1.0}
    edit_tensors(
        tmp_path / "a",
        lambda t: t.update({k: torch.full_like(v, big[k.split(".")[-2]]).half() for k, v in t.items()}),
    )
    edit_config(tmp_path / "a", alpha_pattern={"layers.0.self_attn.q_proj": 5})
    with pytest.raises(AdapterFormatError, match=r"too large for .*dtype='float32'"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm")
    export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm", dtype="float32")


# DoRA.


@pytest.mark.parametrize("kind", ["llama", "gpt2", "words"])
def test_dora_becomes_a_plain_pair_with_the_error_that_is_stated(kind, tmp_path):
    base, x = build(kind)
    targets = {"llama": ["q_proj", "down_proj"], "gpt2": ["c_attn", "c_proj"], "words": ["embed", "fc"]}[kind]
    fields = {"target_modules": targets, "use_dora": True, "r": 2, "fan_in_fan_out": kind == "gpt2"}
    adapted = peft_folder(base, tmp_path / "a", **fields)
    wanted = output(adapted, x)
    # At full rank nothing is lost but rounding.
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm", base=base, tolerance=1e-6)
    assert report.error < 1e-6
    for got in served(base, tmp_path / "b", "vllm", x):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(output(by_peft(base, tmp_path / "b"), x), wanted, rtol=1e-4, atol=1e-4)
    # At a lower one, what is lost is what the report says, by PEFT's own merged weights.
    report = export_adapter(tmp_path / "a", tmp_path / "c", consumer="vllm", base=base, rank=4, tolerance=10)
    merged = adapted.merge_and_unload()
    for name, update in vllm(tmp_path / "c").items():
        W = base.get_submodule(name).weight.detach().double()
        exact = merged.get_submodule(name).weight.detach().double() - W
        is_transposed = type(base.get_submodule(name)).__name__ == "Conv1D"
        lost = exact - (update.T if is_transposed else update)
        module = report.modules[name]
        # PEFT merges in float32, so its own weights are off by about 1e-7 of W.
        assert float(lost.norm() / exact.norm()) == pytest.approx(module.error, abs=1e-5)
        norms = torch.linalg.matrix_norm(lost, 2) / torch.linalg.matrix_norm(exact, 2)
        assert float(norms) == pytest.approx(module.worst, abs=1e-5)


def test_the_base_of_a_dora_adapter_can_be_its_files(tmp_path):
    base, x = build("llama")
    wanted = output(peft_folder(base, tmp_path / "a", target_modules=QV, use_dora=True), x)
    base.save_pretrained(tmp_path / "whole")
    base.save_pretrained(tmp_path / "parts", max_shard_size="5KB")
    assert (tmp_path / "parts" / "model.safetensors.index.json").is_file()
    base.model.save_pretrained(tmp_path / "bare")  # names without "model."
    for source in (tmp_path / "whole", tmp_path / "parts", tmp_path / "bare", tmp_path / "whole" / "model.safetensors"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm", base=source, tolerance=1e-6)
        torch.testing.assert_close(served(base, tmp_path / "b", "vllm", x)[0], wanted, rtol=1e-4, atol=1e-4)


def test_dora_that_a_low_rank_cannot_follow_is_refused_with_the_number(tmp_path):
    base, _ = build("llama")
    peft_folder(base, tmp_path / "a", target_modules=QV, use_dora=True)
    with pytest.raises(AdapterFormatError, match=r"no DoRA.*pass base="):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm")
    with pytest.raises(AdapterFormatError, match=r"at rank 3 0\.\d+ of .* takes at most 3 here.*merge"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm", base=base, max_rank=3)
    other, _ = build("gpt2")
    with pytest.raises(AdapterFormatError, match=r"has no weight 'model\.layers\.0"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm", base=other)
    assert not (tmp_path / "b").exists()


def test_peft_keeps_dora_as_it_is(tmp_path):
    base, x = build("llama")
    wanted = output(peft_folder(base, tmp_path / "a", target_modules=QV, use_dora=True), x)
    export_adapter(tmp_path / "a", tmp_path / "b", consumer="peft")
    assert torch.equal(output(by_peft(base, tmp_path / "b"), x), wanted)


# What PEFT itself gets wrong.


def test_overlapping_patterns_that_peft_reordered_load_again(tmp_path):
    base, x = build("llama")
    patterns = {"self_attn.q_proj": 4, ".*proj": 3}  # sorted, the second comes first
    wanted = output(peft_folder(base, tmp_path / "a", target_modules=QV, rank_pattern=patterns), x)
    with pytest.raises(RuntimeError, match="size mismatch"):
        by_peft(base, tmp_path / "a")
    for consumer in ("peft", "vllm"):
        export_adapter(tmp_path / "a", tmp_path / consumer, consumer=consumer)
        torch.testing.assert_close(output(by_peft(base, tmp_path / consumer), x), wanted, **CLOSE)
    alphas = {"self_attn.q_proj": 4, ".*proj": 3}
    peft_folder(base, tmp_path / "c", target_modules=QV, rank_pattern=patterns, alpha_pattern=alphas)
    with pytest.raises(AdapterFormatError, match=r"alpha_pattern .*by hand"):
        export_adapter(tmp_path / "c", tmp_path / "d", consumer="peft")


@pytest.mark.parametrize("consumer", CONSUMERS)
def test_keys_that_carry_the_adapters_name_are_cleaned(consumer, tmp_path):
    base, x = build("llama")
    wanted = output(peft_folder(base, tmp_path / "a", target_modules=QV), x)
    keys = set(tensors_of(tmp_path / "a"))
    rename = lambda k: k.replace(".weight", ".default.weight")  # noqa: E731
    edit_tensors(tmp_path / "a", lambda t: [t.update({rename(k): t.pop(k)}) for k in list(t)])
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer=consumer)
    assert set(tensors_of(tmp_path / "b")) == keys
    assert "8 without the adapter's name" in str(report)
    torch.testing.assert_close(output(by_peft(base, tmp_path / "b"), x), wanted, **CLOSE)


# Weights of the base, heads.


def test_weights_of_the_base_are_left_out_only_where_they_are_the_bases(tmp_path):
    base, x = build("llama")
    save = {"save_embedding_layers": True}
    wanted = output(peft_folder(base, tmp_path / "a", save=save, target_modules=QV), x)
    with pytest.raises(AdapterFormatError, match=r"pass base= so that it can be compared"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm")
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm", base=base)
    assert "left out" in str(report)
    torch.testing.assert_close(served(base, tmp_path / "b", "vllm", x)[0], wanted, **CLOSE)
    other, _ = build("llama")
    with torch.no_grad():
        other.model.embed_tokens.weight.add_(1)
    with pytest.raises(AdapterFormatError, match=r"embed_tokens\.weight of its own"):
        export_adapter(tmp_path / "a", tmp_path / "c", consumer="vllm", base=other)


def test_vllm_gets_the_head_of_a_classifier_and_the_others_refuse_it(tmp_path):
    base, x = build("classifier")
    fields = {"target_modules": ["query"], "task_type": "SEQ_CLS", "alpha_pattern": {"layer.0.*query": 3}}
    wanted = output(peft_folder(base, tmp_path / "a", **fields), x)
    export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm")
    assert config_of(tmp_path / "b")["modules_to_save"] == ["classifier"]
    torch.testing.assert_close(output(by_peft(base, tmp_path / "b"), x), wanted, **CLOSE)
    for consumer in ("lorax", "llama.cpp"):
        with pytest.raises(AdapterFormatError, match=r"takes no modules that were trained whole .*classifier.*merge"):
            export_adapter(tmp_path / "a", tmp_path / "c", consumer=consumer)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_llama_cpp_gets_a_head_or_an_embedding_only_where_the_base_is_known_to_have_both(target, tmp_path):
    tied, _ = build("llama-tied")
    apart, _ = build("llama")
    tied.save_pretrained(tmp_path / "tied")
    peft_folder(apart, tmp_path / "a", target_modules=[target, "q_proj"])
    for base in (tied, tmp_path / "tied"):
        with pytest.raises(AdapterFormatError, match=rf"share one weight, which llama.cpp .*{target}.*: merge"):
            export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp", base=base)
    with pytest.raises(AdapterFormatError, match=r"may share one weight.*pass base="):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp")
    edit_config(tmp_path / "a", base_model_name_or_path=str(tmp_path / "tied"))  # read where it lies here
    with pytest.raises(AdapterFormatError, match=r"share one weight.*: merge"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp")
    assert not export_adapter(tmp_path / "a", tmp_path / "b", consumer="vllm").notes
    export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp", base=apart)


def test_an_embedding_of_positions_is_refused_for_llama_cpp(tmp_path):
    base, _ = build("gpt2")
    peft_folder(base, tmp_path / "a", target_modules=["wpe"])
    with pytest.raises(AdapterFormatError, match=r"no embedding but that of the tokens .*wpe"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer="llama.cpp", base=base)


def test_an_architecture_on_which_llama_cpp_was_not_tried_is_said(folder, tmp_path):
    base, _ = build("llama")
    assert "tried" not in str(export_adapter(folder, tmp_path / "b", consumer="llama.cpp", base=base))
    assert "this base is not known (pass base=)" in str(export_adapter(folder, tmp_path / "b", consumer="llama.cpp"))
    base.__class__ = type("OtherForCausalLM", (type(base),), {})
    assert "not with OtherForCausalLM: compare" in str(
        export_adapter(folder, tmp_path / "b", consumer="llama.cpp", base=base)
    )


def test_the_size_is_said_and_that_merging_is_smaller_where_it_grows(folder, tmp_path):
    base, _ = build("llama")
    size = (folder / "adapter_model.safetensors").stat().st_size
    report = export_adapter(folder, tmp_path / "b", consumer="vllm", base=base)
    assert (report.size_before, report.size) == (size, (tmp_path / "b" / "adapter_model.safetensors").stat().st_size)
    assert "merged" not in str(report)
    peft_folder(base, tmp_path / "dora", target_modules=QV, use_dora=True)
    report = export_adapter(tmp_path / "dora", tmp_path / "c", consumer="vllm", base=base, tolerance=1e-6)
    assert report.size > 1.5 * report.size_before
    assert report.size_merged == 4 * sum(p.numel() for p in base.parameters())
    said = f"merged into its base (lightning-lora merge) it is {report.size_merged / 1e6:.3g} MB"
    assert said in str(report)


# Refused, with nothing written.

REFUSED = {
    "whole": ("llama", {"target_modules": QV, "modules_to_save": ["lm_head"]}, "vllm", "lm_head.*merge"),
    "norms": ("llama", {"target_modules": QV, "modules_to_save": ["norm"]}, "llama.cpp", "norm"),
    "bias": ("linears", {"target_modules": ["fc"], "bias": "all"}, "vllm", "trained biases"),
    "convolution": ("convolutions", {"target_modules": ["two"]}, "vllm", "convolutions"),
    "convolution-gguf": ("convolutions", {"target_modules": ["two"]}, "llama.cpp", "convolutions"),
    "rank": ("llama", {"target_modules": QV, "r": 600}, "vllm", "at most rank 512"),
    "rank-lorax": ("llama", {"target_modules": QV, "r": 129}, "lorax", "ranks 8, 16, 32, 64, 128; .* rank 129"),
    "layers-lorax": ("llama", {"target_modules": QV, "layers_to_transform": [0]}, "lorax", "pass base="),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_consumer_cannot_compute_is_refused(case, tmp_path):
    kind, fields, consumer, match = REFUSED[case]
    base, _ = build(kind)
    peft_folder(base, tmp_path / "a", **fields)
    before = sorted(os.listdir(tmp_path))
    with pytest.raises(AdapterFormatError, match=match):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer=consumer)
    assert sorted(os.listdir(tmp_path)) == before


@pytest.fixture
def folder(tmp_path):
    base, _ = build("llama")
    peft_folder(base, tmp_path / "a", target_modules=QV, r=4)
    return tmp_path / "a"


def test_arguments_that_cannot_be_are_named(folder, tmp_path):
    for match, consumer, arguments in [
        ("Did you mean 'vllm'", "vlm", {}),
        ("consumer is one of 'vllm', 'lorax'", 3, {}),
        ("rank is a whole number", "vllm", {"rank": 0}),
        ("rank=2 is less than the rank 4", "vllm", {"rank": 2}),
        ("rank=8 is more than max_rank=4", "vllm", {"rank": 8, "max_rank": 4}),
        ("max_rank is a whole number", "vllm", {"max_rank": 1.5}),
        ("tolerance", "vllm", {"tolerance": -1}),
        ("tolerance", "vllm", {"tolerance": float("nan")}),
        ("Did you mean 'bfloat16'", "vllm", {"dtype": "bfloat6"}),
        ("dtype", "vllm", {"dtype": torch.int8}),
        ("no folder and no file", "vllm", {"base": tmp_path / "nowhere"}),
        ("has no safetensors", "vllm", {"base": tmp_path}),
        ("has no revision", "vllm", {"revision": "main"}),
    ]:
        with pytest.raises(ConfigError, match=match):
            export_adapter(folder, tmp_path / "b", consumer=consumer, **arguments)
    with pytest.raises(AdapterFormatError, match="here at most rank 2; this adapter would have rank 4"):
        export_adapter(folder, tmp_path / "b", consumer="vllm", max_rank=2)
    assert not (tmp_path / "b").exists()


def test_a_rank_that_is_asked_for_is_written(folder, tmp_path):
    base, x = build("llama")
    wanted = output(by_peft(base, folder), x)
    for consumer in ("vllm", "lorax", "llama.cpp"):
        export_adapter(folder, tmp_path / "b", consumer=consumer, rank=16)
        assert config_of(tmp_path / "b")["r"] == 16
        torch.testing.assert_close(served(base, tmp_path / "b", consumer, x)[0], wanted, **CLOSE)


DAMAGED = {
    "nan": (lambda t: t[sorted(t)[0]].fill_(float("nan")), "not finite"),
    "half": (lambda t: t.pop(sorted(t)[0]), "missing: .*lora_A"),
    "ranks": (lambda t: t.update({sorted(t)[0]: torch.zeros(9, 16)}), "has rank 9"),
    "foreign": (lambda t: t.update({"evil.weight": torch.zeros(3)}), "no part of an adapter"),
    "twice": (lambda t: t.update({sorted(t)[0].replace(".weight", ".default.weight"): torch.zeros(4, 16)}), "twice"),
    "magnitude": (
        lambda t: t.update({sorted(t)[0].replace("lora_A.weight", "lora_magnitude_vector"): torch.zeros(16)}),
        "use_dora is False",
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_adapter_is_refused(case, folder, tmp_path):
    change, match = DAMAGED[case]
    edit_tensors(folder, change)
    with pytest.raises(AdapterFormatError, match=match):
        export_adapter(folder, tmp_path / "b", consumer="vllm")
    assert not (tmp_path / "b").exists()


@pytest.mark.parametrize(
    ("fields", "match"),
    [
        ({"r": 3}, "does not fit"),
        ({"r": 5}, "does not fit"),
        ({"lora_alpha": 0}, "alpha is a finite number above 0"),  # llama.cpp would take it for a scale of 1
        ({"lora_bias": True}, "lora_bias"),
        ({"trainable_token_indices": [1]}, "trainable_token"),
        ({"init_lora_weights": "pissa"}, "pissa"),
        ({"use_dora": True}, "magnitude is missing"),
        ({"use_dora": True, "alpha_pattern": {"(a+)+": 3}}, "for ever"),
        ({"use_dora": True, "rank_pattern": {"(a+)+": 3}}, "for ever"),
        ({"use_dora": 1}, "use_dora is 1"),
        ({"alpha_pattern": {"(a+)+": 3}}, "for ever"),
    ],
)
def test_a_config_that_cannot_be_honoured_is_refused(fields, match, folder, tmp_path):
    edit_config(folder, **fields)
    with pytest.raises(AdapterFormatError, match=match):
        export_adapter(folder, tmp_path / "b", consumer="vllm")
    assert not (tmp_path / "b").exists()


def test_the_adapter_itself_is_not_replaced(folder, tmp_path):
    before = {p.name: p.read_bytes() for p in folder.iterdir()}
    (tmp_path / "link").symlink_to(folder)
    for target in (folder, tmp_path / "link"):
        with pytest.raises(ConfigError, match="choose another folder"):
            export_adapter(folder, target, consumer="vllm")
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_a_clear_error(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    for target in (tmp_path / "file", tmp_path / "file" / "b"):
        with pytest.raises(CheckpointError):
            export_adapter(folder, target, consumer="vllm")
    assert (tmp_path / "file").read_text() == "mine"


# What is written.


def test_the_config_has_every_field_of_peft_and_the_card_says_what_it_is_for(folder, tmp_path):
    (folder / "README.md").write_text("---\nlicense: mit\n---\n\nMine.\n")
    edit_config(folder, base_model_name_or_path="user/base", task_type="CAUSAL_LM")
    report = export_adapter(folder, tmp_path / "b", consumer="llama.cpp", base=build("llama")[0])
    assert config_of(tmp_path / "b").keys() == config_of(folder).keys()
    assert config_of(tmp_path / "b")["base_model_name_or_path"] == "user/base"
    card = (tmp_path / "b" / "README.md").read_text()
    assert "| exported for | llama.cpp |" in card
    assert "Mine." in card
    assert "license: mit" in card
    assert not report.notes
    edit_config(folder, base_model_name_or_path=str(tmp_path))
    assert "--base" in str(export_adapter(folder, tmp_path / "b", consumer="llama.cpp"))
    assert str(tmp_path) not in (tmp_path / "b" / "adapter_config.json").read_text()


def test_a_rank_above_what_vllm_takes_unasked_comes_with_the_flag_that_it_needs(folder, tmp_path):
    assert "--max-lora-rank" not in str(export_adapter(folder, tmp_path / "b", consumer="vllm", rank=16))
    assert "start vLLM with --max-lora-rank 32" in str(export_adapter(folder, tmp_path / "b", consumer="vllm", rank=17))


def test_lorax_gets_zeros_where_a_kind_of_module_lacks_a_layer(tmp_path):
    base, x = build("llama")
    targets = ["layers.0.self_attn.q_proj", "layers.1.self_attn.v_proj"]
    wanted = output(peft_folder(base, tmp_path / "a", target_modules=targets), x)
    assert not lorax(tmp_path / "a")
    report = export_adapter(tmp_path / "a", tmp_path / "b", consumer="lorax", base=base)
    assert len(report.modules) == 4
    torch.testing.assert_close(served(base, tmp_path / "b", "lorax", x)[0], wanted, **CLOSE)
    assert len(tensors_of(tmp_path / "b")) == 8


def test_every_key_is_one_that_vllm_and_the_converter_of_llama_cpp_read(tmp_path):
    base, _ = build("llama")
    peft_folder(base, tmp_path / "a", target_modules=["q_proj", "embed_tokens"])
    for consumer in ("vllm", "llama.cpp"):
        export_adapter(tmp_path / "a", tmp_path / "b", consumer=consumer, base=base)
        keys = tensors_of(tmp_path / "b")
        assert all(re.search(r"\.lora_([AB]\.weight|embedding_[AB])$", key) for key in keys)
        assert len(peft.adapted_names(keys)) == 3
