"""Runs a document from top to bottom, in a separate folder, as readers do."""

import contextlib
import doctest
import io
import os
import re
import shlex
import subprocess
import sys

import jax

import dualpipe_jax.commands.main
import eplb_jax.commands.main
from tests.docs.blocks import ROOT, blocks_of, commands_of

# Commands that need machines, or more time than a test has; only their arguments are
# parsed, and their configs loaded.
NOT_RUN = {
    "python -m dualpipe_jax overlap profiles:training --gpu h800 --trace steady.json": (
        "compiles for seven minutes of a core"
    ),
    "python -m dualpipe_jax overlap profiles:decode --gpu h800": "compiles as long",
    "python -m dualpipe_jax memory deepseek_v3 --gpu h800": "compiles for six minutes",
    "python -m dualpipe_jax train configs/small.py --data texts.txt": "needs a GPU",
    'python -c "import transformers as t; print(t.AutoModelForCausalLM'
    ".from_pretrained('finetuned').num_parameters())\"": "needs torch",
}
# Cheap commands, which start no threads and change no settings of jax.
_IN_PROCESS = {
    "dualpipe_jax": (
        dualpipe_jax.commands.main,
        {"schedule", "simulate", "choose", "trace", "report"},
    ),
    "eplb_jax": (eplb_jax.commands.main, {"rebalance", "replay"}),
}
# Commands that measure, and the parts of their output that vary between runs.
_MEASURES = re.compile(r" (train|serve) |^make ")
_TIMES = re.compile(
    r"[\d,.]+(?= (?:ms|s|min|tokens/s)\b)|(?<=^tokens/s {7})[\d,]+", re.M
)


class Runner:
    """A folder with the files of a checkout, and those that a document creates.

    Args:
      folder: an empty folder.
      special: maps the first words of a command to a function of (command, runner) that
        runs it in place of a shell.
      env: environment variables besides the process's.
      configs: whether the folder has the checkout's configs.
    """

    def __init__(self, folder, *, special=None, env=None, configs=True):
        self.folder = folder
        self.special = special or {}
        for name in ["tests", "benchmarks", "docs"] + ["configs"] * configs:
            (folder / name).symlink_to(ROOT / name)
        python = folder / ".bin" / "python"
        python.parent.mkdir()
        python.write_text(f'#!/bin/sh\nexec "{sys.executable}" "$@"\n')
        python.chmod(0o755)
        self.env = without_make(os.environ) | (env or {})
        # Commands request as many devices as they need.
        self.env["XLA_FLAGS"] = (env or {}).get("XLA_FLAGS", "")
        self.env["PATH"] = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
        self.env["PYTHONPATH"] = str(ROOT)

    def run(self, document):
        """Runs all blocks of a document that can be run."""
        names = {}
        with contextlib.chdir(self.folder), jax.numpy_dtype_promotion("standard"):
            # As for readers: optax mixes floats with integer counts.
            for block in blocks_of(document):
                if block.language == "python":
                    self._python(block, names)
                elif block.language == "console":
                    for command in commands_of(block):
                        self.check(command)

    def _python(self, block, names):
        """Writes a file if the first line is a comment with its name, else runs it."""
        if file := re.match(r"# ([\w/]+\.py)\n", block.text):
            (self.folder / file[1]).write_text(block.text)
            return
        test = doctest.DocTestParser().get_doctest(
            block.text, names, block.where, block.document, block.line
        )
        assert test.examples, f"{block.where} has neither prompts nor a file name."
        report: list[str] = []
        runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
        runner.run(test, out=report.append, clear_globs=False)
        names.update(test.globs)
        assert not runner.failures, "".join(report)

    def check(self, command):
        """Runs a command, and compares its output with the document's, if shown."""
        for words, function in self.special.items():
            if words in command.text:
                function(command, self)
                return
        self.run_and_compare(command)

    def run_and_compare(self, command):
        """Does the same for commands that are not special."""
        if command.text in NOT_RUN:
            return
        if command.text.startswith("make "):
            command = command._replace(text=f"make -n -C {ROOT} {command.text[5:]}")
        got = _in_process(command)
        got = self.shell(command.text) if got is None else got
        if command.output and not command.text.startswith("make "):
            assert_alike(command.output, got, command)

    def shell(self, text):
        """Runs a command line; returns its output."""
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", text],
            cwd=self.folder,
            env=self.env,
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{text}\n{done.stdout}\n{done.stderr}"
        return done.stdout


def without_make(env):
    """The environment of a command that is not part of the `make` that runs the tests.

    That one hands its flags and variables to every make below it: `make test ARGS=...`
    would be `make train ARGS=...`.
    """
    names = re.findall(r"^(\w+) \?=", (ROOT / "Makefile").read_text(), re.M)
    flags = ("MAKEFLAGS", "MFLAGS", "MAKEOVERRIDES", "MAKELEVEL", "ARGS")
    return {name: x for name, x in env.items() if name not in {*names, *flags}}


def _in_process(command):
    """Returns the output of a command that can run in this process, else None."""
    words = shlex.split(command.text.replace("\\\n", ""))
    if words[:2] != ["python", "-m"] or set("|&;<>") & set(command.text):
        return None
    cli, names = _IN_PROCESS.get(words[2], (None, ()))
    if cli is None or words[3] not in names:
        return None
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        status = cli.main(words[3:])
    assert status == 0, f"{command.where}: {command.text}\n{printed.getvalue()}"
    return printed.getvalue()


def without_times(text):
    """Removes times and tokens per second, which vary."""
    return without_trailing_space(_TIMES.sub("TIME", text))


def without_trailing_space(text):
    """Removes trailing space, as editors may do."""
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def assert_alike(expected, got, command):
    """Compares outputs: `...` matches anything, and measured values any others."""
    clean = without_times if _MEASURES.search(command.text) else without_trailing_space
    alike = doctest.OutputChecker().check_output(
        clean(expected), clean(got), doctest.ELLIPSIS
    )
    message = f"{command.where}: {command.text}\nexpected:\n{expected}\ngot:\n{got}"
    assert alike, message
