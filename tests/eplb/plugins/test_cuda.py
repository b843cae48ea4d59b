"""jax's plugin for CUDA says nothing where there is no GPU, and compiles for others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from eplb_jax import plugins

ROOT = Path(__file__).parents[3]
NOISE = (
    b"WARNING: All log messages before absl::InitializeLog() is called are written "
    b"to STDERR\nI0000 00:00:1.5 1 cudart_stub.cc:31] Could not find cuda drivers on "
    b"your machine, GPU will not be used.\n"
)


@pytest.mark.parametrize(
    "code",
    [
        # The devices first, which is when jax loads its plugins.
        "import jax, dualpipe_jax as d; jax.devices(); d.gpu_mesh('h100', {'ep': 2})",
        "from dualpipe_jax.commands import main; main.main(['report', 'no-run'])",
    ],
)
def test_programs_start_without_messages(code):
    env = {k: v for k, v in os.environ.items() if not k.startswith("JAX_")}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True
    )
    assert done.returncode == 0, done.stderr
    assert b"Traceback" not in done.stderr and b"plugin" not in done.stderr
    if "main" in code:
        assert done.stderr.count(b"\n") == 1 and b"no-run is not the f" in done.stderr


def test_what_others_write_is_kept(capfd):
    with plugins.without_messages():
        os.write(2, b"before\n" + NOISE + b"WARNING: All is well\n")
        os.write(2, b"mine\n")
        os.write(2, NOISE)
    assert capfd.readouterr().err == "before\nWARNING: All is well\nmine\n"
    with pytest.raises(ZeroDivisionError), plugins.without_messages():
        os.write(2, b"before\n")
        raise ZeroDivisionError
    assert capfd.readouterr().err == "before\n"
