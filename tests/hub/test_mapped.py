from __future__ import annotations

import json

import psutil
import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lightning_lora.errors import AdapterFormatError
from lightning_lora.hub.format import folder
from lightning_lora.hub.format.folder import TENSORS, TensorFile, open_tensors
from lightning_lora.hub.format.mapped import DTYPES, MappedTensors


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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_one_sum_says_that_all_numbers_are_finite_and_never_so_where_one_is_not(tmp_path, dtype):
    file = tmp_path / "some.safetensors"
    tensors = {"a": torch.randn(3, 5).to(dtype), "empty": torch.zeros(0, dtype=dtype), "z": torch.randn(2).to(dtype)}
    save_file(tensors, file, metadata={"made": "here"})
    assert MappedTensors(file).are_finite()
    for key, at, value in (("a", (0, 0), "nan"), ("a", (2, 4), "inf"), ("z", (1,), "-inf")):
        spoilt = {name: t.clone() for name, t in tensors.items()}
        spoilt[key][at] = float(value)
        save_file(spoilt, file)
        assert not MappedTensors(file).are_finite()


@pytest.mark.parametrize(
    "tensors",
    [
        {"a": torch.zeros(2), "b": torch.zeros(2, dtype=torch.float16)},
        {"a": torch.zeros(2, dtype=torch.int32)},
        {"a": torch.zeros(2, dtype=torch.float8_e4m3fn)},
        {"a": torch.full((4,), 6e4, dtype=torch.float16)},
        {"a": torch.zeros(0)},
    ],
    ids=["several types", "integers", "eight bits", "a sum too large", "nothing"],
)
def test_where_one_sum_cannot_say_so_each_tensor_is_looked_at(tmp_path, tensors):
    file = tmp_path / "some.safetensors"
    save_file(tensors, file)
    assert not MappedTensors(file).are_finite()


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int8], ids=str)
def test_all_at_once_are_what_each_is_by_itself(tmp_path, dtype):
    file = tmp_path / "some.safetensors"
    shapes = {"b": (3, 5), "number": (), "empty": (0, 4), "a": (2, 1, 2)}
    save_file({key: torch.randn(shape).mul(9).to(dtype) for key, shape in shapes.items()}, file)
    tensors = MappedTensors(file)
    at_once = tensors.at_once()
    assert isinstance(at_once, dict)
    assert at_once.keys() == shapes.keys()
    assert all(t.equal(tensors[key]) and t.shape == tensors[key].shape for key, t in at_once.items())


def test_where_they_are_of_several_types_each_is_read_by_itself(tmp_path):
    file = tmp_path / "some.safetensors"
    save_file({"a": torch.ones(2), "b": torch.ones(2, dtype=torch.float64)}, file)
    tensors = MappedTensors(file)
    assert tensors.at_once() is tensors


@pytest.mark.parametrize(
    "entries",
    [
        {"x": []},
        {"x": {"dtype": "F33", "shape": [2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [3], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": ["2"], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}},
        {"x": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"x": {"dtype": "F32", "shape": [1], "data_offsets": [4, 8]}},
        {n: {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]} for n in "xy"},
        {n: {"dtype": "F32", "shape": [2], "data_offsets": [at, at + 4]} for n, at in (("x", 0), ("y", 4))},
    ],
    ids=["no entry", "type", "size", "word", "beyond", "negative", "gap", "overlap", "sum alone"],
)
def test_nothing_is_read_at_once_from_a_file_that_lies(tmp_path, entries):
    file = tmp_path / "some.safetensors"
    file.write_bytes(_file(entries))
    tensors = MappedTensors(file)
    assert tensors.at_once() is tensors
