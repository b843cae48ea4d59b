"""`serve --http`: its options, and how it ends while it loads."""

import re
import subprocess
import sys
import threading

import pytest

from dualpipe_jax.api import bind
from dualpipe_jax.commands import main as cli
from tests.test_architecture import ROOT

CONFIG = """
from dualpipe_jax.deepseek import DeepSeekConfig
from dualpipe_jax.deepseek.serve import ServeConfig

def config():
    architecture = DeepSeekConfig.from_pretrained({folder!r})
    return ServeConfig(
        name="lite", architecture=architecture, num_devices=2, requests_per_device=2,
        context_length=32, platform="cpu")
"""
PRETRAINED = str(ROOT / "tests" / "data" / "deepseek_v2_lite")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["prompts.txt"], "--http takes prompts from clients"),
        (["--metrics", "x"], "leave FILE, --profile and --metrics out"),
        (["--max-waiting", "-1"], "--max-waiting -1 must be at least 0"),
        (["--max-seconds", "0"], "--max-seconds 0 above 0"),
        (["--max-seconds", "nan"], "--max-seconds nan above 0"),
        (["--api-key", ""], "--api-key must be printable ASCII, and not empty"),
        (["--api-key", "@nowhere"], "nowhere"),
        (["--host", "192.0.2.1"], "cannot listen at 192.0.2.1:0"),
    ],
)
def test_options_are_refused_before_anything_is_loaded(options, message, capsys):
    argv = ["serve", "tiny_server", *options, "--run", "nowhere", "--http", "0"]
    assert cli.main(argv) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_port_in_use(capsys):
    with bind("127.0.0.1", 0) as taken:
        taken.listen()
        port = str(taken.getsockname()[1])
        argv = ["serve", "tiny_server", "--run", "nowhere", "--http", port]
        assert cli.main(argv) == 2
    assert f"127.0.0.1:{port}: Address already in use" in capsys.readouterr().err


@pytest.mark.slow
def test_sigterm_while_the_model_loads(tmp_path):
    (tmp_path / "lite.py").write_text(CONFIG.format(folder=PRETRAINED))
    (tmp_path / "prompts.txt").write_text("1 2 3\n")
    ends = {}

    def run(name, *options):
        command = [sys.executable, "-m", "dualpipe_jax", "serve"]
        command += [f"{tmp_path / 'lite.py'}:config"]
        command += [*options, "--pretrained", PRETRAINED, "--no-cache"]
        with subprocess.Popen(
            command, cwd=ROOT, stderr=subprocess.PIPE, text=True
        ) as process:
            said = ""
            for line in process.stderr:
                said += line
                if line.startswith("compiling"):
                    process.terminate()
        ends[name] = process.returncode, said

    threads = [
        threading.Thread(target=run, args=("file", str(tmp_path / "prompts.txt"))),
        threading.Thread(target=run, args=("http", "--http", "0")),
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    status, said = ends["file"]
    assert status == 1, said
    assert said.endswith("no prompt was served, the model was still loading\n")
    status, said = ends["http"]
    assert status == 0 and "Traceback" not in said
    assert re.search("SIGTERM: 0 requests run on, new ones are refused\n", said)
