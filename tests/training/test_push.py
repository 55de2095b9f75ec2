"""Pushing while training goes on: nothing blocks it, changes it or kills it, and the Hub gets what matters."""

from __future__ import annotations

import copy
import importlib
import json
import os
import pickle
import shlex
import signal
import subprocess
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from hanging import PATIENCE, no_hang
from huggingface_hub.utils import _http, are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
from lightning.pytorch.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging
from safetensors.torch import load

from lightning_lora import Card, HubPush, LoRACallback, LoRAConfig, load_from_checkpoint, push_adapter
from lightning_lora.engine import adapter_state_dict
from lightning_lora.errors import ConfigError, HubAccessError, HubNotFoundError, HubUnavailableError
from lightning_lora.hub import client as calls
from lightning_lora.training import push_queue as background
from lightning_lora.training.curve import curve_picture
from tests.hub_server import HubServer
from tests.hub_server.plugin import hub

from . import hub_soak
from .lit import Lit, trainer

__all__ = ["hub"]
pytestmark = [
    pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning"),  # httpx, of the client's way to upload
    # Connections on which the server hangs are left to themselves.
    pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:Exception ignored in. <socket:pytest.PytestUnraisableExceptionWarning"),
]
REPO = "user/run"
FILES = ["README.md", "adapter_config.json", "adapter_model.safetensors"]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(calls, "WAITS", (0.01,) * 5)
    monkeypatch.setattr(background, "LINGER", 0.2)
    monkeypatch.setattr(background, "BACK_OFF", 0.01)
    monkeypatch.setattr(_http, "time", types.SimpleNamespace(**{**vars(time), "sleep": lambda seconds: None}))


class Calls(pl.Callback):
    """Calls a function after the validation of each epoch, when its checkpoint was saved."""

    def __init__(self, function: Callable[[pl.Trainer], Any]) -> None:
        self.function = function

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.function(trainer)


def checkpoints(folder: Path, **settings: Any) -> ModelCheckpoint:
    return ModelCheckpoint(folder, **{"monitor": "val_loss", "save_top_k": -1, "save_last": True, **settings})


def titles(hub: HubServer, revision: str = "main") -> list[str]:
    """From the oldest to the newest, without the one that made the repository; checks that each is whole."""
    commits = hub.commits(REPO, revision)
    for commit, parent in zip(commits, [*commits[1:], None]):
        assert commit.parent == (parent and parent.oid)
        if parent is not None:
            assert set(FILES) <= set(commit.files)
            assert all("lora_" in key for key in load(commit.files[FILES[2]].content)), "no base weight"
    return [commit.title for commit in reversed(commits)][1:]


def steps(hub: HubServer) -> list[int]:
    return [int(title.split()[1].rstrip(":")) for title in titles(hub)]


def wait_for(condition: Callable[[], bool]) -> None:
    with no_hang():
        while not condition():
            time.sleep(0.01)


# What arrives.


def test_each_checkpoint_and_the_end_are_one_commit_each(hub: HubServer, tmp_path: Path) -> None:
    saved = checkpoints(tmp_path)
    each_arrives = Calls(lambda trainer: wait_for(lambda: len(titles(hub)) > trainer.current_epoch - 1))
    callback = LoRACallback(rank=2, push=HubPush(REPO, tag_checkpoints=True))
    module = Lit()
    trainer(callback, each_arrives, saved, max_epochs=3).fit(module)
    assert list(dict.fromkeys(steps(hub))) == [5, 10, 15]  # on a busy machine, the last arrives before the end too
    assert "val_loss" in titles(hub)[0]
    assert titles(hub)[-1].startswith("Step 15 (best so far, final): val_loss")
    message = hub.commits(REPO)[0].message
    assert "epoch: 3" in message
    assert "val_loss: " in message
    assert hub.repo(REPO).private
    assert set(hub.repo(REPO).tags) >= {"step-5", "step-10", "step-15"}
    pushed = load(hub.files(REPO)["adapter_model.safetensors"])
    trained = adapter_state_dict(module)
    assert torch.equal(pushed["base_model.model.0.lora_B.weight"], trained["net.0.lora_B"])
    assert list(hub.files(REPO)) == [*FILES, "training.png"]
    card = hub.files(REPO)["README.md"].decode()
    assert "model-index" in card
    assert "![training curve](training.png)" in card
    assert str(tmp_path) not in card


def test_what_was_pushed_and_what_was_not_and_the_runs_adapter_are_known_by_the_callback(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    callback = LoRACallback(rank=2, push=HubPush(REPO, every="end"))
    assert callback.adapter_folder is None
    assert callback.pushed == callback.unpushed == []
    saved = checkpoints(tmp_path)
    trainer(callback, saved, max_epochs=2).fit(Lit())
    assert [commit.oid for commit in callback.pushed] == [hub.commits(REPO)[0].oid]
    assert callback.unpushed == []
    best = Path(saved.best_model_path)
    assert callback.adapter_folder == best.with_name(f"{best.stem}-adapter")
    assert (callback.adapter_folder / FILES[1]).is_file()

    monkeypatch.setattr(background.BackgroundPusher, "_attempt", lambda self, job: HubUnavailableError("no"))
    again = LoRACallback(rank=2, push=HubPush(REPO, every="end", timeout_at_end=0.5))
    last = ModelCheckpoint(tmp_path / "last", monitor=None)
    trainer(again, last, max_epochs=1).fit(Lit())
    assert again.pushed == []
    (job,) = again.unpushed
    assert job.step == 5
    assert again.adapter_folder is not None
    assert str(again.adapter_folder) == job.source


def test_the_clients_progress_bars_are_afterwards_as_their_user_set_them(hub: HubServer, tmp_path: Path) -> None:
    states = importlib.import_module("huggingface_hub.utils.tqdm").progress_bar_states
    before = dict(states)
    disable_progress_bars("peft.mine")
    mine = dict(states)
    try:
        callback = LoRACallback(rank=2, push=HubPush(REPO))
        trainer(callback, checkpoints(tmp_path), max_epochs=1).fit(Lit())
        assert callback.pushed
        assert states == mine
        with calls.without_progress_bars():
            assert are_progress_bars_disabled()
            enable_progress_bars("peft")  # the user, meanwhile
            theirs = dict(states)
        assert states == theirs
    finally:
        states.clear()
        states.update(before)


@pytest.mark.parametrize("save_adapter", [True, False])
def test_the_final_adapter_is_pushed_where_no_checkpoint_is_saved_at_the_end(
    hub: HubServer, tmp_path: Path, save_adapter: bool
) -> None:
    saved = checkpoints(tmp_path, monitor=None, every_n_train_steps=4, save_last=False)
    module = Lit()
    callback = LoRACallback(rank=2, push=HubPush(REPO), save_adapter=save_adapter)
    trainer(callback, saved, max_epochs=1).fit(module)
    assert steps(hub)[-1] == 5
    pushed = load(hub.files(REPO)["adapter_model.safetensors"])
    assert torch.equal(pushed["base_model.model.0.lora_B.weight"], adapter_state_dict(module)["net.0.lora_B"])


class Doubles(pl.Callback):
    """Changes the weights in one of the hooks after the last step, through `.data`, as libraries of averages do."""

    def __init__(self, hook: str) -> None:
        setattr(self, hook, self.double)

    def double(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for parameter in pl_module.parameters():
            if parameter.requires_grad:
                parameter.data.mul_(2)


class SavesItsOwn(pl.Callback):
    """Puts another state dict into every checkpoint, and none into the module."""

    def on_save_checkpoint(self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict) -> None:
        checkpoint["state_dict"] = {name: 3 * value for name, value in checkpoint["state_dict"].items()}


@pytest.mark.parametrize("every", ["checkpoint", "end"])
@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize(
    "changing",
    [
        lambda: StochasticWeightAveraging(swa_lrs=0.5, swa_epoch_start=1),
        lambda: EMAWeightAveraging(decay=0.5),
        lambda: Doubles("on_train_end"),
        lambda: Doubles("on_fit_end"),
        SavesItsOwn,
    ],
)
def test_the_final_adapter_is_what_a_checkpoint_saved_after_the_run_holds(
    hub: HubServer, tmp_path: Path, changing: Callable[[], pl.Callback], is_first: bool, every: Any
) -> None:
    module, saved = Lit(), checkpoints(tmp_path / "saved")
    lora = LoRACallback(rank=2, push=HubPush(REPO, every=every))
    both = [changing(), lora] if is_first else [lora, changing()]
    run = trainer(*both, saved, max_epochs=3)
    run.fit(module)
    run.save_checkpoint(tmp_path / "after.ckpt")
    after = torch.load(tmp_path / "after.ckpt", weights_only=True)["state_dict"]
    pushed = load(hub.files(REPO)["adapter_model.safetensors"])
    assert len(after) == len(pushed) > 0
    for name, tensor in after.items():
        where, factor = name.rsplit(".", 1)
        assert torch.equal(pushed[f"base_model.model.{where.removeprefix('net.')}.{factor}.weight"], tensor)
    *_, best_or_earlier, final = ["", *titles(hub)]
    assert "final" in final
    folder = load((Path(f"{saved.last_model_path.removesuffix('.ckpt')}-adapter") / FILES[2]).read_bytes())
    if any(not torch.equal(pushed[name], folder[name]) for name in folder):  # nothing was measured of the final one
        assert "val_loss" not in final
        assert "best" not in final
        assert every == "end" or "val_loss" in best_or_earlier


def test_of_those_that_wait_the_newest_the_best_and_the_final_one_are_pushed(hub: HubServer, tmp_path: Path) -> None:
    gate = hub.fail(503, path="/revision/main", times=10_000)
    losses = iter([0.5, 0.1, 0.4, 0.3, 0.2])

    class Scripted(Lit):
        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", torch.tensor(self.value))

        def on_validation_epoch_start(self) -> None:
            self.value = next(losses) if not self.trainer.sanity_checking else 9.0

    def open_at_the_end(trainer: pl.Trainer) -> None:
        if trainer.current_epoch == 4:
            gate.times = 0

    saved = checkpoints(tmp_path)
    trainer(LoRACallback(rank=2, push=HubPush(REPO)), Calls(open_at_the_end), saved, max_epochs=5).fit(Scripted())
    assert steps(hub) == [10, 25]
    assert "(best so far): val_loss 0.1" in titles(hub)[0]
    assert "best so far | step 10" in hub.files(REPO)["README.md"].decode()


def test_only_the_best_ones_are_pushed_where_that_is_asked_for(hub: HubServer, tmp_path: Path) -> None:
    callback = LoRACallback(rank=2, push=HubPush(REPO, every="best"))
    saved = checkpoints(tmp_path, mode="max")  # so that the first is the best
    trainer(callback, saved, max_epochs=3).fit(Lit())
    assert steps(hub) == [5]


def test_only_the_end_is_pushed_where_that_is_asked_for(hub: HubServer, tmp_path: Path) -> None:
    callback = LoRACallback(rank=2, push=HubPush(REPO, every="end"))
    trainer(callback, checkpoints(tmp_path), max_epochs=3).fit(Lit())
    assert steps(hub) == [15]


def test_pull_requests_take_all_commits_of_a_run(hub: HubServer, tmp_path: Path) -> None:
    arrived = Calls(
        lambda trainer: wait_for(lambda: bool(hub.repo(REPO).pull_requests)) if trainer.current_epoch else None
    )
    callback = LoRACallback(rank=2, push=HubPush(REPO, create_pr=True))
    trainer(callback, arrived, checkpoints(tmp_path), max_epochs=3).fit(Lit())
    assert list(hub.repo(REPO).pull_requests) == [1]
    assert titles(hub) == []
    assert len(titles(hub, "refs/pr/1")) >= 2


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
def test_a_pushed_checkpoint_resumes_the_run(hub: HubServer, tmp_path: Path) -> None:
    whole, half, resumed = Lit(), Lit(), Lit()
    pl.seed_everything(3, verbose=False)
    trainer(LoRACallback(rank=2), checkpoints(tmp_path / "whole"), max_epochs=4).fit(whole)
    pl.seed_everything(3, verbose=False)
    push = HubPush(REPO, push_checkpoints=True, tag_checkpoints=True)
    trainer(LoRACallback(rank=2, push=push), checkpoints(tmp_path / "half"), max_epochs=2).fit(half)
    for reference in (f"hf://{REPO}@step-10", f"hf://{REPO}"):
        resumed = Lit()
        trainer(LoRACallback(rank=2), checkpoints(tmp_path / "half"), max_epochs=4).fit(resumed, ckpt_path=reference)
        assert torch.equal(torch.stack(resumed.losses), torch.stack(whole.losses[10:]))
        loaded, ends = load_from_checkpoint(Lit, reference), half.state_dict()
        assert all(torch.equal(value, ends[name]) for name, value in loaded.state_dict().items())
    with pytest.raises(HubNotFoundError, match=r"adapter_config\.json"):
        trainer(LoRACallback(rank=2), max_epochs=4).fit(Lit(), ckpt_path=f"hf://{REPO}/other.ckpt")


# What does not change.


def test_losses_and_random_states_are_the_same_bits_with_and_without(hub: HubServer, tmp_path: Path) -> None:
    def run(push: HubPush | None) -> tuple[Any, ...]:
        pl.seed_everything(7, verbose=False)
        module = Lit()
        arrives = Calls(lambda trainer: push and wait_for(lambda: len(titles(hub)) > trainer.current_epoch - 1))
        trainer(LoRACallback(rank=2, push=push), arrives, checkpoints(tmp_path / str(push is None)), max_epochs=3).fit(
            module
        )
        return torch.stack(module.losses), torch.get_rng_state(), np.random.get_state()[1].tolist()

    with_push, without = run(HubPush(REPO)), run(None)
    assert len(titles(hub)) > 1
    assert torch.equal(with_push[0], without[0])
    assert torch.equal(with_push[1], without[1])
    assert with_push[2] == without[2]


def test_training_never_waits_for_a_hub_that_hangs(hub: HubServer, tmp_path: Path) -> None:
    fault = hub.fail("hang", path="/preupload/", times=99)
    hangs = Calls(lambda trainer: trainer.current_epoch == 0 or wait_for(lambda: fault.hits == 1))
    push = HubPush(REPO, timeout=3600, timeout_at_end=0.5)
    module = Lit()
    with no_hang():  # for longer than that, where anything waits for the Hub
        trainer(LoRACallback(rank=2, push=push), checkpoints(tmp_path), hangs, max_epochs=3).fit(module)
    assert len(module.losses) == 15
    assert fault.hits == 1, "the first push hangs still"
    assert titles(hub) == []


# Before the first step.


def refused(push: HubPush, error: type[Exception], words: str) -> None:
    module = Lit()
    with pytest.raises(error, match=words):
        trainer(LoRACallback(rank=2, push=push), max_epochs=1).fit(module)
    assert not module.losses


@pytest.mark.parametrize("path", ["/whoami-v2", "/api/repos/create", "/auth-check", "/api/validate-yaml"])
def test_a_connection_that_breaks_before_the_first_step_does_not_end_the_run(
    hub: HubServer, tmp_path: Path, path: str
) -> None:
    faults = [hub.fail("reset", path=path) for _ in range(2)]
    trainer(LoRACallback(rank=2, push=HubPush(REPO)), checkpoints(tmp_path), max_epochs=1).fit(Lit())
    assert [fault.hits for fault in faults] == [1, 1]
    assert set(steps(hub)) == {5}


def test_what_will_not_be_allowed_is_said_before_the_first_step(
    hub: HubServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.create_repo(REPO)
    for token, said in (("hf_wrong", "401"), (hub.read_token, "write access")):
        with monkeypatch.context() as patch:
            patch.setenv("HF_TOKEN", token)
            refused(HubPush(REPO), HubAccessError, said)
    hub.fail(400, path="/api/validate-yaml")
    refused(HubPush(REPO), Exception, "refuses the card")
    hub.fail("hang", path="/auth-check", times=9)
    refused(HubPush(REPO, timeout=0.3), HubUnavailableError, "did not answer within")
    refused(HubPush(REPO, every="best"), ConfigError, "ModelCheckpoint")
    assert titles(hub) == []


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning", "ignore:It is recommended to use `self.log")
def test_under_two_processes_only_the_first_talks(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "LINGER", 3600)  # so that the checkpoint and the end are one commit
    settings = {"devices": 2, "strategy": "ddp_fork", "use_distributed_sampler": False, "max_epochs": 1}
    trainer(LoRACallback(rank=2, push=HubPush(REPO)), checkpoints(tmp_path), **settings).fit(Lit())
    assert len(hub.requested("/whoami-v2")) == 1
    assert steps(hub) == [5]
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    with pytest.raises(Exception, match="401"):
        trainer(LoRACallback(rank=2, push=HubPush(REPO)), **settings).fit(Lit())


@pytest.mark.parametrize(
    "settings",
    [
        {"every": "epoch"},
        {"timeout_at_end": -1},
        {"timeout_at_end": "60"},
        {"repo_id": "a b"},
        {"card": {"datasets": "squad"}},
        {"card": {"license": "mit"}},
        {"card": Card(step=3)},
        {"private": "no"},
    ],
)
def test_settings_that_cannot_be_are_refused_when_they_are_made(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=next(iter(settings))):
        HubPush(**{"repo_id": REPO, **settings})


def test_the_callback_takes_no_other_push() -> None:
    with pytest.raises(ConfigError, match="HubPush"):
        LoRACallback(rank=2, push=REPO)  # type: ignore[arg-type]


def test_callbacks_that_push_can_be_copied_and_pickled(hub: HubServer, tmp_path: Path) -> None:
    callback = LoRACallback(LoRAConfig(rank=2), push=HubPush(REPO))
    trainer(callback, max_epochs=1).fit(Lit())
    for again in (copy.deepcopy(callback), pickle.loads(pickle.dumps(callback))):
        trainer(again, max_epochs=1).fit(Lit())


def test_a_fast_dev_run_does_not_touch_the_hub(hub: HubServer) -> None:
    trainer(LoRACallback(rank=2, push=HubPush(REPO)), fast_dev_run=True).fit(Lit())
    trainer(LoRACallback(rank=2, push=HubPush(REPO))).validate(Lit(), verbose=False)
    assert not hub.requests


# What could not be pushed.


def said(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelname == "ERROR"]


def test_what_was_not_pushed_is_said_with_the_command_that_pushes_it(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    fault = hub.fail(403, path="/commit/", times=99)
    module = Lit()
    trainer(LoRACallback(rank=2, push=HubPush(REPO)), checkpoints(tmp_path), max_epochs=2).fit(module)
    assert 1 <= fault.hits <= 3, "each checkpoint and the end"
    (message,) = said(caplog)
    assert "403" in message
    command = shlex.split(message.rpartition("Push it with: ")[2])
    assert command[:2] == ["lightning-lora", "push"]
    settings = dict(part.split("=", 1) for part in command[2:])
    fault.times = 0
    push_adapter(settings["adapter"].strip("'"), settings["repo_id"])
    pushed = load(hub.files(REPO)["adapter_model.safetensors"])
    assert torch.equal(pushed["base_model.model.0.lora_B.weight"], adapter_state_dict(module)["net.0.lora_B"])


def test_what_was_not_pushed_is_kept_where_its_folder_is_gone(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hub.fail(403, path="/commit/", times=99)
    callback = LoRACallback(rank=2, push=HubPush(REPO), save_adapter=False)
    trainer(callback, max_epochs=1, default_root_dir=tmp_path).fit(Lit())
    assert f"adapter={tmp_path}/step5-not-pushed-adapter" in said(caplog)[0]
    assert push_adapter(tmp_path / "step5-not-pushed-adapter", REPO, dry_run=True)


def test_a_hub_that_comes_back_gets_what_waited(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(background, "LINGER", 3600)  # what waits is pushed at the end
    hub.fail("reset", path="/revision/", times=3)
    hub.fail("lost_response", path="/commit/", times=1)
    trainer(LoRACallback(rank=2, push=HubPush(REPO)), checkpoints(tmp_path), max_epochs=2).fit(Lit())
    assert steps(hub) == [10]


@pytest.mark.parametrize(
    ("status", "path"), [(401, "/revision/main"), (403, "/preupload/"), (404, "/commit/"), (401, "/commit/")]
)
def test_a_refusal_in_mid_run_is_tried_again_with_the_next_checkpoint(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture, status: int, path: str
) -> None:
    fault = hub.fail(status, path=path, times=1)
    each_arrives = Calls(
        lambda trainer: (
            trainer.current_epoch == 0
            or wait_for(lambda: fault.hits == 1 and len(titles(hub)) >= trainer.current_epoch - 1)
        )
    )
    callback = LoRACallback(rank=2, push=HubPush(REPO))
    trainer(callback, each_arrives, checkpoints(tmp_path), max_epochs=4).fit(Lit())
    assert steps(hub)[-1] == 20
    assert steps(hub)[0] <= 10
    assert [job.step for job in callback.unpushed] == ([] if status != 404 else [5])  # which is no refusal of the token
    warnings = [r.getMessage() for r in caplog.records if "tried again with the next checkpoint" in r.getMessage()]
    assert len(warnings) == (status != 404)


def test_the_end_is_pushed_with_the_token_of_that_moment(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    token = os.environ["HF_TOKEN"]

    def expires_and_is_renewed(trainer: pl.Trainer) -> None:
        if trainer.current_epoch == 0:
            monkeypatch.setenv("HF_TOKEN", "hf_expired")
        if trainer.current_epoch == 2:
            monkeypatch.setenv("HF_TOKEN", token)

    callback = LoRACallback(rank=2, push=HubPush(REPO, every="end"))
    renewed = Calls(expires_and_is_renewed)
    trainer(callback, renewed, checkpoints(tmp_path), max_epochs=3).fit(Lit())
    assert steps(hub) == [15]
    always = LoRACallback(rank=2, push=HubPush(REPO))
    trainer(always, renewed, checkpoints(tmp_path / "two"), max_epochs=3).fit(Lit())
    assert titles(hub)[-1].startswith("Step 15")
    assert always.unpushed == []


def test_an_adapter_that_cannot_be_pushed_does_not_end_the_run(
    hub: HubServer, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Diverges(Lit):
        def on_train_batch_end(self, *_: Any) -> None:
            with torch.no_grad():
                self.net[0].lora_A.fill_(float("nan"))

    trainer(LoRACallback(rank=2, push=HubPush(REPO)), checkpoints(tmp_path), max_epochs=1).fit(Diverges())
    assert "not finite" in said(caplog)[0]
    assert titles(hub) == []


# Ends that nobody planned.


def test_after_an_exception_what_was_saved_is_pushed(hub: HubServer, tmp_path: Path) -> None:
    class Fails(Lit):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 2:
                raise RuntimeError("out of something")

    with pytest.raises(RuntimeError, match="out of something"):
        trainer(LoRACallback(rank=2, push=HubPush(REPO)), checkpoints(tmp_path), max_epochs=5).fit(Fails())
    assert steps(hub)[-1] == 10


def start(hub: HubServer, tmp_path: Path, *, epochs: int = 100, seconds: float = 0.1) -> subprocess.Popen[str]:
    root = Path(__file__).parents[2]
    environment = {**os.environ, **hub.environment(tmp_path / "home"), "PYTHONPATH": str(root)}
    arguments = [hub.endpoint, str(tmp_path / "checkpoints"), str(epochs), str(seconds)]
    return subprocess.Popen(
        [sys.executable, "-m", "tests.training.pushing_run", *arguments],
        cwd=tmp_path,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_the_run_with_its_last_checkpoint_on_the_hub(
    hub: HubServer, tmp_path: Path, number: signal.Signals
) -> None:
    process = start(hub, tmp_path)
    wait_for(lambda: ("model", REPO) in hub.repositories and len(titles(hub)) >= 1)
    hub.fail("lost_response", path="/commit/")
    process.send_signal(number)
    output, _ = process.communicate(timeout=PATIENCE)
    assert "done" not in output
    newest = max((tmp_path / "checkpoints").glob("*-adapter"), key=lambda path: path.stat().st_mtime)
    assert steps(hub) == sorted(set(steps(hub)))
    assert hub.files(REPO)["adapter_model.safetensors"] == (newest / "adapter_model.safetensors").read_bytes()


@pytest.mark.slow
def test_a_hub_that_hangs_does_not_hold_the_exit_of_the_process(hub: HubServer, tmp_path: Path) -> None:
    hub.fail("hang", path="/lfs/|/commit/", times=999)
    process = start(hub, tmp_path, epochs=2, seconds=0)
    wait_for(lambda: bool(hub.requested("/lfs/")))
    # The server hangs for an hour; the run was told to wait for 5 s.
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0
    assert "done" in output
    assert "Push it with: lightning-lora push " in output


@pytest.mark.slow
@pytest.mark.parametrize("path", ["/lfs/", "/commit/"])
def test_a_run_that_is_killed_in_mid_push_leaves_a_history_to_go_on_from(
    hub: HubServer, tmp_path: Path, path: str
) -> None:
    hub.fail("hang", path=path, after=2)
    process = start(hub, tmp_path)
    wait_for(lambda: any(fault.hits for fault in hub.faults))
    process.kill()
    process.communicate(timeout=PATIENCE)
    before = titles(hub)
    newest = max((tmp_path / "checkpoints").glob("*-adapter"), key=lambda folder: folder.stat().st_mtime)
    push_adapter(newest, REPO, message="Step 999: by hand")
    assert titles(hub) == [*before, "Step 999: by hand"]
    assert json.loads(hub.files(REPO)["adapter_config.json"])["r"] == 2


@pytest.mark.parametrize("revision", ["", "@main", "@it"])
def test_a_run_starts_from_an_adapter_on_the_hub_at_its_revision(
    hub: HubServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, revision: str
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    module = Lit()
    trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
    commit = push_adapter(module, REPO)
    hub.repo(REPO).tags["it"] = commit.oid if hasattr(commit, "oid") else commit
    first = {name: t.clone() for name, t in adapter_state_dict(module).items()}
    if revision == "@it":  # the branch has gone on since
        trainer(LoRACallback(rank=2), max_epochs=1).fit(module)
        push_adapter(module, REPO)
    started = Lit(lr=0.0)
    trainer(LoRACallback(adapter=f"{REPO}{revision}", rank=2), max_epochs=1).fit(started)
    assert all(t.equal(first[name]) for name, t in adapter_state_dict(started).items())
    with pytest.raises(HubNotFoundError):
        trainer(LoRACallback(adapter=f"{REPO}@nothing"), max_epochs=1).fit(Lit())


@pytest.mark.slow
@pytest.mark.usefixtures("hub")  # the client is online with it; the Hub that fails is another
def test_a_hub_that_fails_in_every_way_for_long_changes_no_loss_and_fills_nothing(tmp_path: Path) -> None:
    outcome = hub_soak.run(tmp_path, epochs=120)
    assert outcome.is_same
    assert sum(count > 0 for count in outcome.faults.values()) > 5
    # What hangs is let go of: at most so many calls at a time, each with its connection, and one that is made just now;
    # the thread that pushes, and a connection or two that the client keeps.
    most = calls._MOST_LEFT + 2
    assert outcome.late.threads <= outcome.before.threads + most
    assert outcome.late.files <= outcome.before.files + most + 8
    # The copies that wait, that are on their way, and that are kept of those that the Hub refused: the newest, the best
    # and the final one of each.
    assert outcome.late.temporary <= 9 * len(FILES)


def test_the_curve_is_a_picture_once_there_are_two_points() -> None:
    assert curve_picture([(1, {"val_loss": 1.0})]) is None
    picture = curve_picture([(1, {"val_loss": 1.0, "val_acc": 0.1}), (2, {"val_loss": 0.5, "val_acc": float("inf")})])
    assert picture is not None
    assert picture.startswith(b"\x89PNG")
