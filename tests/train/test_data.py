"""What is read, what is held out, and the order in which sequences come."""

import sysconfig
from pathlib import Path

import numpy as np
import pytest

from dualpipe_jax.files import stdlib_files
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


def test_a_hidden_file_is_read_if_it_is_named(folder):
    text = data.load_text([folder / ".hidden"], sequence_length=2)
    assert set(text.train.tolist()) == {0xFE}


def test_the_default_is_the_standard_library():
    text = data.load_text(sequence_length=128)
    assert text.train.size > 5_000_000
    root = Path(sysconfig.get_path("stdlib"))
    names = {path.relative_to(root).as_posix() for path in stdlib_files()}
    assert {"argparse.py", "json/decoder.py"} <= names
    left_out = {"site-packages", "test", "tests", "__pycache__"}
    assert all(left_out.isdisjoint(name.split("/")) for name in names)
    assert (root / "argparse.py").read_bytes()[:500] in bytes(
        np.concatenate([text.train, text.held_out])
    )


def test_a_batch_depends_on_seed_and_position_only():
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)

    def batch(seed, position):
        return data.train_batch(text, (3, 2), 16, seed=seed, position=position)

    inputs, targets = batch(7, 40)
    assert inputs.shape == targets.shape == (3, 2, 16) and inputs.dtype == np.int32
    np.testing.assert_array_equal(inputs[..., 1:], targets[..., :-1])
    batch(7, 46)
    np.testing.assert_array_equal(batch(7, 40)[0], inputs)
    assert not np.array_equal(batch(7, 46)[0], inputs)
    assert not np.array_equal(batch(8, 40)[0], inputs)


def test_batches_of_any_size_go_through_one_order():
    text = np.random.default_rng(0).integers(0, 256, 5000).astype(np.uint8)

    def sequences(sizes, position=0):
        for size in sizes:
            batch, _ = data.train_batch(text, (size, 1), 8, seed=3, position=position)
            yield from batch[:, 0].tolist()
            position += size

    whole = list(sequences([2000]))  # three epochs
    assert list(sequences([6] * 100 + [1, 31, 400, 968])) == whole
    assert list(sequences([50], position=1500)) == whole[1500:1550]


# Sizes at which an epoch has one window, two, and a number that is no power of two.
@pytest.mark.parametrize("size", [9, 10, 16, 23, 24, 31, 32, 500, 1029])
def test_an_epoch_visits_each_window_once(size):
    length = 8
    per_epoch = max(1, size // length - 1)
    numbers = np.arange(400 * per_epoch)
    starts = data.window_starts(numbers, size, length, seed=5).reshape(-1, per_epoch)
    assert starts.min() >= 0 and starts.max() + length < size
    in_order = np.sort(starts, axis=1)
    assert (np.diff(in_order, axis=1) == length).all()  # side by side: no overlap
    # Offsets of 400 epochs: each of at most eight is missed with odds of 1e-23.
    num_offsets = min(length, size - per_epoch * length)
    assert set(in_order[:, 0].tolist()) == set(range(num_offsets))
    if per_epoch > 20:
        assert len({tuple(epoch) for epoch in (starts - in_order[:, :1]).tolist()}) > 99


def test_the_order_is_as_good_as_a_random_one():
    # Over many epochs, each window must come as often in each place (chi-squared).
    per_epoch, epochs = 12, 6000
    numbers = np.arange(per_epoch * epochs)
    starts = data.window_starts(numbers, 13 * 8, 8, seed=0).reshape(epochs, -1)
    windows = starts // 8
    counts = np.stack([np.bincount(column, minlength=13) for column in windows.T])
    expected = epochs / per_epoch
    chi2 = ((counts[:, :12] - expected) ** 2 / expected).sum()
    assert counts.sum() == epochs * per_epoch and counts[:, 12].sum() == 0
    # 11 x 11 degrees of freedom: mean 121, deviation 15.6; five of them above.
    assert chi2 < 121 + 5 * 15.6
    # And which window follows which, within an epoch.
    pairs = np.zeros((12, 12))
    np.add.at(pairs, (windows[:, :-1].ravel(), windows[:, 1:].ravel()), 1)
    others = pairs[~np.eye(12, dtype=bool)]
    assert np.diag(pairs).sum() == 0
    expected = others.mean()
    assert ((others - expected) ** 2 / expected).sum() < 131 + 5 * 16.2


def test_positions_beyond_32_bits_and_data_that_is_not_there():
    # A trillion tokens: an order in a table would take 200 GB.
    numbers = np.arange(1000) + 2**40
    starts = data.window_starts(numbers, 10**12, 4096, seed=1)
    assert len(np.unique(starts)) == 1000 and starts.max() < 10**12 - 4096
    assert starts.max() > 0.98e12 and starts.min() < 0.02e12
    assert not np.array_equal(
        starts, data.window_starts(numbers - 2**32, 10**12, 4096, seed=1)
    )


@pytest.mark.parametrize("size", [9, 10, 500])
def test_held_out_windows_reach_both_ends(size):
    text = (np.arange(size) % 251).astype(np.uint8)
    inputs, targets = data.held_out_batch(text, (2, 4), 8)
    assert inputs[0, 0, 0] == text[0] and targets[-1, -1, -1] == text[-1]
    np.testing.assert_array_equal(targets, (inputs + 1) % 251)


@pytest.mark.parametrize("dtype", ["uint16", "int32", "uint32", "int64"])
def test_token_files_are_mapped(dtype, tmp_path):
    tokens = np.random.default_rng(0).integers(0, 60_000, 3000).astype(dtype)
    np.save(tmp_path / "a.npy", tokens)
    text = data.load_text([tmp_path / "a.npy"], sequence_length=16)
    assert isinstance(text.train, np.memmap) and text.unit == "token"
    assert "(1 file, 0.0 M tokens)" in text.source
    np.testing.assert_array_equal(np.concatenate([text.train, text.held_out]), tokens)
    inputs, targets = data.train_batch(text.train, (2, 2), 16, seed=0, position=0)
    assert inputs.dtype == targets.dtype == np.int32 and inputs.max() > 256
    np.save(tmp_path / "b.npy", tokens[:500])
    assert data.load_text([tmp_path], sequence_length=16).train.size == 3325


def test_bad_token_files_are_named(tmp_path):
    def load(*names):
        return data.load_text([tmp_path / name for name in names], sequence_length=8)

    def save(name, *args):
        np.save(tmp_path / name, np.array(*args))

    save("good.npy", range(100), "i4")
    (tmp_path / "text.txt").write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"tokens .*good.npy.* and text .*text.txt"):
        load("good.npy", "text.txt")
    save("float.npy", [1.0] * 100)
    with pytest.raises(ValueError, match=r"float.npy holds float64 .*must hold int"):
        load("float.npy")
    save("flat.npy", [[1] * 100])
    with pytest.raises(ValueError, match=r"flat.npy holds int64 of shape \(1, 100\)"):
        load("flat.npy")
    save("short.npy", [1] * 100, "u2")
    with pytest.raises(ValueError, match=r"holds (uint16|int32), but .*; save all wi"):
        load("good.npy", "short.npy")
    (tmp_path / "noise.npy").write_bytes(b"no numpy file")
    with pytest.raises(ValueError, match=r"noise.npy is not a readable .npy file"):
        load("noise.npy")
    cut = (tmp_path / "good.npy").read_bytes()[:-40]
    (tmp_path / "cut.npy").write_bytes(cut)
    with pytest.raises(ValueError, match=r"cut.npy is not a readable .npy file"):
        load("cut.npy")
    for bad in (-5, 2**31):
        save("outside.npy", [bad] * 200, "i8")
        text = load("outside.npy")
        with pytest.raises(ValueError, match=rf"tokens from {bad} to {bad}; each must"):
            data.train_batch(text.train, (1, 1), 8, seed=0, position=0)


def test_bad_data_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"nothing-here is not a file or folder; give"):
        data.load_text([tmp_path / "nothing-here"], sequence_length=8)
    with pytest.raises(ValueError, match=r"hold no file; give"):
        data.load_text([tmp_path], sequence_length=8)
    (tmp_path / "a").touch()
    with pytest.raises(ValueError, match=r"data is empty: .*1 file,.*give --data"):
        data.load_text([tmp_path], sequence_length=8)
    (tmp_path / "b").write_bytes(b"x" * 100)
    with pytest.raises(
        ValueError, match=r"100 bytes, of which 5 .* takes 9; give more"
    ):
        data.load_text([tmp_path], sequence_length=8)
