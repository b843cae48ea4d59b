"""Runs or checks every block of the documents against what they show.

`running.NOT_RUN` lists the commands that are not run.
"""

import argparse
import json
import re
import subprocess

import pytest
import yaml

from dualpipe_jax.commands import main as cli
from dualpipe_jax.train.config import StepConfig, load_as
from tests.docs import training
from tests.docs.blocks import (
    DOCUMENTS,
    LANGUAGES,
    ROOT,
    all_commands,
    blocks_of,
    commands_of,
    read,
)
from tests.docs.running import NOT_RUN, Runner

# These need a run of the real model, which takes minutes: one test runs it.
OF_A_RUN = ["README.md", "docs/serving.md"]
QUICK = {"CONTRIBUTING.md", "CHANGELOG.md"}


def others():
    for document in DOCUMENTS:
        languages = {block.language for block in blocks_of(document)}
        if document not in OF_A_RUN and languages & {"python", "console"}:
            marks = [] if document in QUICK else [pytest.mark.slow]
            yield pytest.param(document, marks=marks)


@pytest.mark.parametrize("document", DOCUMENTS)
def test_blocks_are_of_a_language_that_is_run_or_checked(document):
    for block in blocks_of(document):
        assert block.language in LANGUAGES, f"{block.where}: {block.language!r}"
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            assert all(yaml.safe_load_all(block.text)), block.where
        elif block.language == "bash":
            check = subprocess.run(["bash", "-n"], input=block.text, text=True)
            assert check.returncode == 0, block.where
        elif block.language == "console":
            assert block.text.startswith("$ "), f"{block.where} lacks a first prompt"
        elif block.language == "text":
            # Code that can be run belongs in a block that is run.
            assert not re.search(r"^\$ |^>>> |^python ", block.text, re.M), block.where


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_fence_is_closed(document):
    fences = re.findall(r"^ *(?:`{3,}|~{3,}).*$", read(document), re.M)
    assert len(fences) == 2 * len(blocks_of(document))


@pytest.mark.parametrize("document", list(others()))
def test_documents_run(document, tmp_path):
    env = {"XLA_FLAGS": "--xla_backend_optimization_level=0"}
    if not any(" train configs/tiny.py" in x.text for x in all_commands(document)):
        Runner(tmp_path, env=env).run(document)
        return
    # No line shown depends on what these commands train.
    special = {
        " train configs/tiny.py": training.train,
        " runs/tiny": training.of_a_run,
    }
    runner = Runner(tmp_path, env=env, special=special, configs=False)
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "tiny.py").write_text(training.SMALL)
    runner.run(document)


@pytest.mark.slow
def test_documents_of_a_training_run(tmp_path):
    special = {"make train": training.make_train, " serve ": training.serve}
    runner = Runner(tmp_path, special=special)
    for document in OF_A_RUN:  # the README first: it trains
        runner.run(document)
    assert (tmp_path / "runs/tiny/metrics.jsonl").exists()


def of_the_command_line():
    """Returns commands that are not run, and those inside scripts and manifests."""
    for text in (each for each in NOT_RUN if "-m dualpipe_jax" in each):
        yield pytest.param(text, id=text)
    for document in DOCUMENTS:
        for block in blocks_of(document):
            if block.language in {"bash", "yaml"}:
                for found in re.findall(
                    r"python -m dualpipe_jax [^\n]*(?:\n +-[^\n]*)*", block.text
                ):
                    yield pytest.param(found, id=block.where)


def parse(words):
    parser = argparse.ArgumentParser()
    cli.add_arguments(parser, words[0])
    return parser.parse_args(words[1:])


@pytest.mark.parametrize("text", list(of_the_command_line()))
def test_arguments_of_commands_that_are_not_run_are_parsed(text):
    values = {"$JOB_COMPLETION_INDEX": "3", "$PROCESS": "3"}
    words = [values.get(word, word) for word in text.rstrip("&").split()][3:]
    if words[0] == "launch":
        own, words = words[: words.index("--")], words[words.index("--") + 1 :]
        parse(own)
    args = parse(words)
    if args.config != "config.py":  # the reader's
        assert load_as(StepConfig, args.config).mesh_shape


def test_commands_of_make_inherit_nothing_of_the_make_that_runs_the_tests(
    tmp_path, monkeypatch
):
    # As `make test ARGS="-k some" VENV=other` sets them.
    monkeypatch.setenv("MAKEFLAGS", "k -- ARGS=-k\\ some VENV=other")
    monkeypatch.setenv("ARGS", "-k some")
    monkeypatch.setenv("VENV", "other")
    recipe = Runner(tmp_path).shell(f"make -n -C {ROOT} train")
    assert "dualpipe_jax train configs/tiny.py" in recipe
    assert "some" not in recipe and "other/bin" not in recipe


def test_the_list_of_commands_that_are_not_run_is_short_and_used():
    used = {command.text for command in all_commands()}
    assert set(NOT_RUN) <= used
    assert len(NOT_RUN) <= 5


def test_commands_of_a_console_block_are_taken_apart():
    block = blocks_of("README.md")[0]
    text = "$ one \\\n  two  # why\nsays\n$ three &\n$ four\n"
    first, second = commands_of(block._replace(text=text))
    assert first[1:] == ("one \\\n  two", "why", "says\n")
    assert second.text == "three &\nfour\nwait"
