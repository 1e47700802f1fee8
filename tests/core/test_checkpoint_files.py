"""Safetensors files: what is refused and in which words, what is written and where it cannot be."""

import json
import os
import pickle
import re
import struct
from pathlib import Path
from random import Random
from typing import Any

import pytest
import torch
from safetensors.torch import save

from cascade_nodes.cascade_core import CascadeError
from cascade_nodes.cascade_core.checkpoints import (
    load_model,
    read_header,
    read_safetensors,
    read_weights,
    write_safetensors,
)
from cascade_nodes.tests.obstacles import (
    files_limited_to,
    in_processes,
    memory_limited_to,
    permissions_respected,
)

DAMAGED = "is a damaged safetensors file ("  # and what the parser says, in words of its version
FLOAT = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}


def packed(header: Any, data: bytes = bytes(4), length: int | None = None) -> bytes:
    """A file as the format has it: the header's length in 8 bytes, the header, the tensors."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(**changes: Any) -> dict[str, Any]:
    return {"a": FLOAT | changes}


class Bomb:
    """Opening its pickle makes a folder."""

    def __reduce__(self):
        return os.mkdir, ("exploded",)


BAD_FILES = {
    "empty": (b"", "holds 0 bytes, which is not a safetensors file; download it again."),
    "a few bytes": (b"abc", "holds 3 bytes, which is not a safetensors file; download it again."),
    "text": (b"a picture of a star", "is not a safetensors file: it begins with b'a pictur'; choose another"),
    "zeros": (bytes(100), r"is not a safetensors file: it begins with b'\x00\x00"),
    "web page": (b"<!DOCTYPE html><html>", "is a web page in place of the file; download the file again."),
    "git lfs": (b"version https://git-lfs.github.com/spec/v1\n", "is Git LFS's pointer in place of the file"),
    "zip": (b"PK\x03\x04" + bytes(90), "is an archive; unpack it, and choose the safetensors file in it."),
    "gguf": (
        b"GGUF\x03\0\0\0" + bytes(90),
        "is a GGUF file, a form that no program has for Stable Cascade; choose the",
    ),
    "json": (b'{"weight_map": {}}', "is a JSON file; choose the safetensors file that it belongs to."),
    "gzip": (b"\x1f\x8b\x08" + bytes(90), "is an archive; unpack it, and choose the safetensors file in it."),
    "picture": (b"\x89PNG\r\n" + bytes(90), "is a picture; choose the network's safetensors file."),
    **{
        f"pickle {protocol}": (pickle.dumps(Bomb(), protocol), "is a pickle (.ckpt, .pt), which can run code")
        for protocol in range(2, pickle.HIGHEST_PROTOCOL + 1)
    },
    "header of 2^60": (
        packed(entry(), length=2**60),
        "header claims 1152921504606846976 bytes, but 25000000",
    ),
    "header of 2^64 - 1": (
        packed(entry(), length=2**64 - 1),
        "header claims 18446744073709551615 bytes, but",
    ),
    "cut in the header": (
        packed(entry())[:40],
        "is truncated: its header alone takes 61 bytes, but the file ",
    ),
    "cut in the tensors": (
        packed(entry())[:-1],
        "is truncated: 72 of 73 bytes are there; download it again.",
    ),
    "more than the header tells": (packed(entry(), bytes(8)), DAMAGED),
    "header is not JSON": (packed(b"{x}"), "is not a safetensors file: its header is not JSON"),
    "header is not UTF-8": (packed(b'{"\xff":1}'), "is not a safetensors file: its header is not JSON"),
    "header is nested deeply": (
        packed(b'{"a":' * 99_999),
        "is not a safetensors file: its header is not JSON",
    ),
    "header is a list": (packed([1, 2]), "is not a safetensors file: it begins with"),
    "number of 5000 digits": (packed(b'{"a":%s}' % (b"1" * 5000)), "its header is not JSON"),
    "tensor is a number": (packed({"a": 5}), DAMAGED),
    "no offsets": (packed({"a": {"dtype": "F32", "shape": [1]}}), DAMAGED),
    "offsets are text": (packed(entry(data_offsets=["0", "4"])), DAMAGED),
    "offset is null": (packed(entry(data_offsets=[0, None])), DAMAGED),
    "offsets outside": (packed(entry(data_offsets=[4, 8])), "is truncated: 73 of 77 bytes are there"),
    "offset of 2^70": (packed(entry(data_offsets=[0, 2**70])), "is truncated: "),
    "offset below 0": (packed(entry(data_offsets=[-4, 0])), DAMAGED),
    "overlapping": (packed({"a": FLOAT, "b": FLOAT}), DAMAGED),
    "gap": (packed(entry() | {"b": FLOAT | {"data_offsets": [8, 12]}}, bytes(12)), DAMAGED),
    "shape is larger": (packed(entry(shape=[2])), DAMAGED),
    "shape overflows": (packed(entry(shape=[2**40, 2**40])), DAMAGED),
    "shape is a fraction": (packed(entry(shape=[1.5])), DAMAGED),
    "unknown type": (packed(entry(dtype="X9")), DAMAGED),
    "two entries of one name": (
        packed(b'{"a":%s,"a":%s}' % ((json.dumps(FLOAT).encode(),) * 2)),
        DAMAGED + "a name in its header stands twice)",
    ),
    "name of 1 MB": (packed({"a" * 10**6: FLOAT}), DAMAGED + "a name in its header has more than 1000"),
    "header of 30 MB": (
        packed(json.dumps(entry()).encode().ljust(30_000_000)),
        "but 25000000 at most are allowed",
    ),
    "lone surrogate": (packed(rb'{"\ud800":%s}' % json.dumps(FLOAT).encode()), DAMAGED),
    "metadata is not text": (packed({"__metadata__": {"a": 5}} | entry()), DAMAGED),
}


def refusal(path: Path) -> str:
    """The one sentence with which a file is refused."""
    with pytest.raises(CascadeError) as caught:
        read_safetensors(path)
    sentence = str(caught.value)
    assert sentence.startswith(f"{path} ")
    assert sentence.endswith(".")
    assert "\n" not in sentence
    return sentence


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    content, expected = BAD_FILES[name]
    (tmp_path / "x.safetensors").write_bytes(content)
    assert expected in refusal(tmp_path / "x.safetensors")
    assert os.listdir() == ["x.safetensors"], "nothing was unpickled"


def test_what_torch_saves_is_a_pickle(tmp_path):
    for name, zipped in (("new", True), ("old", False)):
        torch.save({"a": torch.zeros(3)}, tmp_path / name, _use_new_zipfile_serialization=zipped)
        assert "only safetensors files are loaded; convert it" in refusal(tmp_path / name)


@pytest.mark.parametrize("name", ["x.onnx", "x.ONNX", "x.pt", "x.CKPT", "x.bin", "x.pth", "x.gguf"])
def test_what_only_the_name_tells(name, tmp_path):
    (tmp_path / name).write_bytes(b"\x08\x07\x12\x07pytorch" + bytes(90))
    sentence = refusal(tmp_path / name)
    assert re.search("is an ONNX file, which|is a pickle|is a GGUF file", sentence)
    assert "safetensors" in sentence
    (tmp_path / name).write_bytes(packed(entry()))  # a safetensors file by any name is one
    assert read_safetensors(tmp_path / name)[0]["a"].tolist() == [0]


@pytest.mark.parametrize(
    "read", [read_safetensors, read_header, lambda path: read_weights(path, "stage_c"), load_model]
)
def test_what_no_reader_opens(read, tmp_path):
    """Pipes, folders, devices, circular links and impossible names are refused without waiting or reading."""
    os.mkfifo(tmp_path / "pipe.safetensors")
    (tmp_path / "folder.safetensors").mkdir()
    (tmp_path / "loop.safetensors").symlink_to("loop.safetensors")
    for path in ("pipe.safetensors", "folder.safetensors", "loop.safetensors", "a\0b", "x" * 5000, "\ud800"):
        with pytest.raises(CascadeError, match=r"\.$"):
            read(tmp_path / path)
    for device in ("/dev/zero", "/dev/null"):
        with pytest.raises(CascadeError, match="is not an ordinary file"):
            read(Path(device))


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")  # opening it would wait for ever
    assert "is not an ordinary file, but a safetensors file is expected" in refusal(tmp_path / "pipe")
    assert "is a folder, but a safetensors file is expected; give the file" in refusal(tmp_path)
    assert "does not exist; expected a safetensors file there" in refusal(tmp_path / "gone")


def test_a_file_that_must_not_be_read(tmp_path):
    (tmp_path / "x.safetensors").write_bytes(packed(entry()))
    (tmp_path / "x.safetensors").chmod(0)
    with permissions_respected():
        assert "cannot be read (Permission denied); make it readable" in refusal(tmp_path / "x.safetensors")
    tmp_path.chmod(0)
    with permissions_respected():
        assert "cannot be read (Permission denied); make it readable" in refusal(tmp_path / "x.safetensors")
    tmp_path.chmod(0o755)


@pytest.mark.parametrize("length", [0x4B50, 0x0280, 0x0380, 0x0480, 0x0580])
def test_a_header_whose_length_looks_like_the_beginning_of_a_pickle(length, tmp_path):
    header = json.dumps(entry()).encode().ljust(length)
    (tmp_path / "x.safetensors").write_bytes(packed(header, struct.pack("<f", 1.5)))
    tensors, _ = read_safetensors(tmp_path / "x.safetensors")
    assert tensors["a"].tolist() == [1.5]


def test_what_is_written_is_read(tmp_path):
    tensors = {
        "scalar": torch.tensor(3, dtype=torch.int64),
        "empty": torch.zeros(0, 4),
        "turned": torch.arange(6.0).reshape(2, 3).T,
        "half": torch.tensor([1.5, -2.25], dtype=torch.bfloat16),
        "eight": torch.tensor([1.0, 0.5]).to(torch.float8_e4m3fn),
    }
    path = tmp_path / "new" / "folder" / "x.safetensors"
    write_safetensors(path, tensors, {"kind": "größe"})
    read, metadata = read_safetensors(path)
    assert metadata == {"kind": "größe"}
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert read[name].dtype == tensor.dtype
        assert torch.equal(read[name].float(), tensor.float())
    assert os.listdir(path.parent) == ["x.safetensors"]


DTYPES = [
    *(
        "uint64",
        "int64",
        "float64",
        "complex64",
        "float32",
        "uint32",
        "int32",
        "bfloat16",
        "float16",
        "uint16",
    ),
    *("int16", "float8_e4m3fn", "float8_e5m2", "int8", "uint8"),
]


def every_dtype() -> dict[str, torch.Tensor]:
    """Tensors of every dtype, with scalars, tensors without values, views and other memory formats."""
    bits = torch.arange(3 * 5 * 2 * 16, dtype=torch.uint8).view(-1)
    tensors = {f"{name}.{i}": bits.view(getattr(torch, name))[i : i + 3] for name in DTYPES for i in (0, 2)}
    tensors["bool.0"] = torch.tensor([True, False])
    picture = torch.arange(24.0).view(1, 2, 3, 4)
    others = {
        "scalar": torch.tensor(1.5),
        "none": torch.zeros(2, 0, 3),
        "last": picture.contiguous(memory_format=torch.channels_last),
        "transposed": picture.half().mT,
        "twice": picture[0],
        "trained": torch.nn.Parameter(torch.ones(2, dtype=torch.bfloat16)),
        "größe": torch.ones(1),
    }
    return tensors | others


def test_files_are_equal_to_the_byte(tmp_path):
    """Whichever process writes, in whatever order; only the metadata's order differs from the safetensors library's."""
    tensors = every_dtype()
    metadata = {f"key {i}": f'wört\n\x01\x7f"\\/{i}' for i in range(20)}

    def write(index: int) -> None:
        random = Random(index)
        mixed = [random.sample(sorted(entries), len(entries)) for entries in (tensors, metadata)]
        in_order = {name: tensors[name] for name in mixed[0]}
        write_safetensors(tmp_path / f"{index}", in_order, {key: metadata[key] for key in mixed[1]})

    assert in_processes(4, write) == [0] * 4
    assert len({path.read_bytes() for path in tmp_path.iterdir()}) == 1
    read, stated = read_safetensors(tmp_path / "0")
    assert (stated, read.keys()) == (metadata, tensors.keys())
    for name, tensor in tensors.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        assert torch.equal(read[name].view(-1).view(torch.uint8), tensor.detach().flatten().view(torch.uint8))
    for stated in ({}, {"one": "größe\t"}):
        write_safetensors(tmp_path / "x", tensors, stated)
        theirs = save(
            {name: tensor.detach().clone().contiguous() for name, tensor in tensors.items()}, stated
        )
        assert (tmp_path / "x").read_bytes() == theirs


def test_one_tensor_at_a_time_is_in_memory(tmp_path):
    """64 MB are written with 40 MB to spare."""
    tensors = {f"{i:02}": torch.full((1,), float(i)).expand(1_000_000) for i in range(16)}
    write_safetensors(tmp_path / "warm", {"a": tensors["00"][:10]}, {})
    with memory_limited_to(40_000_000):
        write_safetensors(tmp_path / "x", tensors, {})
    assert [value[-1].item() for _, value in sorted(read_safetensors(tmp_path / "x")[0].items())] == list(
        range(16)
    )


def test_what_the_format_cannot_hold(tmp_path):
    path = tmp_path / "x.safetensors"
    for tensors, metadata, reason in (
        ({"a": torch.zeros(1, dtype=torch.complex128)}, {}, r"the format has no torch.complex128"),
        ({}, {"a": "half a \ud800 character"}, r"'utf-8' codec can't encode"),
    ):
        with pytest.raises(CascadeError, match=rf"x.safetensors could not be written \({reason}"):
            write_safetensors(path, tensors, metadata)
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("mask", [0o022, 0o077, 0o002])
def test_a_written_file_has_the_permissions_of_any_other(mask, tmp_path):
    before = os.umask(mask)
    try:
        write_safetensors(tmp_path / "x.safetensors", {"a": torch.zeros(3)}, {})
        (tmp_path / "other").write_bytes(b"")
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"x.safetensors": 0o666 & ~mask, "other": 0o666 & ~mask}


def test_a_full_disk_leaves_the_old_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(3)}, {})
    with files_limited_to(4096), pytest.raises(CascadeError) as caught:
        write_safetensors(path, {"a": torch.zeros(10_000)}, {})
    assert str(caught.value).startswith(f"{path} could not be written (")
    assert "File too large" in str(caught.value)
    assert str(caught.value).endswith(
        "and nothing was changed there; free some space, or choose a folder that can be written to."
    )
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_a_file_that_may_not_be_overwritten(tmp_path):
    path = tmp_path / "x.safetensors"
    write_safetensors(path, {"a": torch.ones(3)}, {}, overwrite=False)
    with pytest.raises(CascadeError, match=r"could not be written \(File exists\), and nothing was changed"):
        write_safetensors(path, {"a": torch.zeros(3)}, {}, overwrite=False)
    assert read_safetensors(path)[0]["a"].tolist() == [1, 1, 1]
    assert os.listdir(tmp_path) == ["x.safetensors"]


def test_where_nothing_can_be_written(tmp_path):
    def reason(path: Path) -> str:
        with permissions_respected(), pytest.raises(CascadeError) as caught:
            write_safetensors(path, {"a": torch.zeros(3)}, {})
        return str(caught.value).removeprefix(f"{path} could not be written (").split(")")[0]

    (tmp_path / "file").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    assert reason(tmp_path / "file" / "x.safetensors") == "File exists"
    assert reason(tmp_path / "file" / "inner" / "x.safetensors") == "Not a directory"
    assert reason(tmp_path / "folder") == "Is a directory"
    assert reason(locked / "x.safetensors") == "Permission denied"
    assert reason(tmp_path / f"{'x' * 250}.safetensors") == "File name too long"
    assert (tmp_path / "file").read_bytes() == b"mine"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["file", "folder", "locked"]
