from __future__ import annotations

import json
import shutil

import pytest
import torch

from lightning_lora.cli.predict import _short, rows


def test_predictions_of_a_run_are_one_line_of_json_for_each_input(cli):
    assert cli.train() == 0
    run = cli.folder
    assert cli("predict", f"run={run}", "trainer.enable_progress_bar=false") == 0
    lines = (cli.folder / "predictions.jsonl").read_text().splitlines()
    assert len(lines) == 32
    assert isinstance(json.loads(lines[0])["prediction"], float)
    assert cli.out.strip().splitlines()[:3] == lines[:3], "the first rows are shown"
    assert "(32 lines)" in cli.out


def test_the_adapter_is_what_makes_the_difference_to_the_bare_base(cli):
    assert cli.train("trainer.max_epochs=5", "optimizer.lr=0.05") == 0
    before, after = cli.results["before"]["val_loss"], cli.results["after"]["val_loss"]
    run = cli.folder
    # The stand-in's own weights are random: the same seed makes the same base.
    for adapter, loss in (("null", before), (run / "adapter", after)):
        assert cli("evaluate", f"run={run}", f"adapter={adapter}") == 0
        metrics = json.loads((cli.folder / "metrics.json").read_text())
        assert abs(metrics["val_loss"] - loss) < 1e-6 * max(1, loss)


@pytest.mark.slow
def test_an_adapter_of_a_later_peft_in_a_folder_of_a_folder_is_taken_by_every_command_alike(cli, tmp_path):
    assert cli.train("trainer.max_epochs=5", "optimizer.lr=0.05") == 0
    run, after = cli.folder, cli.results["after"]["val_loss"]
    place = tmp_path / "many" / "one"
    shutil.copytree(run / "adapter", place)
    config = json.loads((place / "adapter_config.json").read_text())
    (place / "adapter_config.json").write_text(json.dumps({**config, "of_tomorrow": 3}))
    at = ["adapter=many", "subfolder=one"]
    for command in ("evaluate", "predict"):
        assert cli(command, f"run={run}", *at) == 2
        assert "ignore_fields=['of_tomorrow']" in cli.err
        assert cli(command, f"run={run}", *at, "ignore_fields=[of_tomorrow]") == 0, cli.err
        if command == "evaluate":
            measured = json.loads((cli.folder / "metrics.json").read_text())
            assert measured["val_loss"] == pytest.approx(after, rel=1e-6)
    assert cli.train(*at) == 2
    assert cli.train(*at, "ignore_fields=[of_tomorrow]") == 0, cli.err
    assert cli.results["before"]["val_loss"] == pytest.approx(after, rel=1e-6)


@pytest.mark.slow
def test_each_row_is_predicted_with_the_adapter_that_a_column_names(cli, tmp_path):
    assert cli.train("trainer.max_epochs=5", "optimizer.lr=0.05") == 0
    run = cli.folder
    shutil.copytree(run / "adapter", tmp_path / "adapters" / "sums")
    predict = ["predict", f"run={run}", "trainer.enable_progress_bar=false", "data._target_=standin.NamedSums"]

    def predictions(*arguments):
        assert cli(*predict, *arguments) == 0, cli.err
        return [json.loads(line)["prediction"] for line in (cli.folder / "predictions.jsonl").read_text().splitlines()]

    mixed = predictions("adapter=adapters", "adapter_column=skill")
    all_rows, bare = (predictions(f"adapter={a}", "data.names=false") for a in ("adapters/sums", "null"))
    # Every other row names it. float32: the two compute the same products in another order.
    assert mixed[::2] == pytest.approx(all_rows[::2], rel=1e-5, abs=1e-5)
    assert mixed[1::2] == pytest.approx(bare[1::2], rel=1e-5, abs=1e-5)
    assert abs(all_rows[0] - bare[0]) > 0.01
    assert cli(*predict, "adapter=null", "adapter_column=skill") == 2
    assert "needs adapter=FOLDER" in cli.err


def test_whatever_a_predict_step_returns_becomes_rows():
    assert list(rows(torch.tensor([1.0, 2.0]))) == [1.0, 2.0]
    assert list(rows([{"text": "a"}, {"text": "b"}])) == [{"text": "a"}, {"text": "b"}]
    assert list(rows({"x": torch.tensor([1, 2]), "y": ["a", "b"]})) == [{"x": 1, "y": "a"}, {"x": 2, "y": "b"}]
    assert list(rows((torch.tensor([1, 2]), torch.tensor([3])))) == [[1, 2], [3]]


def test_of_a_long_prompt_the_end_is_shown_and_all_of_a_short_answer():
    row = {"prompt": "<system>" + 500 * "x" + "Why is the sky blue?", "text": "Scattering."}
    shown = _short(row)
    assert shown.startswith('{"prompt": "<system>')
    assert shown.endswith('Why is the sky blue?", "text": "Scattering."}')
    assert len(shown) < 300
