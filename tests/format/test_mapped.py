from __future__ import annotations

import json

import psutil
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_lora.errors import AdapterFormatError
from lightning_lora.format import folder
from lightning_lora.format.folder import TENSORS, TensorFile, open_tensors
from lightning_lora.format.mapped import DTYPES, MappedTensors


def test_tensors_of_every_kind_and_shape_are_those_that_safetensors_reads(tmp_path):
    file = tmp_path / "some.safetensors"
    shapes = {"matrix": (3, 5), "number": (), "empty": (0, 4), "one": (1,)}
    tensors = {
        f"{dtype}.{what}": torch.randn(shape).to(dtype) for dtype in DTYPES.values() for what, shape in shapes.items()
    }
    save_file(tensors, file, metadata={"made": "here"})
    ours = MappedTensors(file)
    with safe_open(file, framework="pt") as theirs:
        for key in tensors:
            found, wanted = ours[key], theirs.get_tensor(key)
            assert (found.dtype, found.shape) == (wanted.dtype, wanted.shape)
            assert found.flatten().view(torch.uint8).equal(wanted.flatten().view(torch.uint8)), key


def test_what_is_written_into_a_tensor_stays_out_of_the_file_and_outlives_it(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file({"row": torch.zeros(4)}, file)
    row = MappedTensors(file)["row"]
    row.add_(1)
    assert not MappedTensors(file)["row"].any()
    file.unlink()
    assert row.tolist() == [1, 1, 1, 1]


def _file(entry: object, data: bytes = bytes(8)) -> bytes:
    header = json.dumps(entry).encode()
    return len(header).to_bytes(8, "little") + header + data


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8 + b"{}",
        b"\x04" + bytes(7) + b"\xff{}\xff",
        _file(["x"]),
        _file({"y": {}}),
        _file({"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}}),
        _file({"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}}),
        _file({"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}}),
        _file({"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}),
        _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [-80, -72]}}),
        _file({"x": {"dtype": "F32", "shape": [2], "data_offsets": [8, 16]}}),
    ],
)
def test_nothing_is_read_outside_of_a_file_that_lies(tmp_path, content):
    file = tmp_path / "some.safetensors"
    file.write_bytes(content)
    with pytest.raises(SafetensorError, match="cannot be read"):
        MappedTensors(file)["x"]


def test_reading_keeps_no_memory(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file({"row": torch.zeros(4)}, file)
    process = psutil.Process()

    def growth(calls: int = 10_000) -> float:
        before = process.memory_info().rss
        for _ in range(calls):
            MappedTensors(file)["row"]
        return (process.memory_info().rss - before) / calls

    # Other threads may allocate meanwhile, but what each call keeps shows every time: safetensors' get_tensor, 32.
    assert min(growth() for _ in range(4)) < 8


def test_a_file_that_is_replaced_while_it_is_opened_is_named_and_not_believed(tmp_path, monkeypatch):
    """What safetensors has checked by then is another file."""
    file = tmp_path / TENSORS
    save_file({"x": torch.zeros(2)}, file)

    def replaced(path):
        path.write_bytes(_file({"x": []}))
        return TensorFile(path)

    monkeypatch.setattr(folder, "TensorFile", replaced)
    with pytest.raises(AdapterFormatError, match="replaced while it was opened"), open_tensors(tmp_path):
        pass
