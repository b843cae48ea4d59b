"""The forms of the format that are read, and bad files."""

import gzip
import json
import tracemalloc

import pytest

from dualpipe_jax import read_trace
from dualpipe_jax.commands import main as cli
from dualpipe_jax.profiles.events import read_events
from tests.profiles.traces import kernel, write_trace

# The time is left out: it would make the names of tests differ between processes.
CUT_GZIP = gzip.compress(b'{"traceEvents": [' + b" " * 9999, mtime=0)[:-12]


def test_forms_of_the_format(tmp_path):
    events = [kernel("a", 0, 1), kernel("b", 2, 1)]
    text = json.dumps(events, indent=1)
    for name, written in {
        "object.json": '{"x": {"y": [1]}, "traceEvents": ' + text + ', "z": 1}',
        "list.json": text,
        "open.json": text.rstrip("]\n") + ",\n",  # the format allows it
    }.items():
        (tmp_path / name).write_text(written)
        packed = tmp_path / (name + ".gz")
        packed.write_bytes(gzip.compress(written.encode()))
        for path in (tmp_path / name, packed):
            assert list(read_events(path)) == events, path.name


def test_events_at_every_offset_of_a_chunk(tmp_path):
    events = [kernel('a\\"ä', 12345.678, 0.25), kernel("b", -1e-3, 2)]
    path = tmp_path / "trace.json"
    path.write_text(json.dumps({"traceEvents": events, "end": 12}), encoding="utf-8")
    for size in range(1, 60):
        assert list(read_events(path, chunk_size=size)) == events, size


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty; expected a Chrome trace"),
        (b"  \n", "is empty; expected a Chrome trace"),
        (b"hello", "is not a Chrome trace; expected a JSON object"),
        (b"42", "is not a Chrome trace"),
        (b"[1, 2]", "is not a Chrome trace"),
        (b'{"loss": 1.0}', "is not a Chrome trace"),
        (b'{"traceEvents": 5}', "is not a Chrome trace"),
        (b'{"traceEvents": []}', "has no kernel that ran on a device"),
        (
            b'{"traceEvents": [{"ph": "X", "na',
            "ends too early, or is damaged, behind 0",
        ),
        (b'{"traceEvents": [{"ph": "M"}, {"ph"', "ends too early, .* behind 1 events"),
        (b'{"traceEvents": [{"ph": "M"}', "ends too early, .* behind 1 events"),
        (b'{"traceEvents": [{"ph": "M"} oops]}', "ends too early, or is damaged"),
        (b'{"traceEvents": [{"a": ' + b"[" * 99999, "ends too early, or is damaged"),
        (b'[{"ts": ' + b"9" * 5000 + b"}]", "ends too early, or is damaged"),
        (b"\x1f\x8b\x08garbage", "is a damaged gzip file"),
        (CUT_GZIP, "is a damaged gzip"),
    ],
)
def test_bad_files(tmp_path, capsys, content, message):
    path = tmp_path / "trace.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_trace(path)
    assert cli.main(["trace", str(path)]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("python -m dualpipe_jax trace: error: ")
    assert printed.count("\n") == 1


def test_a_folder_and_a_missing_file(tmp_path, capsys):
    assert cli.main(["trace", str(tmp_path)]) == 2
    assert "is a folder without a *.trace.json.gz" in capsys.readouterr().err
    assert cli.main(["trace", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_invalid_events_are_skipped(tmp_path):
    invalid = [
        {"ph": "X", "cat": "kernel", "name": "no time"},
        {"ph": "X", "cat": "kernel", "name": "no args", "ts": 1, "args": None},
        {"ph": "X", "cat": "kernel", "name": "dur", "ts": 2, "dur": "long"},
        {"ph": "X", "cat": "kernel", "name": "back", "ts": 2, "dur": -5},
        {"ph": "X", "cat": "kernel", "name": "nan", "ts": float("nan"), "dur": 1},
        {"ph": "X", "cat": "kernel", "name": "far", "ts": 1, "dur": float("inf")},
        {"ph": "X", "cat": "kernel", "name": "huge", "ts": 10**400, "dur": 1},
        {"ph": "M", "name": "process_name", "pid": [1]},
        {"ph": ["X"]},
    ]
    assert [s.name for s in read_trace(write_trace(tmp_path, invalid)).spans] == [
        "no args"
    ]


@pytest.mark.slow
def test_memory_is_that_of_the_kernels_not_of_the_file(tmp_path):
    """32 MB of host events around one kernel: Python's own peak stays below 8 MB."""
    path = tmp_path / "large.json"
    host = {"ph": "X", "cat": "cpu_op", "name": "x" * 1000, "ts": 1, "dur": 1}
    line = json.dumps(host) + ",\n"
    with path.open("w") as file:
        file.write('{"traceEvents": [')
        for _ in range(32):
            file.write(line * 1000)
        file.write(json.dumps(kernel("gemm", 0, 1)) + "]}")
    tracemalloc.start()
    try:
        assert len(read_trace(path).spans) == 1
        assert tracemalloc.get_traced_memory()[1] < 8e6
    finally:
        tracemalloc.stop()
