"""Recorded loads of every engine, and files that are damaged or malicious."""

import json
import os
import pickle
import struct
from pathlib import Path

import numpy as np
import pytest

from eplb_jax import read_loads
from tests.eplb.files import written

DATA = Path(__file__).parents[2] / "data"
LAYERS, EXPERTS = 3, 32


@pytest.fixture
def counts():
    return np.random.default_rng(0).integers(0, 1000, (4, LAYERS, EXPERTS))


def test_every_format_reads_the_same(counts, tmp_path):
    recorded = {"logical_count": counts, "timestamp": "20261127_0412"}
    windows = dict(zip("xyzw", counts, strict=True))
    files = {
        "a.npy": written.npy(counts),
        "b.json": json.dumps({"logical_count": counts.tolist()}).encode(),
        "c.JSON": json.dumps(counts.tolist()).encode(),
        "sglang_jax.npy": written.npy(recorded),
        "steps.npy": written.npy({"logical_count": [*counts]}),
        "sglang.PT": written.sglang_pt(counts),
        "vllm.safetensors": written.safetensors({"expert_load_window": counts}),
        "windows.safetensors": written.safetensors(windows),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    np.savez(tmp_path / "d.npz", counts=counts)
    np.savez(tmp_path / "e.npz", **windows)
    for path in tmp_path.iterdir():
        recording = read_loads(path)
        np.testing.assert_array_equal(recording.counts, counts, err_msg=path.name)
        assert len(recording.names) == 4
    for name in ("e.npz", "windows.safetensors"):
        assert read_loads(tmp_path / name).names == ("x", "y", "z", "w")
    (tmp_path / "one.npy").write_bytes(written.npy(counts[0]))
    assert read_loads(tmp_path / "one.npy").counts.shape == (1, LAYERS, EXPERTS)


def test_a_file_that_torch_wrote():
    """`torch.save` of version 2.14, as SGLang's recorder calls it, on 2 x 3 x 4."""
    recording = read_loads(DATA / "sglang_loads.pt")
    expected = np.arange(24).reshape(2, 3, 4) * 7
    np.testing.assert_array_equal(recording.counts, expected)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("order", "CF")
def test_pickles_of_every_protocol(protocol, order, counts, tmp_path):
    array = np.array(np.asfortranarray(counts) if order == "F" else counts, order=order)
    content = pickle.dumps(
        {"steps": np.int64(4), "logical_count": array, "rate": 0.5}, protocol
    )
    (tmp_path / "a.npy").write_bytes(written.npy_pickle(content))
    np.testing.assert_array_equal(read_loads(tmp_path / "a.npy").counts, counts)


class Evil:
    """Pickled, it calls a function with arguments."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def header(shape):
    return written.npy(np.zeros(0)).replace(b"(0,)", str(shape).encode())


def many_times(value, levels=12, each=12):
    for _ in range(levels):
        value = [value] * each
    return value


GOOD = np.ones((2, 8), np.int64)
BAD = {
    "text": ("a.json", "{", "cannot be read: Expecting"),
    "no counts": ("a.json", '{"count": [[1]]}', "has no `logical_count`, only count"),
    "ragged": ("a.json", "[[1, 2], [3]]", "cannot be read: "),
    "flat": ("a.json", "[1, 2]", "loads are numbers"),
    "negative": ("a.json", "[[1, -2]]", "finite and not negative"),
    "words": ("a.json", '[["x"]]', "loads are numbers"),
    "deep": ("a.json", "[" * 100_000, "nested too deeply"),
    "deeper than loads": ("a.json", "[[[[1]]]]", "more deeply than three"),
    "NaN": ("a.json", "[[1, NaN]]", "finite and not negative"),
    "not UTF-8": ("a.json", b"\xff\xfe", "cannot be read"),
    "no npy": ("a.npy", "not numpy", "magic string is not correct"),
    "no npz": ("a.npz", "not numpy", "File is not a zip file"),
    "half an npz": ("a.npz", b"PK\3\4" + bytes(40), "File is not a zip file"),
    "half an npy": ("a.npy", written.npy(np.ones((2, 8)))[:-9], "cannot be read: Fail"),
    "one number": ("a.npy", written.npy({"logical_count": 1}), "is int64[], but loads"),
    "claims 800 PB": ("a.npy", header((10**9, 10**8)), "cannot be read: "),
    "complex": ("a.npy", written.npy(np.ones((2, 8), complex)), "is complex128[2, 8]"),
    "no array": ("a.npz", written.zipped({"a.txt": b"1 2"}), "'a.txt' is no array"),
    "no header": ("a.npz", written.zipped({"a.npy": b"1 2"}), "cannot be read: EOF"),
    "objects": ("a.npz", written.zipped({"a.npy": written.npy([None])}), "Python obj"),
    "empty": ("a.npz", written.zipped({}), "holds no array"),
    "huge": ("a.npy", written.npy(np.full((1, 2), 10, np.longdouble) ** 400), "finite"),
    "a command": ("a.npy", written.npy(Evil(os.system, "touch evil")), "posix.system"),
    "a command beside counts": (
        "a.npy",
        written.npy({"logical_count": GOOD, "x": Evil(os.system, "touch evil")}),
        "holds posix.system, which is no array, number, string, list or dict",
    ),
    "eval": ("a.npy", written.npy(Evil(eval, "1 / 0")), "holds builtins.eval"),
    "a type": ("a.npy", written.npy(Evil(bytearray, 10**12)), "builtins.bytearray"),
    "a known name called oddly": (
        "a.npy",
        written.npy_pickle(written.opcodes(b"cnumpy\nndarray\n", (9,), b"R")),
        "holds numpy.ndarray, which is no array",
    ),
    "attributes of a name": (
        "a.npy",
        written.npy_pickle(written.opcodes(b"cnumpy\ndtype\n", {"a": 1}, b"b")),
        "holds numpy.dtype, which is no array",
    ),
    "an array of pointers": (
        "a.npy",
        written.npy({"logical_count": np.array([[None, 1]])}),
        "holds an array of Python objects",
    ),
    "lists in lists": (
        "a.npy",
        written.npy({"logical_count": many_times(1)}),
        "nested",
    ),
    "arrays in lists": (
        "a.npy",
        written.npy({"logical_count": many_times(GOOD, 2, 2000)}),
        "it lists more than",
    ),
    "a stack that is too short": (
        "a.npy",
        written.npy_pickle(b"\x80\x02tt."),
        "damaged pickle",
    ),
    "half a pickle": (
        "a.npy",
        written.npy({"logical_count": GOOD})[:-9],
        "cannot be r",
    ),
    "no torch file": (
        "a.pt",
        b"\x80\x02}q\0.",
        "no file of torch.save since torch 1.6",
    ),
    "half a torch file": ("a.pt", written.sglang_pt(GOOD)[:-40], "or it is truncated"),
    "a zip file": ("a.pt", written.zipped({"x": b"1"}), "no member data.pkl"),
    "torch, a command": (
        "a.pt",
        written.torch_file(pickle.dumps(Evil(os.system, "touch evil"), 2)),
        "holds posix.system",
    ),
    "beyond a tensor's storage": (
        "a.pt",
        written.sglang_pt(GOOD, shape=(2, 9)),
        "shape (2, 9), but only 16 numbers",
    ),
    "before a tensor's storage": (
        "a.pt",
        written.sglang_pt(GOOD, start=-8),
        "a tensor of shape (2, 8) and strides (8, 1)",
    ),
    "a tensor that repeats itself": (
        "a.pt",
        written.sglang_pt(GOOD, shape=(10**6, 10**6), strides=(0, 0)),
        "but only 16 numbers",
    ),
    "another storage": ("a.pt", written.sglang_pt(GOOD, storage="Evil"), "torch.Evil"),
    "a header's length": (
        "a.safetensors",
        struct.pack("<Q", 2**40) + b"{}",
        "its header alone would have 1099511627776",
    ),
    "a header that is no object": (
        "a.safetensors",
        struct.pack("<Q", 2) + b"[]",
        "has a damaged header",
    ),
    "beyond the end": (
        "a.safetensors",
        written.safetensors({"a": GOOD})[:-8],
        "is truncated: a ends at byte",
    ),
    "places that go back": (
        "a.safetensors",
        written.safetensors({"a": GOOD}, data_offsets=[128, 0]),
        "has a damaged header",
    ),
    "too few bytes": (
        "a.safetensors",
        written.safetensors({"a": GOOD}, shape=[2, 9]),
        "which are not those of I64 [2, 9]",
    ),
    "a dtype that NumPy lacks": (
        "a.safetensors",
        written.safetensors({"a": GOOD}, dtype="F8_E4M3"),
        "a is F8_E4M3; loads are one of",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files(case, tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    name, content, message = BAD[case]
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as caught:
        read_loads(path)
    error = str(caught.value)
    assert message in error and "\n" not in error
    assert "allow_pickle" not in error and not recwarn.list
    assert [each.name for each in tmp_path.iterdir()] == [name]  # nothing was run


def test_windows_of_different_sizes_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4)), y=np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"must all be .* of one size"):
        read_loads(tmp_path / "a.npz")


def test_damage_anywhere_is_refused_or_harmless(tmp_path):
    """A third of the bytes is changed in turn: numbers result, or one line."""
    for name, content in (
        ("a.npy", written.npy({"logical_count": GOOD})),
        ("a.pt", written.sglang_pt(GOOD)),
        ("a.safetensors", written.safetensors({"a": GOOD})),
    ):
        path = tmp_path / name
        rng = np.random.default_rng(0)
        for at in range(0, len(content), 3):
            damaged = bytearray(content)
            damaged[at] ^= int(rng.integers(1, 256))
            path.write_bytes(damaged)
            try:
                read_loads(path)
            except ValueError as error:
                assert "\n" not in str(error)
