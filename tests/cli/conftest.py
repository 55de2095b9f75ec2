"""A folder to work in, and the command line as a function: no test here needs a model or a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from lightning_lora.cli.main import main

THEIRS = [
    "task=custom",
    "task._target_=standin.Regression",
    "data=custom",
    "data._target_=standin.Sums",
    "trainer=cpu",
    "trainer.max_epochs=2",
    "trainer.log_every_n_steps=1",
    "trainer.enable_progress_bar=false",
]


class CommandLine:
    """Calls `lightning-lora` in this process and remembers what it printed."""

    def __init__(self, capfd: pytest.CaptureFixture[str]) -> None:
        self.capfd = capfd
        self.out = self.err = ""

    def __call__(self, *arguments: str) -> int:
        self.capfd.readouterr()
        try:
            status = main(list(arguments))
        except SystemExit as exit:
            status = int(exit.code or 0)
        self.out, self.err = self.capfd.readouterr()
        return status

    def train(self, *arguments: str) -> int:
        """Train the stand-in."""
        return self("train", *THEIRS, *arguments)

    def error(self, *arguments: str) -> str:
        """The message of a command that must fail, checked to be one screen and no traceback."""
        assert self(*arguments) == 2, self.out
        assert "Traceback" not in self.out + self.err
        assert len(self.err.splitlines()) < 25
        assert not Path("runs").exists(), "a run that cannot be leaves no folder"
        return self.err

    @property
    def folder(self) -> Path:
        """The folder of the latest run of the latest command."""
        return max(Path("runs").glob("*/*"), key=lambda path: path.stat().st_mtime)

    @property
    def results(self) -> dict:
        return json.loads((self.folder / "results.json").read_text())


@pytest.fixture
def cli(tmp_path, monkeypatch, capfd) -> CommandLine:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return CommandLine(capfd)
