"""Commands in the documents that train, and those that need a trained model."""

import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading

from tests.docs.blocks import ROOT
from tests.docs.running import assert_alike, without_times

# Replaces configs/tiny.py where only a command's effect on a run matters.
SMALL = '''"""The commands' own config, with a model that compiles quickly."""

import dataclasses
import os

from tests.train import tiny


def config():
    return dataclasses.replace(
        tiny.config(), mesh={"pp": 4, "ep": 2}, num_microbatches=8,
        num_steps=int(os.environ.get("NUM_STEPS", 200)),
        checkpoint_every=20, eval_every=20, platform="cpu")
'''
# XLA's messages, such as slow compilation on a busy machine.
_LOG = re.compile(r"[EWIF]\d{4} |\*{10}|\[Compiling module|WARNING: All log messages")
_NUMBER = re.compile(r"\d[\d.,]*")


def start(words, runner):
    """Starts a process whose output is read while it runs."""
    return subprocess.Popen(
        words,
        cwd=runner.folder,
        env=runner.env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        bufsize=1,
        start_new_session=True,
    )


def without_logs(lines):
    return [line for line in lines if line and not _LOG.match(line)]


def stop_after_a_step(process, timeout=900):
    """Interrupts a run after it has printed a step; returns its lines."""
    late = threading.Timer(timeout, process.kill)
    late.start()
    try:
        lines = []
        for line in process.stdout:
            lines.append(line.rstrip())
            if line.startswith("step ") and "loss" in line:
                break
        process.send_signal(signal.SIGINT)
        lines += [line.rstrip() for line in process.communicate()[0].splitlines()]
    finally:
        late.cancel()
        process.kill()
    assert process.returncode == 0, "\n".join(lines)
    return without_logs(lines)


def train(command, runner):
    """Trains a few steps; or more, if the document stops the command."""
    if not re.search("killed|Ctrl-C", command.comment):
        runner.shell(f"export NUM_STEPS=40\n{command.text}")
        return
    lines = stop_after_a_step(start(["bash", "-c", f"exec {command.text}"], runner))
    assert any("--resume continues" in line for line in lines), "\n".join(lines)


def of_a_run(command, runner):
    """Runs a command that needs a run: any that the document made before will do."""
    folder = runner.folder / "runs"
    if not (folder / "tiny").exists():
        shutil.copytree(next(folder.iterdir()), folder / "tiny")
    runner.run_and_compare(command)


def make_train(command, runner):
    """Trains the real model until it prints its first step, and compares the output.

    The run's folder stays, for later commands. The document shows a terminal, on which
    nothing is left of the line that says what compiles.
    """
    recipe = subprocess.run(
        ["make", "-n", "-C", str(ROOT), "--no-print-directory", "train"],
        env=runner.env,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()[-1]
    words = shlex.split(recipe)
    assert words[0].endswith("bin/python"), recipe
    lines = stop_after_a_step(start([sys.executable, *words[1:]], runner))
    lines = lines[next(i for i, x in enumerate(lines) if x.startswith("stage ")) :]
    lines = [line for line in lines if not line.startswith("compiling ")]

    shown = command.output.splitlines()
    head, steps, summary = _parts(shown)
    got_head, got_steps, got_summary = _parts(lines)
    # The standard library, the text, differs between Python versions.
    same_text = _text_of(head[-1]) == _text_of(got_head[-1])
    assert_alike("\n".join(head[:-1]), "\n".join(got_head[:-1]), command)
    assert _masked(head[-1]) == _masked(got_head[-1])

    said = {_label(line): line for line in [*steps, *summary]}
    first, got_first = said[_label(got_steps[0])], got_steps[0]
    assert _masked(first) == _masked(got_first)
    for name, tolerance in {"loss": 0.3, "balancedness": 0.1}.items():
        # Half of the last digit shown, and differences in rounding between CPUs.
        error = abs(_value(name, first) - _value(name, got_first))
        assert error <= (0.011 if same_text else tolerance), (first, got_first)
    begun, got_begun = said["loss"], got_summary[1]
    error = abs(_value("first step", begun) - _value("first step", got_begun))
    assert error <= (0.0011 if same_text else 0.3), (begun, got_begun)
    # A stopped run ends with the same lines as a whole one.
    for line in got_summary[1:]:
        if _label(line) != "files":
            assert _masked(said[_label(line)]) == _masked(line)


def serve(command, runner):
    """Masks completions: they depend on the weights, here after a few steps only."""
    prompts = (
        re.search(r"printf '(.*?)'", command.text)[1].encode().decode("unicode_escape")
    )
    first, *_, last = command.output.splitlines()
    texts = [f"{prompt}..." for prompt in prompts.splitlines()]
    pattern = "\n".join([first, *texts, re.sub(r"(?<=balancedness ).*", "...", last)])
    assert_alike(pattern, command.output, command)
    # The last line is for the reader, and not part of the output.
    printed = without_logs(runner.shell(f"{command.text} 2>&1").splitlines())
    # As on a terminal, see above.
    printed = [line for line in printed if not line.startswith("compiling ")]
    assert_alike(pattern, "\n".join(printed), command)


def _parts(lines):
    """Returns the lines before the first step, of steps, and after them."""
    is_step = [line.startswith("step ") and "loss" in line for line in lines]
    first, last = is_step.index(True), len(lines) - is_step[::-1].index(True)
    return lines[:first], [x for x in lines[first:last] if x != "..."], lines[last:]


def _text_of(line):
    return re.search(r"\(\d+ files, .*? MB\)", line)[0]


def _label(line):
    return " ".join(line.split()[:2]) if line.startswith("step") else line.split()[0]


def _masked(line):
    return _NUMBER.sub("NUMBER", without_times(line))


def _value(name, line):
    return float(re.search(rf"{name} ([\d.]+)", line)[1])
