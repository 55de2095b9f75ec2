"""Images as people have them: each is what a viewer shows, or an error that names its file."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from lightning_lora.cli.explain import explain
from lightning_lora.errors import ConfigError, DataError
from lightning_lora.recipes.data import DataSource, ImageClassificationData
from lightning_lora.recipes.data.classification import in_rgb

from .rows import Rows

RAMP = np.arange(16).reshape(4, 4) * 17  # 0, 17, .. 255
GREY = np.repeat(RAMP[..., None], 3, axis=2)
INK = np.where(np.eye(4)[..., None] > 0, [0, 0, 0], [255, 255, 255])


def drawn(colour: tuple[int, int, int]) -> np.ndarray:
    """A diagonal of that colour on a transparent ground."""
    pixels = np.zeros((4, 4, 4), np.uint8)
    pixels[np.eye(4) > 0] = (*colour, 255)
    return pixels


def with_transparent(mode: str, **fields: Any) -> Callable[[Path], None]:
    """A palette or a grey image of which one value is transparent: 9 of the diagonal's ground."""

    def save(file: Path) -> None:
        image = Image.fromarray(np.where(np.eye(4) > 0, 0, 9).astype(np.uint8))
        if mode == "P":
            image = image.convert("P")
        image.save(file, transparency=9, **fields)

    return save


def saved(pixels: np.ndarray, **fields: Any) -> Callable[[Path], None]:
    return lambda file: Image.fromarray(pixels).save(file, **fields)


ODD = {
    "grey in 16 bits.png": (saved((RAMP * 257).astype(np.uint16)), GREY),
    "grey in 16 bits.tif": (saved((RAMP * 257).astype(np.uint16)), GREY),
    "grey in 16 bits, the high byte first.tif": (saved((RAMP * 257).astype(">u2")), GREY),
    "grey in 16 bits.pgm": (lambda f: f.write_bytes(b"P5 4 4 65535\n" + (RAMP * 257).astype(">u2").tobytes()), GREY),
    "floats.tif": (saved((RAMP / 255).astype(np.float32)), GREY),
    "black ink.png": (saved(drawn((0, 0, 0))), INK),
    "grey ink.webp": (saved(drawn((128, 128, 128)), lossless=True), np.where(INK > 0, 255, 128)),
    "grey with alpha.png": (lambda f: Image.fromarray(drawn((0, 0, 0))).convert("LA").save(f), INK),
    "palette.png": (with_transparent("P"), INK),
    "palette.gif": (with_transparent("P"), INK),
    "a grey value.png": (with_transparent("L"), INK),
    "half transparent.png": (saved(np.full((4, 4, 4), [0, 0, 0, 51], np.uint8)), np.full((4, 4, 3), 204)),
    "bits.png": (lambda f: Image.fromarray(np.eye(4) == 0).save(f), INK),
    "grey.png": (saved(RAMP.astype(np.uint8)), GREY),
    "cmyk.tif": (lambda f: Image.fromarray(INK.astype(np.uint8)).convert("CMYK").save(f), INK),
}


def decoded(file: Path) -> Image.Image:
    return datasets.Image().decode_example({"path": str(file), "bytes": None})


@pytest.mark.parametrize("name", ODD)
def test_an_odd_image_has_the_pixels_that_a_viewer_shows(tmp_path, name):
    save, pixels = ODD[name]
    save(tmp_path / name)
    with decoded(tmp_path / name) as odd:
        image = in_rgb(odd)
    assert image.mode == "RGB"
    assert np.array_equal(np.asarray(image), pixels)


def test_the_ground_of_a_transparent_image_can_be_chosen_and_one_on_which_nothing_shows_is_an_error(tmp_path):
    white = Image.fromarray(drawn((255, 255, 255)))
    assert np.array_equal(np.asarray(in_rgb(white, "black")), 255 - INK)
    with pytest.raises(DataError, match="cannot be told from white: set background="):
        in_rgb(white)
    with pytest.raises(ConfigError, match="background is a colour"):
        ImageClassificationData(None, Rows([]), background="whitish")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "values", [RAMP.astype(np.float32), (RAMP / 255 - 0.1).astype(np.float32), np.full((4, 4), np.nan, np.float32),
               RAMP.astype(np.int32)],
)  # fmt: skip
def test_values_of_which_nobody_knows_what_is_white_are_refused(tmp_path, values):
    Image.fromarray(values).save(tmp_path / "measured.tif")
    with decoded(tmp_path / "measured.tif") as image, pytest.raises(DataError, match="white is not known"):
        in_rgb(image)


def table(folder: Path, *names: str) -> Path:
    """A table of images that it names; those that are not there are not made."""
    folder.mkdir(exist_ok=True)
    with (folder / "table.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["image", "label"], *([name, "ab"[i % 2]] for i, name in enumerate(names))])
    return folder / "table.csv"


def pictures(folder: Path, count: int = 8) -> list[str]:
    (folder / "pictures").mkdir(parents=True)
    for i in range(count):
        Image.fromarray(np.full((20, 20, 3), i * 20, np.uint8)).save(folder / "pictures" / f"{i}.png")
    return [f"pictures/{i}.png" for i in range(count)]


@pytest.mark.parametrize("how", ["beside the table", "from here", "absolute"])
def test_images_that_a_table_names_are_the_ones_that_are_read(vit, tmp_path, monkeypatch, how):
    folder = tmp_path / "mine"
    names = pictures(folder)
    monkeypatch.chdir(folder if how == "from here" else tmp_path)
    if how == "absolute":
        names = [str(folder / name) for name in names]
    path = table(tmp_path / "tables" if how != "beside the table" else folder, *names)
    data = ImageClassificationData(vit, DataSource(str(path), validation_fraction=0.5), batch_size=4)
    data.setup("fit")
    data.setup("predict")
    seen = torch.cat([batch["pixel_values"] for batch in data.predict_dataloader()])
    values = [in_rgb(Image.open(folder / "pictures" / f"{i}.png")) for i in range(8)]
    assert torch.equal(seen, data.processor(values, return_tensors="pt")["pixel_values"])
    assert next(iter(data.train_dataloader()))["labels"].shape == (4,)


def test_an_image_that_a_table_names_and_that_is_not_there_is_named_before_training(vit, tmp_path):
    path = table(tmp_path / "mine", *pictures(tmp_path / "mine"), "pictures/none.png")
    with pytest.raises(DataError, match=r"names the image 'pictures/none\.png', and there is no such file"):
        ImageClassificationData(vit, DataSource(str(path))).setup("fit")
    with pytest.raises(DataError, match="names no image in 'image', but"):
        ImageClassificationData(vit, Rows([{"image": name, "label": "a"} for name in ("", "b")])).setup("fit")
    with pytest.raises(DataError, match="holds no images and no names of files"):
        ImageClassificationData(vit, Rows([{"image": 1.5, "label": label} for label in "ab"])).setup("fit")


@pytest.mark.parametrize("workers", [0, 1])
def test_a_broken_image_is_named_in_one_line(vit, tmp_path, workers):
    folder = tmp_path / "mine"
    for name in pictures(folder):
        (folder / name).rename(folder / "pictures" / f"{name[9]}.jpg.png")
    for label in "ab":
        (folder / "by" / label).mkdir(parents=True)
        for i in range(3):
            Image.fromarray(np.random.default_rng(i).integers(0, 255, (64, 64, 3), np.uint8)).save(
                folder / "by" / label / f"{i}.jpg"
            )
            broken = folder / "by" / label / f"{i}.jpg"
            broken.write_bytes(broken.read_bytes()[:400])
    data = ImageClassificationData(vit, DataSource(str(folder / "by"), validation_fraction=0.5), num_workers=workers)
    data.setup("fit")
    with pytest.raises(DataError) as raised:
        next(iter(data.train_dataloader()))
    said = explain(raised.value)
    assert len(said.splitlines()) == 1
    assert said.startswith(f"The image {folder}/by/")
    assert "truncated" in said.lower()
