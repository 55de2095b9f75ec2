"""A certificate tells from the answers of a server alone whether it applies the adapter."""

from __future__ import annotations

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from lightning_lora import (
    LoRAConfig,
    inject,
    load_adapter,
    make_certificate,
    pull_adapter,
    push_adapter,
    save_adapter,
    verify_server,
)
from lightning_lora.analysis.certificate import WORDS, prompt_texts
from lightning_lora.embedded import BASE
from lightning_lora.engine import adapters
from lightning_lora.errors import AdapterFormatError, AdapterStateError, BaseMismatchError, ConfigError
from lightning_lora.format.certificate import CERTIFICATE, read_certificate
from tests.hub.models import edit_config
from tests.hub_server import HubServer


def base(dtype: torch.dtype = torch.float32) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype).eval()


def saved(folder: Path, seed: int = 1, size: float = 0.2) -> Path:
    model = base()
    inject(model, LoRAConfig(rank=4, alpha=8))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_A.copy_(torch.randn(layer.lora_A.shape, generator=generator))
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
            layer.lora_B.mul_(size * layer._parameters["weight"].norm() / layer.delta_weight().norm())
    return save_adapter(model, folder)


def loaded(folder: Path, dtype: torch.dtype = torch.float32) -> nn.Module:
    model = base(dtype)
    load_adapter(model, folder)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = saved(tmp_path_factory.mktemp("served") / "adapter")
    make_certificate(loaded(folder), AutoTokenizer.from_pretrained(BASE), folder).write(folder)
    return folder


class Server(ThreadingHTTPServer):
    """OpenAI's two routes over models of transformers; `layout` is how the log-probabilities are laid out."""

    daemon_threads = True

    def __init__(self, models: dict[str, nn.Module], layout: str, key: str | None) -> None:
        self.models, self.layout, self.key = models, layout, key
        self.tokenizer = AutoTokenizer.from_pretrained(BASE)
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if self.layout == "strict" and "cache_prompt" in body:
            return 400, {"error": "Extra inputs are not permitted: cache_prompt"}
        first = next(iter(self.models))
        model = self.models.get(first if self.layout == "any name" else body.get("model", first))
        if model is None:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        if path == "/v1/completions" and self.layout != "chat":
            ids = body["prompt"]
        elif path == "/v1/chat/completions" and self.layout == "chat":
            ids = self.tokenizer.apply_chat_template(body["messages"], add_generation_prompt=True, return_dict=False)
        else:
            return 404, {"error": "no such route"}
        with torch.no_grad():
            best = model(input_ids=torch.tensor([ids])).logits[0, -1].float().log_softmax(-1).topk(5)
        pairs = list(zip(best.indices.tolist(), best.values.tolist()))
        if self.layout == "legacy":
            said: Any = {"top_logprobs": [{self.tokenizer.decode([i]): value for i, value in pairs}]}
        elif self.layout == "none":
            said = None
        else:
            entries = [{"id": i, "token": self.tokenizer.decode([i]), "logprob": value} for i, value in pairs]
            said = {"content": [{**entries[0], "top_logprobs": entries}]}
        return 200, {"choices": [{"logprobs": said}]}


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        key = self.server.key
        if key is not None and self.headers.get("Authorization") != f"Bearer {key}":
            status, answer = 401, {"error": "no key"}
        else:
            status, answer = self.server.answer(self.path, body)
        content = json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@contextmanager
def serving(models: dict[str, nn.Module], layout: str = "legacy", key: str | None = None) -> Iterator[str]:
    server = Server(models, layout, key)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield server.address
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def changed(change: Callable[[int, Any], None]) -> Callable[[Path], nn.Module]:
    """`change` is called with the number and the layer of each adapted layer."""

    def make(folder: Path) -> nn.Module:
        model = loaded(folder)
        with torch.no_grad():
            for number, (_, layer) in enumerate(adapters(model)):
                change(number, layer)
        return model

    return make


def another(folder: Path) -> nn.Module:
    return loaded(saved(folder.parent / "another", seed=2))


SERVED: dict[str, tuple[Callable[[Path], nn.Module], set[str]]] = {
    "float32": (loaded, {"same"}),
    "bfloat16": (lambda f: loaded(f, torch.bfloat16), {"same"}),
    "ignored": (lambda f: base(), {"ignored"}),
    "ignored, in bfloat16": (lambda f: base(torch.bfloat16), {"ignored"}),
    "alpha doubled": (changed(lambda i, m: m.lora_B.mul_(2)), {"scaled"}),
    "alpha halved": (changed(lambda i, m: m.lora_B.mul_(0.5)), {"scaled"}),
    # A half of an adapter may change the answers in nearly the same direction, or in another one.
    "half of the layers": (changed(lambda i, m: m.lora_B.mul_(i % 2)), {"scaled", "another"}),
    "another adapter": (another, {"another"}),
    "subtracted": (changed(lambda i, m: m.lora_B.neg_()), {"another"}),
}


@pytest.mark.parametrize(("make", "verdicts"), SERVED.values(), ids=SERVED)
def test_the_answers_of_a_server_show_whether_it_applies_the_adapter(make, verdicts, folder):
    with serving({"legal": make(folder)}) as address:
        report = verify_server(address, folder, name="legal")
    assert report.verdict in verdicts, str(report)
    assert report.ok == (verdicts == {"same"})


@pytest.mark.parametrize("layout", ["legacy", "content", "chat", "strict"])
def test_each_layout_of_log_probabilities_is_read(layout, folder):
    with serving({"base": base(), "legal": loaded(folder)}, layout) as address:
        report = verify_server(f"{address}/v1/", folder, name="legal", base_name="base")
        assert report.verdict == "same", str(report)
        assert report.distances.adapter < 1e-3
        assert report.base.base < 1e-3
        assert verify_server(address, folder, name="base").verdict == "ignored"
    assert report.route == ("/v1/chat/completions" if layout == "chat" else "/v1/completions")


def test_the_same_numbers_under_both_names_are_an_ignored_adapter_whatever_the_base(folder):
    other = loaded(saved(folder.parent / "other", seed=3, size=0.3))  # as if it were another base
    with serving({"base": other, "legal": other}) as address:
        report = verify_server(address, folder, name="legal", base_name="base")
    assert report.verdict == "ignored"
    assert "is it the same base?" in str(report)


@pytest.mark.parametrize(("make", "verdict"), [(loaded, "same"), (lambda f: base(), "ignored")])
def test_a_server_that_answers_to_any_name_is_judged_by_its_answers_alone(make, verdict, folder):
    with serving({"legal": make(folder)}, "any name") as address:
        report = verify_server(address, folder, name="legal", base_name="base")
    assert report.verdict == verdict, str(report)
    assert "it answers to any name" in str(report)


def test_a_server_that_cannot_be_asked_is_an_error_that_says_why(folder):
    with pytest.raises(ConfigError, match="starts with http"):
        verify_server("localhost:8000", folder)
    with pytest.raises(ConfigError, match="is it running"):
        verify_server("http://127.0.0.1:9", folder, timeout=5)
    with pytest.raises(ConfigError, match="gives no answer that can be read: URL can't contain"):
        verify_server("http://local host", folder)  # an HTTPException of the library, as an answer that is cut off is
    with serving({"legal": base()}, key="secret") as address:
        with pytest.raises(ConfigError, match="status 401"):
            verify_server(address, folder)
        assert verify_server(address, folder, api_key="secret").verdict == "ignored"
        with pytest.raises(ConfigError, match="The model `legl` does not exist"):
            verify_server(address, folder, name="legl", api_key="secret")
    with serving({"legal": base()}, "none") as address, pytest.raises(ConfigError, match="gives no log-probabilities"):
        verify_server(address, folder)


def test_the_certificate_holds_prompts_of_common_words_and_nothing_else(folder):
    certificate = read_certificate(folder)
    assert [p.text for p in certificate.prompts] == prompt_texts()
    assert len(WORDS) > 280
    assert all(word in WORDS for p in certificate.prompts for word in p.text.rstrip("?").split())
    assert (folder / CERTIFICATE).stat().st_size < 40_000
    with torch.no_grad():
        for model, field in ((loaded(folder), "adapter"), (base(), "base")):
            prompt = certificate.prompts[3]
            exact = model(input_ids=torch.tensor([prompt.ids])).logits[0, -1].double().log_softmax(-1)
            for c in prompt.best:
                assert getattr(c, field) == pytest.approx(float(exact[c.id]), abs=1e-4)  # rounded to five digits
            assert set(exact.topk(5).indices.tolist()) <= {c.id for c in prompt.best}


@pytest.fixture
def copy(folder, tmp_path) -> Path:
    for path in folder.iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    return tmp_path


def test_a_damaged_certificate_is_an_error(copy):
    path = copy / CERTIFICATE
    whole = path.read_text()
    for broken, said in {
        whole[: len(whole) // 2]: "damaged",
        whole.replace('"base": -', '"base": -1', 1): "damaged or was edited",
        '{"format": 9, "checksum": ""}': "format 9",
        "[]": "no certificate",
    }.items():
        path.write_text(broken)
        with pytest.raises(AdapterFormatError, match=said):
            read_certificate(copy)
    path.unlink()
    with pytest.raises(AdapterFormatError, match=r"no certificate\.json.*make=true"):
        verify_server("http://127.0.0.1:9", copy)


def test_the_certificate_of_another_adapter_or_base_is_an_error(copy, tmp_path_factory):
    other = saved(tmp_path_factory.mktemp("other") / "adapter", seed=4)
    (other / CERTIFICATE).write_bytes((copy / CERTIFICATE).read_bytes())
    with pytest.raises(AdapterFormatError, match="another adapter, or of an earlier one"):
        read_certificate(other)
    model = base()
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
    inject(model, LoRAConfig(rank=2))
    elsewhere = save_adapter(model, tmp_path_factory.mktemp("elsewhere") / "adapter")
    (elsewhere / CERTIFICATE).write_bytes((copy / CERTIFICATE).read_bytes())
    with pytest.raises(BaseMismatchError, match="fingerprint"):
        read_certificate(elsewhere)


@pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # httpx, of the client's way to upload
def test_a_certificate_goes_to_the_hub_with_its_adapter_and_comes_back(hub: HubServer, copy, tmp_path_factory):
    edit_config(copy, base_model_name_or_path="/a/path/of/mine")  # which a push leaves out
    assert read_certificate(copy).prompts
    push_adapter(copy, "user/adapter")
    assert read_certificate(pull_adapter("user/adapter")) == read_certificate(copy)
    here = pull_adapter("user/adapter", local_dir=tmp_path_factory.mktemp("here"))
    assert read_certificate(here) == read_certificate(copy)
    other = saved(tmp_path_factory.mktemp("other") / "adapter", seed=5)
    (other / CERTIFICATE).write_bytes((copy / CERTIFICATE).read_bytes())
    with pytest.raises(AdapterFormatError, match="certificate of another adapter"):
        push_adapter(other, "user/adapter")


def test_an_adapter_that_no_answer_would_show_gets_no_certificate(tmp_path):
    weak = saved(tmp_path / "weak", size=0.01)
    with pytest.raises(AdapterStateError, match="would show whether it is applied"):
        make_certificate(loaded(weak), AutoTokenizer.from_pretrained(BASE), weak)
    model = loaded(saved(tmp_path / "adapter"))
    with torch.no_grad():
        for _, layer in adapters(model):
            layer.lora_B.zero_()
    with pytest.raises(AdapterStateError, match="not applied"):
        make_certificate(model, AutoTokenizer.from_pretrained(BASE), tmp_path / "adapter")
    assert not math.isnan(float(model.lm_head.weight.sum()))
