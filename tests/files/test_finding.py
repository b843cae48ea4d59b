"""Which files paths name, and their order."""

import os

import pytest

from dualpipe_jax.files import find_files, finding, in_mixed_order


@pytest.fixture
def folder(tmp_path):
    """Thirty files, some in a subfolder, and what is to be left out."""
    for i in range(30):
        path = tmp_path / ("sub" if i % 3 else ".") / f"{i:02}.txt"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "config").touch()
    (tmp_path / ".hidden").touch()
    return tmp_path


def test_the_order_depends_on_names_only(folder, monkeypatch):
    files = find_files([folder])
    assert len(files) == 30 and files == sorted(files)
    walk = os.walk

    def backwards(*args):
        for parent, folders, names in walk(*args):
            folders.reverse()
            yield parent, folders, names[::-1]

    monkeypatch.setattr(finding.os, "walk", backwards)
    assert find_files([folder]) == files
    mixed = in_mixed_order(files)
    assert mixed == in_mixed_order(files) != files and sorted(mixed) == files


def test_what_is_no_file_is_left_out(folder):
    before = find_files([folder])
    os.mkfifo(folder / "pipe")  # to open it would wait for a writer
    (folder / "link").symlink_to(folder / "nowhere")
    (folder / "loop").symlink_to(folder / "loop")
    assert find_files([folder]) == before
    with pytest.raises(ValueError, match="pipe is not a file or folder"):
        find_files([folder / "pipe"])
