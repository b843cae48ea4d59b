"""Checkpoints that are damaged, half-written, of another config, or not written."""

import contextlib
import gc
import re
import resource
import shutil
import time

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from dualpipe_jax.train import integrity as _integrity
from dualpipe_jax.train.checkpoint import Checkpoints

# Of orbax's threads and tasks, only one gets to raise; the others' errors are left, and
# coroutines that were never awaited.
leaves_errors = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnraisableExceptionWarning",
    "ignore::pytest.PytestUnhandledThreadExceptionWarning",
)


@pytest.fixture(autouse=True)
def _collect_garbage():
    """What a test leaves is found in that test, and not in whichever comes later."""
    yield
    gc.collect()


def sharding(*axes):
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))
    return NamedSharding(mesh, PartitionSpec(*axes))


def make_state(step, width=8192):
    """Some split, some whole, some small enough to lie in the index itself."""
    rng = np.random.default_rng(step)
    return {
        "step": jax.device_put(np.int32(step), sharding()),
        "split": jax.device_put(
            rng.normal(size=(16, width)).astype("f"), sharding("x")
        ),
        "half": jax.device_put(
            rng.normal(size=300).astype(jax.numpy.bfloat16), sharding()
        ),
        "whole": [jax.device_put(rng.integers(0, 9, (7, 11)), sharding())],
    }


def abstract(state):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state
    )


def as_it_was(info):
    return abstract(make_state(0)), lambda state: state


def assert_is(state, step):
    jax.tree.map(np.testing.assert_array_equal, state, make_state(step))


@pytest.fixture
def said():
    return []


@pytest.fixture(scope="session")
def written(tmp_path_factory):
    """A folder with checkpoints of steps 4 and 8."""
    folder, said = tmp_path_factory.mktemp("written") / "checkpoints", []
    with Checkpoints(folder, said.append) as checkpoints:
        for step in (2, 4, 8):
            checkpoints.save(step, make_state(step), {"position": 10 * step})
    assert not said and checkpoints.failure is None
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]
    return folder


@pytest.fixture
def folder(written, tmp_path):
    return shutil.copytree(written, tmp_path / "checkpoints")


def test_what_is_read_is_what_was_written(folder, said):
    with Checkpoints(folder, said.append) as checkpoints:
        step, state, info = checkpoints.restore(as_it_was)
    assert (step, info, said) == (8, {"position": 80}, [])
    assert_is(state, 8)
    assert state["split"].sharding == sharding("x")


def test_the_plan_says_what_is_read_and_what_becomes_of_it(folder, said):
    def plan(info):
        assert info == {"position": 80}
        shapes, _ = as_it_was(info)
        shapes["split"] = jax.ShapeDtypeStruct(
            (16, 8192), "float32", sharding=sharding(None, "x")
        )
        return shapes, lambda state: {"other": state["split"]}

    with Checkpoints(folder, said.append) as checkpoints:
        _, state, _ = checkpoints.restore(plan)
    np.testing.assert_array_equal(state["other"], make_state(8)["split"])
    assert state["other"].sharding.spec == PartitionSpec(None, "x")


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path):
    path.write_bytes(b"")


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 0x10
    path.write_bytes(data)


def delete(path):
    path.unlink()


DAMAGE = {
    "arrays flipped": (flip, "largest", "does not have its checksum"),
    "arrays cut": (cut, "largest", ""),
    "arrays missing": (delete, "largest", ""),
    "index flipped": (flip, "state/manifest.ocdbt", "checksum|CRC"),
    "index empty": (empty, "state/manifest.ocdbt", ""),
    "index missing": (delete, "state/manifest.ocdbt", ""),
    "structure cut": (cut, "state/_METADATA", "JSON"),
    "info cut": (cut, "info/metadata", "JSON"),
    "info missing": (delete, "info/metadata", ""),
    "position changed": (
        lambda path: path.write_text(path.read_text().replace(": 80", ": 90")),
        "info/metadata",
        "its info does not have the checksum",
    ),
    "info is another": (
        lambda path: path.write_text("[]"),
        "info/metadata",
        "not a JSON",
    ),
    "state missing": (shutil.rmtree, "state", ""),
    "all missing": (
        lambda path: [shutil.rmtree(p) for p in path.iterdir() if p.is_dir()],
        ".",
        "",
    ),
}


@leaves_errors
@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_one_is_said_and_the_one_before_is_used(kind, folder, said):
    damage, name, reason = DAMAGE[kind]
    if name == "largest":
        files = [path for path in (folder / "8").rglob("*") if path.is_file()]
        damage(max(files, key=lambda path: path.stat().st_size))
    else:
        damage(folder / "8" / name)
    with Checkpoints(folder, said.append) as checkpoints:
        step, state, info = checkpoints.restore(as_it_was)
        assert (step, info) == (4, {"position": 40})
        assert_is(state, 4)
        assert len(said) == 1, said
        assert (
            f"{folder}/damaged-8-1" in said[0] and "that of step 4 is used" in said[0]
        )
        before, _, _ = said[0].partition("; that of step")
        assert before.startswith("the checkpoint of step 8 is damaged (")
        assert re.search(reason, before), before
        # It is out of the way of what is written now.
        checkpoints.save(8, make_state(8), {"position": 81})
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8", "damaged-8-1"]
    with Checkpoints(folder, said.append) as checkpoints:
        assert checkpoints.restore(as_it_was)[2] == {"position": 81}
    assert len(said) == 1 and checkpoints.failure is None


@leaves_errors
def test_a_bit_that_flips_anywhere_is_noticed_or_does_no_harm(written, tmp_path, said):
    rng = np.random.default_rng(0)
    names = [p.relative_to(written) for p in (written / "8").rglob("*") if p.is_file()]
    for turn, name in enumerate(sorted(names)):
        folder = shutil.copytree(written, tmp_path / str(turn))
        data = bytearray((folder / name).read_bytes())
        data[rng.integers(len(data))] ^= 1 << rng.integers(8)
        (folder / name).write_bytes(data)
        with Checkpoints(folder, said.append) as checkpoints:
            step, state, info = checkpoints.restore(as_it_was)
        assert_is(state, step)
        assert info == {"position": 10 * step}


def test_if_none_can_be_read_nothing_is_touched(folder, said):
    for step in ("4", "8"):
        cut(folder / step / "info" / "metadata")
    with (
        Checkpoints(folder, said.append) as checkpoints,
        pytest.raises(ValueError, match=r"can be read \(step 8: .*step 4: "),
    ):
        checkpoints.restore(as_it_was)
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]


def test_one_of_another_config_is_an_error_and_not_skipped(folder, said):
    def refused(info):
        raise ValueError("num_layers=3, not 2")

    def narrower(info):
        return abstract(make_state(0, width=4096)), lambda state: state

    def fewer(info):
        return {"step": abstract(make_state(0))["step"]}, lambda state: state

    def other_dtype(info):
        tree = abstract(make_state(0))
        tree["half"] = jax.ShapeDtypeStruct((300,), "float32")
        return tree, lambda state: state

    with Checkpoints(folder, said.append) as checkpoints:
        for plan, message in [
            (refused, r"num_layers=3, not 2"),
            (narrower, r"step 8 .* is of another model .*first difference: split"),
            (fewer, r"is of another model .*first difference: half"),
            (other_dtype, r"is of another model .*first difference: half"),
        ]:
            with pytest.raises(ValueError, match=message):
                checkpoints.restore(plan)
    assert not said


def test_a_half_written_one_is_never_chosen(folder, said):
    # What orbax leaves when it is killed: everything, but under the name of before.
    shutil.move(folder / "8", folder / "8.orbax-checkpoint-tmp")
    with Checkpoints(folder, said.append) as checkpoints:
        assert checkpoints.restore(as_it_was)[0] == 4
        checkpoints.save(8, make_state(8), {})
    assert sorted(path.name for path in folder.iterdir()) == ["4", "8"]
    assert not said


@contextlib.contextmanager
def full_disk(limit):
    """No file grows beyond `limit` bytes: a write fails as on a disk that is full."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))  # Python ignores SIGXFSZ
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


# In the arrays' files, in the first index, and in the first file of all.
@pytest.mark.parametrize("limit", [100_000, 400, 0])
@leaves_errors
def test_a_disk_that_is_full_costs_no_checkpoint_but_that_one(limit, folder, said):
    with Checkpoints(folder, said.append) as checkpoints:
        with full_disk(limit):
            checkpoints.save(10, make_state(10), {})
            checkpoints.wait()
            assert said[0].startswith(
                "the checkpoint of step 10 could not be written ("
            )
            assert checkpoints.failure and "\n" not in said[0] and len(said[0]) < 400
            assert {path.name for path in folder.iterdir()} >= {"4", "8"}
            checkpoints.save(12, make_state(12), {})
            checkpoints.wait()
        checkpoints.save(14, make_state(14), {"position": 140})
        checkpoints.wait()
        assert checkpoints.failure is None and len(said) == 2
        assert "step 12 could not be written" in said[1]
    with Checkpoints(folder, said.append) as checkpoints:
        step, state, _ = checkpoints.restore(as_it_was)
        # Nothing half-written, even what a thread went on with after all.
        assert sorted(path.name for path in folder.iterdir()) == ["14", "8"]
    assert step == 14
    assert_is(state, 14)


@leaves_errors
def test_a_failure_is_noticed_while_training_goes_on(folder, said):
    with Checkpoints(folder, said.append) as checkpoints, full_disk(1000):
        checkpoints.save(10, make_state(10), {})
        deadline = time.monotonic() + 60  # of a disk that is slow to fail
        while not said and time.monotonic() < deadline:
            checkpoints.poll()
    assert len(said) == 1 and "step 10 could not" in said[0]


def test_checksums_see_every_bit_and_no_layout():
    rng = np.random.default_rng(0)
    for dtype in ("float32", "bfloat16", "int32", "uint8", "bool", "float8_e4m3fn"):
        bits = rng.integers(0, 256, (8, 6, 4), np.uint8)
        if dtype == "bool":
            bits &= 1
        x = bits if dtype in ("uint8", "bool") else bits.view(jax.numpy.dtype(dtype))
        x = x.astype(bool) if dtype == "bool" else x
        before = _integrity.examine({"x": x})
        for axes in [(), ("x",), (None, None)]:
            laid_out = jax.device_put(x, sharding(*axes))
            assert _integrity.examine({"x": laid_out}) == before
            # On accelerators, where this is compiled.
            (checksum,), (number,) = _integrity._on_devices([laid_out])
            assert (checksum, not number) == before["x"]
        assert before["x"].is_finite == np.isfinite(x.astype("f")).all()
        raw = x.view(np.uint8)
        for _ in range(3):
            place = tuple(int(rng.integers(n)) for n in raw.shape)
            old = raw[place]
            raw[place] ^= 1 if dtype == "bool" else 1 << rng.integers(8)
            assert _integrity.examine({"x": x}) != before
            raw[place] = old
        assert _integrity.examine({"x": np.ascontiguousarray(x[::-1])}) != before
    assert _integrity.examine({}) == {}


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("name", ["split", "half"])
def test_what_is_not_finite_is_not_saved(name, value, folder, said):
    state = make_state(10)
    state[name] = state[name].at[3].set(value)
    with Checkpoints(folder, said.append) as checkpoints:
        with pytest.raises(FloatingPointError, match=rf"step=10 is not .* \({name}\)"):
            checkpoints.save(10, state, {})
        checkpoints.save(12, make_state(12), {})
    assert sorted(path.name for path in folder.iterdir()) == ["12", "8"]
    assert not said


def test_the_one_before_is_used_where_the_newest_is_not_finite(folder, said):
    state = make_state(10)
    state["split"] = state["split"].at[3].set(np.nan)
    arrays = _integrity.describe(state)
    for array, found in _integrity.examine(state).items():
        arrays[array]["checksum"] = found.checksum
    with ocp.CheckpointManager(folder) as manager:  # as versions before wrote it
        info = _integrity.seal({"info": {"position": 100}, "arrays": arrays})
        state_args, info_args = ocp.args.StandardSave(state), ocp.args.JsonSave(info)
        manager.save(10, args=ocp.args.Composite(state=state_args, info=info_args))
    with Checkpoints(folder, said.append) as checkpoints:
        step, state, info = checkpoints.restore(as_it_was)
    assert (step, info) == (8, {"position": 80})
    assert_is(state, 8)
    assert "checkpoint of step 10 is damaged (not finite: split); that of st" in said[0]
