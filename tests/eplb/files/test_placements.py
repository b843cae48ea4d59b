"""Placements as the files of engines, written, read, and refused."""

import json

import numpy as np
import pytest
import yaml

from eplb_jax import ExpertTables, read_placement, write_placement
from tests.eplb.files import written

EXPERTS, PHYSICAL = 6, 8
MOE_LAYERS = (1, 2, 4)
KEY = "physical_to_logical_map"


@pytest.fixture
def rows():
    rng = np.random.default_rng(0)
    return np.stack([rng.permutation(np.arange(PHYSICAL) % EXPERTS) for _ in range(3)])


@pytest.mark.parametrize("name", ["a.json", "a.npy", "a.NPY"])
def test_sglang_finds_a_row_for_every_layer(name, rows, tmp_path):
    write_placement(tmp_path / name, rows, layers=MOE_LAYERS, num_layers=6)
    if name.endswith("json"):
        # What SGLang and sglang-jax look for in the object.
        found = np.array(json.loads((tmp_path / name).read_text())[KEY])
    else:
        # sglang-jax takes an array that is no object for the map itself.
        found = np.load(tmp_path / name, allow_pickle=False)
    assert found.shape == (6, PHYSICAL)
    np.testing.assert_array_equal(found[[1, 2, 4]], rows)
    for dense in (0, 3, 5):
        assert found[dense].tolist() == [0, 1, 2, 3, 4, 5, 0, 1]
    read = read_placement(tmp_path / name)
    assert read.layers == (0, 1, 2, 3, 4, 5)
    np.testing.assert_array_equal(read.physical_to_logical_map, found)


def test_tensorrt_llm(rows, tmp_path):
    path = tmp_path / "a.yaml"
    write_placement(path, rows, layers=MOE_LAYERS, num_layers=6)
    found = yaml.safe_load(path.read_text())
    assert found["num_slots"] == PHYSICAL
    assert found["initial_global_assignments"] == dict(
        zip(MOE_LAYERS, rows.tolist(), strict=True)
    )
    # As its own script writes it: blocks of lines.
    path.write_text(yaml.dump(found))
    read = read_placement(path)
    assert read.layers == MOE_LAYERS
    np.testing.assert_array_equal(read.physical_to_logical_map, rows)


def test_vllm_ascend(rows, tmp_path):
    path = tmp_path / "a.json"
    write_placement(path, rows, engine="vllm-ascend", layers=MOE_LAYERS, num_devices=2)
    found = json.loads(path.read_text())
    assert found["moe_layer_count"] == 3
    for layer, row in zip(found["layer_list"], rows, strict=True):
        assert layer["device_count"] == 2
        by_device = {each["device_id"]: each for each in layer["device_list"]}
        assert by_device[0]["device_expert"] == row[:4].tolist()
        assert by_device[1]["device_expert"] == row[4:].tolist()
    for layer in found["layer_list"]:
        layer["device_list"].reverse()
    found["layer_list"].reverse()
    path.write_text(json.dumps(found))
    read = read_placement(path)
    assert read.layers == (0, 1, 2)
    np.testing.assert_array_equal(read.physical_to_logical_map, rows)


def test_our_own(rows, tmp_path):
    path = tmp_path / "a.npz"
    rows = np.concatenate([rows, np.full((3, 1), -1)], axis=1)
    write_placement(path, rows, layers=MOE_LAYERS)
    with np.load(path) as maps:
        tables = ExpertTables(*(maps[name] for name in ExpertTables._fields))
    tables.validate()
    read = read_placement(path)
    assert read.layers == MOE_LAYERS
    np.testing.assert_array_equal(read.physical_to_logical_map, rows)


@pytest.mark.parametrize(
    ("name", "rows", "options", "message"),
    [
        ("a.csv", [[0, 1]], {}, "must end in one of .npz, .npy, .json, .yaml, .yml"),
        ("a.npz", [[0, 1]], {"engine": "sglang"}, "must end in .npy or .json"),
        ("a.npy", [[0, 1]], {"engine": "vllm-ascend"}, "must end in .json"),
        ("a.json", [[0, 1]], {"engine": "vllm"}, "engine='vllm' must be one of"),
        ("a.json", [0, 1], {}, r"shape \(2,\)"),
        ("a.json", [[0.0, 1.0]], {}, "experts are integers"),
        ("a.json", [[0, 2, 2]], {}, "Expert 1 of layer 0 has no replica"),
        ("a.json", [[0, 1, -1]], {}, "take -1, an empty physical expert"),
        ("a.json", [[0, 1]], {"layers": [1, 2]}, "must be 1 increasing indices"),
        ("a.json", [[0, 1]] * 2, {"layers": [2, 2]}, "must be 2 increasing"),
        ("a.json", [[0, 1]], {"layers": [3], "num_layers": 3}, "below num_layers=3"),
        ("a.json", [[0, 1]], {"layers": [-1]}, "increasing indices"),
        ("a.json", [[0, 1]], {"engine": "vllm-ascend"}, "num_devices=None must div"),
        (
            "a.json",
            [[0, 1]],
            {"engine": "vllm-ascend", "num_devices": 3},
            "num_devices=3 must divide the 2 physical experts",
        ),
    ],
)
def test_what_cannot_be_written(name, rows, options, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        write_placement(tmp_path / name, rows, **options)
    assert not list(tmp_path.iterdir())


LAUGHS = "a: &a [1, 1]\nb: &b [*a, *a]\ninitial_global_assignments: {0: *b}\n"


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", json.dumps({KEY: [[0, float("nan")]]}), "it holds float64[1, 2]"),
        ("a.json", json.dumps({KEY: [[0, 1.5]]}), "it holds float64[1, 2], but a pla"),
        ("a.json", json.dumps({KEY: [[0, -2]]}), "physical_to_logical_map holds -2"),
        ("a.json", json.dumps({KEY: [[0, "x"]]}), "a placement is integers"),
        ("a.json", json.dumps({KEY: [[0, 1], [0]]}), "cannot be read: "),
        ("a.json", json.dumps({KEY: [0, 1]}), "a placement is integers, [layers"),
        ("a.json", json.dumps({"logical_count": [[1]]}), "has no `physical_to_logical"),
        ("a.json", json.dumps({"layer_list": [{}]}), "cannot be read: "),
        ("a.json", "[" * 100_000, "is nested too deeply; physical_to_logical_map is"),
        ("a.npy", written.npy({KEY: print}), "holds builtins.print"),
        ("a.npz", written.zipped({"a.npy": b"1"}), "cannot be read: "),
        ("a.yaml", "initial_global_assignments: [1, 2", "cannot be read: while pars"),
        ("a.yaml", "initial_global_assignments: {x: [0, 1]}", "increasing indices"),
        ("a.yaml", "!!python/object/apply:os.system [touch x]", "cannot be read: coul"),
        ("a.yaml", LAUGHS, "it uses aliases"),
        ("a.yml", "num_slots: 8", "has no `physical_to_logical_map`, only num_slots"),
    ],
)
def test_what_cannot_be_read(name, content, message, tmp_path):
    path = tmp_path / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(ValueError) as caught:
        read_placement(path)
    assert message in str(caught.value) and "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="there is no such file"):
        read_placement(tmp_path / f"other_{name}")
