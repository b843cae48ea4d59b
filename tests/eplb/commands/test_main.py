"""The command line, as a user runs it, and the files it reads and writes."""

import io
import json
import os
from pathlib import Path

import numpy as np
import pytest

from eplb_jax import read_placement
from eplb_jax.commands.main import main
from eplb_jax.placement.quality import balancedness
from eplb_jax.recordings import replay
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


def saved(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def run_json(capsys, *argv):
    assert main([*argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


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


def test_what_engines_record_becomes_what_they_start_with(tmp_path, capsys):
    """Counts of all layers as sglang-jax saves them; layers 0 and 2 are dense."""
    counts = np.random.default_rng(0).integers(1, 1000, (LAYERS + 2, EXPERTS))
    counts[[0, 2]] = 0
    np.save(tmp_path / "loads.npy", {"logical_count": counts, "timestamp": "today"})
    argv = ["rebalance", str(tmp_path / "loads.npy"), *CLUSTER, "--policy", "global"]
    summary = run_json(capsys, *argv, "--out", str(tmp_path / "a.npy"))
    plan = np.array(summary["physical_to_logical_map"])
    in_order = np.arange(REPLICAS) % EXPERTS
    written = np.load(tmp_path / "a.npy")
    np.testing.assert_array_equal(written[[1, 3, 4]], plan[[1, 3, 4]])
    np.testing.assert_array_equal(written[[0, 2]], [in_order] * 2)
    assert main([*argv, "--out", str(tmp_path / "a.yaml"), "--first-layer", "3"]) == 0
    assert read_placement(tmp_path / "a.yaml").layers == (4, 6, 7)
    argv += ["--engine", "vllm-ascend"]
    assert main([*argv, "--out", str(tmp_path / "b.json")]) == 0
    found = json.loads((tmp_path / "b.json").read_text())
    assert found["layer_list"][0]["device_count"] == DEVICES


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
        (["rebalance", "loads.csv"], "must be in a file ending in .npz, .npy, .json"),
        (["rebalance", LOADS, "--first-layer", "-1"], "--first-layer -1 must be"),
        (["rebalance", LOADS, "--out", "x.npz", "--engine", "sglang"], "must end in"),
        (["rebalance", LOADS, "--window", "x"], "--window x is not in the recording"),
        (["rebalance", LOADS, "--layer", "61"], "--layer 61 is not one of 61 layers"),
        (["rebalance", LOADS, "--gpus", "0"], "num_gpus=0 must be a positive int"),
        (["rebalance", LOADS, "--gpus", "7", "--replicas", "260"], "multiple of"),
        (["rebalance", LOADS, "--out", "x.csv"], "must end in one of .npz, .npy"),
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


@pytest.mark.parametrize("command", ["rebalance", "replay"])
@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.npy", saved(print), "holds builtins.print, which is no array"),
        ("a.npy", saved(np.full((2, 1, 2), 1e308)), None),
        ("a.pt", b"PK", "no file of torch.save"),
    ],
)
def test_bad_files(command, name, content, message, capsys, tmp_path):
    (tmp_path / name).write_bytes(content)
    assert main([command, str(tmp_path / name)]) == 2
    error = capsys.readouterr().err
    if message is None:
        message = "add up to more than a float64" if command == "rebalance" else ""
    assert message in error and error.count("\n") == 1


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
