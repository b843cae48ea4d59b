"""The command line, as a user runs it, and the files it reads and writes."""

import io
import json
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest

from eplb_jax.commands.main import main
from eplb_jax.placement.quality import balancedness
from eplb_jax.recordings.files import read_loads
from eplb_jax.recordings.replays import replay
from tests.eplb.placement.cases import (
    DEVICES,
    EXPERTS,
    LAYERS,
    REPLICAS,
    SIZES,
    lognormal,
)

LOADS = str(Path(__file__).parents[2] / "data" / "eplb_loads_deepseek_v3.npz")
OPTIONS = ("--replicas", "--groups", "--nodes", "--gpus")
CLUSTER = [str(item) for pair in zip(OPTIONS, SIZES, strict=True) for item in pair]


@pytest.fixture
def counts():
    return np.random.default_rng(0).integers(0, 1000, (4, LAYERS, EXPERTS))


@pytest.fixture
def loads(counts, tmp_path):
    path = tmp_path / "loads.npy"
    np.save(path, counts)
    return str(path)


def run_json(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_every_format_reads_the_same(counts, tmp_path):
    np.save(tmp_path / "a.npy", counts)
    np.savez(tmp_path / "b.npz", counts=counts)
    np.savez(tmp_path / "c.npz", **dict(zip("xyzw", counts, strict=True)))
    (tmp_path / "d.json").write_text(json.dumps({"logical_count": counts.tolist()}))
    (tmp_path / "e.json").write_text(json.dumps(counts.tolist()))
    for name in ("a.npy", "b.npz", "c.npz", "d.json", "e.json"):
        recording = read_loads(tmp_path / name)
        np.testing.assert_array_equal(recording.counts, counts)
        assert len(recording.names) == 4
    assert read_loads(tmp_path / "c.npz").names == ("x", "y", "z", "w")
    np.save(tmp_path / "one.npy", counts[0])
    assert read_loads(tmp_path / "one.npy").counts.shape == (1, LAYERS, EXPERTS)


@pytest.mark.slow
def test_rebalance_prints_a_table_and_a_placement(loads, capsys):
    assert main(["rebalance", loads, *CLUSTER, "--layer", "1"]) == 0
    out = capsys.readouterr().out
    assert "32 experts, 48 replicas on 12 GPUs of 4 nodes, policy auto" in out
    assert "3 of 3 layers have load" in out
    assert "load away from home" in out
    placement = out[out.index("Layer 1") :].splitlines()[2:]
    assert len(placement) == DEVICES
    experts = [int(e.strip("*")) for row in placement for e in row.split()[4:]]
    assert len(experts) == REPLICAS
    assert set(experts) == set(range(EXPERTS))


@pytest.mark.parametrize(
    "policy", ["global", pytest.param("swaps", marks=pytest.mark.slow)]
)
def test_rebalance_json_and_files(loads, counts, tmp_path, capsys, policy):
    out, figure = tmp_path / "maps.json", tmp_path / "placement.png"
    argv = ["rebalance", loads, *CLUSTER, "--policy", policy]
    summary = run_json(capsys, *argv, "--out", str(out), "--figure", str(figure))
    assert summary["num_replicas"] == REPLICAS
    assert summary["with_experts_in_order"]["mean"] > 0
    assert (
        summary["balancedness"]["worst"]
        <= summary["balancedness"]["mean"]
        <= summary["no_placement_exceeds"]["mean"] + 1e-6
    )
    placement = json.loads(out.read_text())["physical_to_logical_map"]
    assert placement == summary["physical_to_logical_map"]
    assert np.shape(placement) == (LAYERS, REPLICAS)
    assert figure.read_bytes().startswith(b"\x89PNG")
    assert main([*argv, "--out", str(tmp_path / "maps.npz")]) == 0
    with np.load(tmp_path / "maps.npz") as maps:
        np.testing.assert_array_equal(maps["physical_to_logical_map"], placement)
        assert maps["logical_to_physical_map"].shape == (LAYERS, EXPERTS, 17)


@pytest.mark.slow
def test_dead_devices_on_the_command_line(loads, capsys):
    argv = ["rebalance", loads, *CLUSTER, "--policy", "swaps"]
    summary = run_json(capsys, *argv, "--capacity", *["1"] * 10, "0.5", "0")
    assert all(row[44:] == [-1] * 4 for row in summary["physical_to_logical_map"])
    assert summary["balancedness"]["mean"] > 0.85


@pytest.mark.slow
def test_one_window_of_the_recorded_loads(capsys):
    argv = ["rebalance", LOADS, "--gpus", "32", "--nodes", "8"]
    summary = run_json(capsys, *argv, "--window", "prefill_in2048")
    assert summary["num_replicas"] == 288
    assert len(summary["layers"]) == 58  # three are dense
    # Upstream's global policy on these loads.
    assert summary["balancedness"]["mean"] == pytest.approx(0.9935, abs=1e-4)


@pytest.mark.slow
def test_replay(loads, counts, tmp_path, capsys):
    figure = tmp_path / "replay.svg"
    argv = ["replay", loads, *CLUSTER, "--max-moves", "4", "--policy", "global"]
    result = run_json(capsys, *argv, "--figure", str(figure))
    assert result["windows"] == ["0", "1", "2", "3"]
    strategies = result["strategies"]
    assert list(strategies) == ["never", "once", "upstream", "refine"]
    assert strategies["never"]["moved"] == [0, 0, 0]
    assert strategies["once"]["moved"][1] == 0
    assert 0 < strategies["refine"]["moved"][1] <= 4 / REPLICAS
    assert (
        strategies["once"]["balancedness"][0]
        == (strategies["refine"]["balancedness"][0])
    )
    assert "<svg" in figure.read_text()
    assert main(argv) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert lines[0].split()[4:] == list(strategies)


@pytest.mark.slow
def test_refining_beats_planning_once_when_loads_drift():
    counts = [lognormal(0)]
    for seed in range(1, 7):
        counts.append(counts[-1] * lognormal(seed, sigma=0.15))
    outcomes = replay(np.stack(counts), *SIZES, policy="global")
    means = {name: outcome.balancedness.mean() for name, outcome in outcomes.items()}
    assert means["refine"] > means["once"] > means["never"]
    assert outcomes["refine"].moved[1:].max() <= 1 / 6
    assert outcomes["upstream"].moved[1:].mean() > 0.5


@pytest.mark.parametrize(
    "argv, message",
    [
        (["rebalance", "nowhere.npz"], "there is no such file"),
        (["rebalance", "loads.pt"], "must be in a file ending in .npz, .npy, .json"),
        (["rebalance", LOADS, "--window", "x"], "--window x is not in the recording"),
        (["rebalance", LOADS, "--layer", "61"], "--layer 61 is not one of 61 layers"),
        (["rebalance", LOADS, "--gpus", "0"], "num_gpus=0 must be a positive int"),
        (["rebalance", LOADS, "--gpus", "7", "--replicas", "260"], "multiple of"),
        (["rebalance", LOADS, "--out", "x.csv"], "must end in .npz or .json"),
        (["rebalance", LOADS, "--capacity", "1"], "takes no device_capacity"),
        (
            ["rebalance", LOADS, "--policy", "swaps", "--out", "x.json", "--capacity"]
            + ["1"] * 7
            + ["0"],
            "for servers that take -1, an empty physical expert, for the last expert",
        ),
    ],
)
def test_bad_arguments(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1


def saved(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def header(shape):
    file = io.BytesIO()
    described = {"descr": "<f8", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue()


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.json", "{", "cannot be read"),
        ("a.json", '{"count": [[1]]}', "has no `logical_count`"),
        ("a.json", "[[1, 2], [3]]", "a.json"),
        ("a.json", "[1, 2]", "loads are numbers"),
        ("a.json", "[[1, -2]]", "finite and not negative"),
        ("a.json", '[["x"]]', "loads are numbers"),
        ("a.json", "[" * 100_000, "nested too deeply"),
        ("a.json", "[[1, NaN]]", "finite and not negative"),
        ("a.json", b"\xff\xfe", "cannot be read"),
        ("a.npy", "not numpy", "magic string is not correct"),
        ("a.npz", "not numpy", "File is not a zip file"),
        ("a.npz", b"PK\3\4" + bytes(40), "File is not a zip file"),
        ("a.npy", saved(np.ones((2, 8)))[:-9], "cannot be read: Failed to read all"),
        ("a.npy", saved({"logical_count": 1}), "it holds Python objects and no numb"),
        ("a.npy", header((10**9, 10**8)), "cannot be read: "),
        ("a.npy", saved(np.ones((2, 8), complex)), "is complex128[2, 8], but loads"),
        ("a.npz", zipped({"a.txt": b"1 2"}), "its member 'a.txt' is no array"),
        ("a.npz", zipped({"a.npy": b"1 2"}), "cannot be read: EOF"),
        ("a.npz", zipped({"a.npy": saved([None])}), "it holds Python objects"),
        ("a.npz", zipped({}), "holds no array"),
        ("a.npy", saved(np.full((1, 2), 10, np.longdouble) ** 400), "finite and not"),
        ("a.npy", saved(np.full((2, 1, 2), 1e308)), "add up to more than a float64"),
    ],
)
def test_bad_files(name, content, message, capsys, tmp_path, recwarn):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main(["rebalance", str(path)]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert "allow_pickle" not in error and not recwarn.list


def test_sizes_far_too_large_are_refused(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((2, 8)))
    for option in ("--replicas", "--gpus"):
        assert main(["rebalance", str(tmp_path / "a.npy"), option, str(10**9)]) == 2
        error = capsys.readouterr().err
        assert "GB, more than 2.1; use fewer" in error and error.count("\n") == 1
    for name in ("b.npy", "b.json"):
        (tmp_path / name).touch()
        os.truncate(tmp_path / name, 3 * 10**9)  # without taking room on the disk
        assert main(["replay", str(tmp_path / name)]) == 2
        assert "it has 3.0 GB, more than " in capsys.readouterr().err


def test_windows_of_different_sizes_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.ones((2, 4)), y=np.ones((2, 5)))
    with pytest.raises(ValueError, match=r"must all be .* of one size"):
        read_loads(tmp_path / "a.npz")


def test_one_window_cannot_be_replayed(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.ones((2, 8)))
    assert main(["replay", str(tmp_path / "a.npy")]) == 2
    assert "needs at least two windows" in capsys.readouterr().err


def test_windows_without_load_are_left_out_of_a_replay(tmp_path, capsys):
    rng = np.random.default_rng(0)
    busy = rng.integers(1, 1000, (3, LAYERS, EXPERTS))
    busy[1, 0] = 0  # a layer that is idle for a while
    idle = np.zeros((LAYERS, EXPERTS), int)
    windows = {"a": busy[0], "b": idle, "c": busy[1], "d": busy[2], "e": idle}
    np.savez(tmp_path / "a.npz", **windows)
    argv = ["replay", str(tmp_path / "a.npz"), *CLUSTER, "--policy", "global"]
    result = run_json(capsys, *argv)
    assert result["windows"] == ["a", "c", "d"]
    never = result["strategies"]["never"]["balancedness"]
    in_order = np.tile(np.arange(REPLICAS) % EXPERTS, (LAYERS, 1))
    for score, window, layers in zip(never, busy[1:], ([1, 2], [0, 1, 2]), strict=True):
        expected = np.asarray(balancedness(window, in_order, DEVICES))[layers]
        assert score == pytest.approx(expected.mean(), rel=1e-6)
    outcome = replay(np.stack(list(windows.values())), *SIZES, policy="global")
    assert outcome["never"].balancedness.tolist() == never


def test_a_recording_without_load_cannot_be_replayed(tmp_path, capsys):
    np.save(tmp_path / "a.npy", np.zeros((3, 2, 8)))
    assert main(["replay", str(tmp_path / "a.npy"), "--json"]) == 2
    assert "has load in 0 of 3 windows" in capsys.readouterr().err
