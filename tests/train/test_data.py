"""Which bytes are read, which are held out, and that a step's batch is its own."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dualpipe_jax.train import data


@pytest.fixture
def folder(tmp_path):
    """Thirty files of one letter each, some in a subfolder, and what is to be left."""
    for i in range(30):
        path = tmp_path / ("sub" if i % 3 else ".") / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(bytes([i]) * 100)
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").write_bytes(b"\xff" * 100)
    (tmp_path / ".hidden").write_bytes(b"\xfe" * 100)
    return tmp_path


def test_every_byte_is_either_trained_on_or_held_out(folder):
    text = data.load_text([folder], sequence_length=8, held_out_fraction=0.1)
    assert text.train.size == 2700 and text.held_out.size == 300
    counts = np.bincount(np.concatenate([text.train, text.held_out]), minlength=256)
    assert (counts[:30] == 100).all() and counts.sum() == 3000
    # A sample of whole files, and not those with the last names.
    held_out = set(text.held_out.tolist())
    assert len(held_out) == 3 and held_out != {27, 28, 29}


def test_the_order_of_files_depends_on_their_names_only(folder, monkeypatch):
    first = data.load_text([folder], sequence_length=8)
    walk = data.os.walk

    def backwards(*args):
        for parent, folders, names in walk(*args):
            folders.reverse()
            yield parent, folders, names[::-1]

    monkeypatch.setattr(data.os, "walk", backwards)
    again = data.load_text([folder], sequence_length=8)
    np.testing.assert_array_equal(again.train, first.train)
    np.testing.assert_array_equal(again.held_out, first.held_out)


def test_a_hidden_file_is_read_if_it_is_named(folder):
    text = data.load_text([folder / ".hidden"], sequence_length=2)
    assert set(text.train.tolist()) == {0xFE}


def test_the_default_is_the_standard_library():
    text = data.load_text(sequence_length=128)
    assert text.train.size > 5_000_000
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for path in data.stdlib_files()}
    assert {"argparse.py", "json/decoder.py"} <= names
    left_out = {"site-packages", "test", "tests", "__pycache__"}
    assert all(left_out.isdisjoint(name.split("/")) for name in names)
    assert (root / "argparse.py").read_bytes()[:500] in bytes(
        np.concatenate([text.train, text.held_out])
    )


def test_a_batch_depends_on_seed_and_step_only():
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)

    def batch(seed, step):
        return data.sample_batch(text, (3, 2), 16, seed=seed, step=step)

    inputs, targets = batch(7, 40)
    assert inputs.shape == targets.shape == (3, 2, 16) and inputs.dtype == np.int32
    np.testing.assert_array_equal(inputs[..., 1:], targets[..., :-1])
    batch(7, 41)
    np.testing.assert_array_equal(batch(7, 40)[0], inputs)
    assert not np.array_equal(batch(7, 41)[0], inputs)
    assert not np.array_equal(batch(8, 40)[0], inputs)


@pytest.mark.parametrize("size", [9, 10, 500])
def test_windows_reach_both_ends_and_stay_inside(size):
    text = np.arange(size) % 251
    text = text.astype(np.uint8)
    inputs, targets = data.held_out_batch(text, (2, 4), 8)
    assert inputs[0, 0, 0] == text[0] and targets[-1, -1, -1] == text[-1]
    starts = set()
    for step in range(200):
        inputs, targets = data.sample_batch(text, (1, 8), 8, seed=0, step=step)
        np.testing.assert_array_equal(targets, (inputs + 1) % 251)
        starts |= set(inputs[..., 0].ravel().tolist())
    if size < 11:
        assert starts == set(range(size - 8))


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing-here is no file or folder; give"):
        data.load_text([tmp_path / "nothing-here"], sequence_length=8)
    with pytest.raises(ValueError, match=r"hold no file; give"):
        data.load_text([tmp_path], sequence_length=8)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"data is empty: .*1 files.*give --data"):
        data.load_text([tmp_path], sequence_length=8)
    (tmp_path / "b").write_bytes(b"x" * 100)
    with pytest.raises(
        ValueError, match=r"100 bytes, of which 5 .* takes 9; give more"
    ):
        data.load_text([tmp_path], sequence_length=8)
