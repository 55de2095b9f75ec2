"""llama.cpp's own server, asked by a certificate whether it applies an adapter of SmolLM2."""

from __future__ import annotations

import json
import urllib.request
from collections.abc import Callable
from pathlib import Path

import pytest

from lightning_lora import make_certificate, verify_server
from tests.rewriting import llama_cpp
from tests.rewriting.smollm2_llama import MARKS, Trial, trial

pytestmark = [*MARKS, pytest.mark.skipif(not llama_cpp.SERVER.exists(), reason=llama_cpp.ABSENT)]


@pytest.fixture(scope="module")
def smol(tmp_path_factory) -> Trial:
    made = trial(tmp_path_factory.mktemp("smollm2"))
    make_certificate(made.model, made.tokenizer, made.folder).write(made.folder)
    return made


@pytest.fixture(scope="module")
def another(tmp_path_factory) -> Path:
    return trial(tmp_path_factory.mktemp("another"), seed=2).converted


OPTIONS: dict[str, tuple[Callable[[Trial, Path], list[str]], set[str]]] = {
    "applied": (lambda t, other: ["--lora", str(t.converted)], {"same"}),
    "left out": (lambda t, other: [], {"ignored"}),
    "scaled by a half": (lambda t, other: ["--lora-scaled", f"{t.converted}:0.5"], {"scaled"}),
    # Twice an adapter of this size changes the answers in another direction, and not only twice as much.
    "scaled by two": (lambda t, other: ["--lora-scaled", f"{t.converted}:2.0"], {"scaled", "another"}),
    "another adapter": (lambda t, other: ["--lora", str(other)], {"another"}),
}


@pytest.mark.parametrize(("options", "verdicts"), OPTIONS.values(), ids=OPTIONS)
def test_the_server_is_found_to_do_what_its_options_say(options, verdicts, smol, another):
    with llama_cpp.serving(smol.packed, *options(smol, another)) as address:
        report = verify_server(address, smol.folder)
    assert report.verdict in verdicts, str(report)


def test_a_scale_that_is_set_while_it_runs_is_found_at_once(smol):
    """The server answers from what it computed at the scale before, unless it is told not to (cache_prompt)."""
    with llama_cpp.serving(smol.packed, "--lora", str(smol.converted)) as address:
        for scale, verdict in ((1.0, "same"), (0.0, "ignored"), (0.5, "scaled"), (1.0, "same")):
            body = json.dumps([{"id": 0, "scale": scale}]).encode()
            request = urllib.request.Request(f"{address}/lora-adapters", body, {"Content-Type": "application/json"})
            with urllib.request.urlopen(request, timeout=60):
                pass
            report = verify_server(address, smol.folder)
            assert report.verdict == verdict, f"scale {scale}: {report}"


@pytest.mark.parametrize(("applied", "verdict"), [(True, "same"), (False, "ignored")])
def test_the_base_is_not_asked_for_since_the_server_answers_to_any_name(applied, verdict, smol):
    with llama_cpp.serving(smol.packed, *(["--lora", str(smol.converted)] if applied else [])) as address:
        report = verify_server(address, smol.folder, name="pirate", base_name="base")
    assert report.verdict == verdict, str(report)
    assert report.any_name
