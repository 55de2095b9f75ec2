"""The embedded base: what it promises to those who load it, and the script that makes it again."""

from __future__ import annotations

import csv
import json
import logging
import math
import os
import platform
import socket
import stat
from pathlib import Path

import pytest
import torch
import train_base
from base_corpus import SOURCE_FILES, Topics, documentation_topics, source_sample
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

import lightning_lora.embedded
from lightning_lora.embedded import BASE

FILES = {
    "README.md",
    "chat_template.jinja",
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
    "train_log.csv",
}


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(BASE).eval()


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(BASE)


@pytest.fixture(scope="module")
def perplexity(model) -> dict[str, float]:
    prose = [text.encode() for text in documentation_topics().held_back.values()]
    texts = {"prose": prose, "source": source_sample()[::3]}  # a third is enough for a limit
    return {name: math.exp(train_base.loss_per_byte(model, of)) for name, of in texts.items()}


@pytest.fixture
def threads_restored():
    """The script sets the number of threads for the whole process: put it back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def little_text(monkeypatch):
    """A corpus on which steps and measurements take no time."""
    text = "Of two runs, the second is the first again. " * 20
    monkeypatch.setattr(train_base, "documentation_topics", lambda: Topics({"all": text}, {"some": text[:100]}))
    monkeypatch.setattr(train_base, "source_sample", lambda: [b"import this"])
    monkeypatch.setattr(train_base, "BATCH", 2)
    monkeypatch.setattr(train_base, "CONTEXT", 64)


@pytest.fixture
def transformers_log():
    """Records of WARNING and above; transformers' logger does not propagate, so caplog would not see them."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("transformers")
    logger.addHandler(handler)
    yield records
    logger.removeHandler(handler)


class TestTheFolder:
    def test_loads_without_network_and_without_a_warning(self, monkeypatch, recwarn, transformers_log):
        def refuse(*_):
            raise AssertionError("loading the embedded base opened a connection")

        monkeypatch.setattr(socket.socket, "connect", refuse)
        monkeypatch.setattr(socket, "getaddrinfo", refuse)
        model, loading = AutoModelForCausalLM.from_pretrained(BASE, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(BASE)
        assert not any(loading.values())  # no missing, unexpected or mismatched keys, no errors
        assert len(tokenizer) == model.config.vocab_size
        assert [str(warning.message) for warning in recwarn] == []
        assert [record.getMessage() for record in transformers_log] == []

    def test_holds_what_a_model_folder_and_its_history_need(self):
        assert {path.name for path in BASE.iterdir()} == FILES

    def test_is_small_enough_to_ship(self, model):
        assert 2e6 < model.num_parameters() < 4e6
        assert sum(path.stat().st_size for path in BASE.iterdir()) < 8e6

    def test_stores_bfloat16_and_loads_float32(self, model):
        with safe_open(BASE / "model.safetensors", "pt") as file:
            assert {file.get_slice(name).get_dtype() for name in file.keys()} == {"BF16"}  # noqa: SIM118
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}

    def test_has_a_head_of_its_own(self, model):
        assert model.lm_head.weight is not model.model.embed_tokens.weight

    def test_generates_from_its_own_configuration(self, model, tokenizer):
        prompt = tokenizer("The statement", return_tensors="pt")
        ids = model.generate(**prompt, max_new_tokens=4, do_sample=False)
        assert tokenizer.decode(ids[0]).startswith("The statement")


class TestTheTokenizer:
    def test_gives_each_byte_its_own_value_as_id(self, tokenizer):
        text = "".join(map(chr, range(256)))
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        # UTF-8 text never holds 0xC0, 0xC1 or 0xF5 to 0xFF, so the vocabulary itself is asked.
        assert sorted(tokenizer.backend_tokenizer.get_vocab(with_added_tokens=False).values()) == list(range(256))

    @pytest.mark.parametrize(
        "text",
        [
            "",
            " ",
            "\x00\x7f",
            "a  b\n\n\tc \r\n",
            "don't , do . this !",
            "Größe, naïve, 日本語, 🎉👩‍👩‍👧",
            "<pad></s> [CLS]",
        ],
    )
    def test_returns_any_text_as_it_was(self, tokenizer, text):
        ids = tokenizer(text).input_ids
        assert ids == list(text.encode())
        assert tokenizer.decode(ids) == text

    def test_keeps_its_special_tokens_apart_from_the_bytes(self, tokenizer, model):
        special = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
        assert special == (256, 257, 258)
        config = model.config
        assert (config.bos_token_id, config.eos_token_id, config.pad_token_id) == special

    def test_pads_a_batch(self, tokenizer):
        batch = tokenizer(["ab", "a"], padding=True)
        assert batch.input_ids == [[97, 98], [97, 258]]
        assert batch.attention_mask == [[1, 1], [1, 0]]

    def test_marks_what_the_assistant_says_in_a_chat(self, tokenizer):
        chat = [{"role": "user", "content": "Hi ä"}, {"role": "assistant", "content": "Yes."}]
        rendered = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        said = [token for token, mine in zip(rendered["input_ids"], rendered["assistant_masks"], strict=True) if mine]
        assert tokenizer.decode(rendered["input_ids"]) == "<|bos|>User: Hi ä\nAssistant: Yes.<|eos|>\n"
        assert tokenizer.decode(said) == "Yes.<|eos|>"

    def test_begins_the_answer_where_training_saw_it_begin(self, tokenizer):
        chat = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes."}]
        prompt = tokenizer.apply_chat_template(chat[:1], add_generation_prompt=True, tokenize=False)
        assert tokenizer.apply_chat_template(chat, tokenize=False).startswith(prompt + "Yes.")


class TestTheTexts:
    def test_no_long_paragraph_is_both_trained_on_and_held_back(self):
        topics = documentation_topics()
        trained, held_back = (
            {" ".join(p.split()) for text in half.values() for p in text.split("\n\n")} for half in topics
        )
        assert [paragraph for paragraph in trained & held_back if len(paragraph) >= 60] == []

    def test_about_a_twentieth_is_held_back(self):
        train, held_back = (sum(map(len, half.values())) for half in documentation_topics())
        assert 0.04 < held_back / (train + held_back) <= 0.05

    def test_the_source_sample_is_code_from_every_file(self):
        sample = source_sample()
        assert len(sample) == len(SOURCE_FILES)
        assert all(b"    " in text and len(text) > 1000 for text in sample)


class TestWhatItKnows:
    """Limits, not records: another Python's topics and source differ from those that the card's figures are for."""

    def test_it_has_learnt_the_prose_of_the_documentation(self, perplexity):
        assert perplexity["prose"] < 5  # a uniform guess: 256; the bytes' own frequencies: about 20

    def test_source_is_a_domain_still_to_be_learnt(self, perplexity):
        assert 1.5 * perplexity["prose"] < perplexity["source"] < 20

    def test_the_card_states_the_perplexity_on_prose(self, perplexity):
        card = (BASE / "README.md").read_text(encoding="utf-8")
        if f"Python {platform.python_version()}" not in card:
            pytest.skip("the card's figures are for the texts of another Python")
        (row,) = (line for line in card.splitlines() if line.startswith("| held-back"))
        stated = float(row.split("|")[3])
        # Three decimals are printed; another CPU sums in another order.
        assert perplexity["prose"] == pytest.approx(stated, abs=2e-3)

    def test_a_uniform_model_is_measured_as_uniform(self, model):
        class Uniform(torch.nn.Module):
            def forward(self, input_ids, use_cache):
                return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 256)})

        texts = [b"some text", b"x" * 700, b"", b"y"]
        assert math.exp(train_base.loss_per_byte(Uniform(), texts)) == pytest.approx(256)


class TestTheScript:
    def test_writes_a_folder_that_loads(self, tmp_path, threads_restored, little_text, capsys):
        out = tmp_path / "new" / "base"
        train_base.main(["--steps", "2", "--threads", "1", "--out", str(out)])
        assert {path.name for path in out.iterdir()} == FILES
        assert os.listdir(out.parent) == ["base"]
        assert stat.S_IMODE((out / "model.safetensors").stat().st_mode) == 0o644
        loaded = AutoModelForCausalLM.from_pretrained(out)
        assert loaded(torch.tensor([AutoTokenizer.from_pretrained(out)("def").input_ids])).logits.shape == (1, 3, 259)
        with (out / "train_log.csv").open() as file:
            (row,) = csv.DictReader(file)
        assert row["step"] == "2"
        # Two steps are better than the random start, whose loss is the uniform one or more.
        assert float(row["val_loss"]) < math.log(259)
        assert "step     2/2" in capsys.readouterr().out
        assert json.loads((out / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]

    def test_repeats_itself_bit_for_bit_from_the_same_seed(self, threads_restored, little_text):
        torch.set_num_threads(1)
        runs = []
        for seed in (3, 3, 4):
            torch.manual_seed(seed)
            model = train_base.untrained_model()
            train_base.train(model, steps=3, seed=seed)
            runs.append(torch.cat([parameter.detach().flatten() for parameter in model.parameters()]))
        assert torch.equal(runs[0], runs[1])
        assert not torch.equal(runs[0], runs[2])

    def test_keeps_the_weights_of_the_lowest_validation_loss(self, little_text, monkeypatch):
        monkeypatch.setattr(train_base, "VALIDATE_EVERY", 1)
        seen: list[torch.Tensor] = []

        def worse_each_time(model, _):  # asked twice a step: validation text, then source
            seen.append(model.lm_head.weight.detach().clone())
            return float(len(seen))

        monkeypatch.setattr(train_base, "loss_per_byte", worse_each_time)
        model = train_base.untrained_model()
        rows = train_base.train(model, steps=2, seed=0)
        assert [row["val_loss"] for row in rows] == [1, 3]
        assert torch.equal(model.lm_head.weight, seen[0])
        assert not torch.equal(model.lm_head.weight, seen[-1])

    def test_keeps_the_folder_that_is_there_unless_asked(self, tmp_path, capsys, threads_restored):
        (tmp_path / "precious").touch()
        with pytest.raises(SystemExit) as stop:
            train_base.main(["--steps", "1", "--out", str(tmp_path)])
        assert stop.value.code == 2
        message = capsys.readouterr().err
        assert str(tmp_path) in message
        assert "--overwrite" in message
        assert [path.name for path in tmp_path.iterdir()] == ["precious"]

    @pytest.mark.parametrize("failure", [OSError("No space left on device"), KeyboardInterrupt()])
    def test_leaves_the_old_folder_whole_when_it_fails(self, tmp_path, monkeypatch, failure):
        old = tmp_path / "base"
        old.mkdir()
        (old / "config.json").write_text("old")

        def fail(*_, **__):
            raise failure

        monkeypatch.setattr(train_base, "train", lambda *_: [])
        monkeypatch.setattr(train_base, "save_file", fail)
        with pytest.raises(type(failure)):
            train_base.train_base(old, overwrite=True)
        assert (old / "config.json").read_text() == "old"
        assert os.listdir(tmp_path) == ["base"]

    def test_replaces_the_folder_when_asked(self, tmp_path):
        old, new = tmp_path / "base", tmp_path / ".base-new"
        for folder in (old, new):
            folder.mkdir()
            (folder / folder.name).touch()
        train_base.publish(new, old, overwrite=True)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["base", "base/.base-new"]

    def test_keeps_a_folder_that_appeared_during_the_run(self, tmp_path, monkeypatch):
        out = tmp_path / "base"

        def meanwhile(*_):
            out.mkdir()
            (out / "precious").touch()

        monkeypatch.setattr(train_base, "train", meanwhile)
        monkeypatch.setattr(train_base, "write_log", lambda *_: None)
        monkeypatch.setattr(train_base, "model_card", lambda *_: "")
        with pytest.raises(FileExistsError, match="--overwrite"):
            train_base.train_base(out)
        assert [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*")] == ["base", "base/precious"]

    def test_puts_the_old_folder_back_if_the_new_one_cannot_be_moved(self, tmp_path):
        old = tmp_path / "base"
        old.mkdir()
        with pytest.raises(OSError):
            train_base.publish(tmp_path / "never-written", old, overwrite=True)
        assert os.listdir(tmp_path) == ["base"]

    def test_refuses_a_run_of_no_steps(self, tmp_path, capsys, threads_restored):
        with pytest.raises(SystemExit):
            train_base.main(["--steps", "0", "--out", str(tmp_path / "base")])
        assert "at least 1 step" in capsys.readouterr().err
        assert list(tmp_path.iterdir()) == []

    def test_is_described_by_its_help(self, capsys):
        with pytest.raises(SystemExit) as stop:
            train_base.main(["--help"])
        assert stop.value.code == 0
        assert "--overwrite" in capsys.readouterr().out


def test_the_path_is_a_folder_inside_the_package():
    assert isinstance(BASE, Path)
    assert BASE.parent == Path(lightning_lora.embedded.__file__).parent
