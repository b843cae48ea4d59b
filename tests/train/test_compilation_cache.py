"""Compiled programs are kept and found again; whatever fails there costs a line."""

import contextlib
import os
import resource
import sys
import warnings
from pathlib import Path

import jax
import pytest
from jax.experimental.compilation_cache import compilation_cache as jax_cache

from dualpipe_jax import compat
from dualpipe_jax.train.compilation_cache import (
    compilation_cache,
    default_folder,
    prune,
)

SETTINGS = (
    "jax_enable_compilation_cache",
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A jax that was told of no cache, and a user's caches in an empty folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "caches"))
    monkeypatch.setattr(sys, "platform", "linux")
    before = {name: jax.config.values[name] for name in SETTINGS}
    jax.config.update("jax_compilation_cache_dir", None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 1.0)
    jax_cache.reset_cache()
    yield tmp_path
    for name, value in before.items():
        jax.config.update(name, value)
    jax_cache.reset_cache()


@pytest.fixture
def lines():
    return []


def compile_something(factor=3.0):
    """Compiles one program, which jax has to look for on the disk; runs it."""
    jax.clear_caches()

    def triple(x):
        return factor * x

    assert jax.jit(triple)(2.0) == 2 * factor


def entries(folder=None):
    folder = folder or default_folder()
    return {path.name for path in folder.glob("jit_triple-*-cache")}


@contextlib.contextmanager
def counted(event):
    """Counts jax's events of a kind, while the block runs."""
    counts = []

    def listener(name, **_):
        if name == f"/jax/compilation_cache/{event}" and open_:
            counts.append(name)

    open_ = [True]
    jax.monitoring.register_event_listener(listener)
    yield counts
    open_.clear()


def test_a_program_is_found_the_second_time(lines):
    with compilation_cache(lines.append):
        compile_something()
    assert len(entries()) == 1
    with compilation_cache(lines.append), counted("cache_hits") as hits:
        compile_something()
        assert len(hits) >= 1
        compile_something(factor=4.0)
    assert len(entries()) == 2 and not lines
    assert default_folder().stat().st_mode & 0o077 == 0  # nobody else's code is loaded


def test_jax_is_as_before_afterwards(lines):
    before = {name: jax.config.values[name] for name in SETTINGS}
    with pytest.raises(KeyError), compilation_cache(lines.append):
        raise KeyError
    assert {name: jax.config.values[name] for name in SETTINGS} == before
    compile_something()
    assert not entries()


def test_a_cache_that_jax_was_told_of_is_used_as_it_is(home, lines):
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    with compilation_cache(lines.append):
        compile_something()  # in less than a second, so it is not kept
    assert not default_folder().exists() and not entries(home / "mine")
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with compilation_cache(lines.append):
        compile_something()
    assert not default_folder().exists() and len(entries(home / "mine")) == 1


@pytest.mark.parametrize("configured", [False, True])
def test_no_cache_reads_and_writes_nothing(home, lines, configured):
    if configured:
        jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with compilation_cache(lines.append, enabled=False):
        compile_something()
    assert not default_folder().exists() and not (home / "mine").exists()


def test_a_folder_that_cannot_be_made_is_a_line(home, lines):
    (home / "caches").write_text("a file")
    with compilation_cache(lines.append):
        compile_something()
    (line,) = lines
    assert line.startswith("compiled programs are not kept (")
    assert "set JAX_COMPILATION_CACHE_DIR to a folder" in line


def test_a_user_without_a_home_has_no_cache(monkeypatch, lines):
    def no_home():
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setattr(Path, "home", no_home)
    with compilation_cache(lines.append):
        compile_something()
    assert len(lines) == 1 and "Could not determine home" in lines[0]


def test_a_disk_that_is_full_is_a_line(lines):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    with compilation_cache(lines.append):
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
        try:
            compile_something()
            compile_something(factor=4.0)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        (line,) = lines
        assert line.startswith("compiled programs cannot be kept: OSError: ")
        # What was written of an entry is gone, so that it can be written later.
        assert not entries()
        compile_something()
    assert len(entries()) == 1


def test_a_damaged_entry_is_compiled_and_written_again(lines):
    with compilation_cache(lines.append):
        compile_something()
        (path,) = default_folder().glob("jit_triple-*-cache")
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])  # killed while it was written
        compile_something()
        (line,) = lines
        assert line.startswith("a program in the compilation cache cannot be read: ")
    assert len(path.read_bytes()) > len(whole) // 2
    with compilation_cache(lines.append), counted("cache_hits") as hits:
        compile_something()
    assert len(hits) >= 1 and len(lines) == 1


def test_entries_of_the_users_own_folder_are_never_deleted(home, lines):
    jax.config.update("jax_compilation_cache_dir", str(home / "mine"))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    with compilation_cache(lines.append):
        compile_something()
        (path,) = (home / "mine").glob("jit_triple-*-cache")
        path.write_bytes(b"damaged")
        compile_something()
    assert path.read_bytes() == b"damaged" and len(lines) == 1


def test_other_warnings_stay_warnings(lines):
    with (
        compilation_cache(lines.append),
        pytest.warns(UserWarning, match="something else"),
    ):
        warnings.warn("something else", stacklevel=1)
    assert not lines


def test_programs_are_found_by_the_topology_that_is_given(lines):
    """What all processes of a machine do, whose own topologies have other hashes."""
    own, found = [], []
    with compilation_cache(lines.append), counted("cache_hits") as hits:
        for number in (7, 8, 7):

            def choose(hashed, number=number):
                own.append(hashed)
                return number

            before = len(hits)
            with compat.cache_keys_for_topology(choose):
                compile_something()
            found.append(len(hits) > before)
    # The third finds what the first has written, and the second does not.
    assert found == [False, False, True] and len(set(own)) == 1
    assert len(entries()) == 2


def test_the_entries_used_longest_ago_make_room(tmp_path):
    for age, name in enumerate(("newest", "middle", "oldest")):
        path = tmp_path / f"jit_{name}-0-cache"
        path.write_bytes(b"0" * 100)
        os.utime(path, (1000 - age, 500))
    (tmp_path / "other").write_bytes(b"0" * 1000)

    def left():
        return sorted(path.name.split("-")[0] for path in tmp_path.iterdir())

    prune(tmp_path, 300)
    assert len(left()) == 4
    prune(tmp_path, 299)
    assert left() == ["jit_middle", "jit_newest", "other"]
    prune(tmp_path, 0)
    assert left() == ["other"]


def test_the_folder_is_where_a_system_has_its_caches(monkeypatch, home):
    assert default_folder() == home / "caches" / "dualpipe_jax"
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # is to be ignored
    assert default_folder() == home / ".cache" / "dualpipe_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert default_folder() == home / ".cache" / "dualpipe_jax"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert default_folder() == home / "Library" / "Caches" / "dualpipe_jax"
