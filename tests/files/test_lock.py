"""The lock of a folder that one process writes into."""

import errno
import os
import socket

from dualpipe_jax.files import Lock


def test_where_files_cannot_be_locked_the_living_process_counts(tmp_path, monkeypatch):
    def flock(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", flock)
    lock, other = Lock(tmp_path), Lock(tmp_path)
    assert lock.acquire() is None
    assert other.acquire().startswith(f"process {os.getpid()} on ")
    lock.release()
    for left in (f'{{"pid": {2**22 + 1}, "host": "{socket.gethostname()}"}}', "[", "1"):
        (tmp_path / ".lock").write_text(left)  # of no process: above Linux's largest
        assert lock.acquire() is None
        lock.release()
