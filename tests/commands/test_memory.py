"""The memory command."""

import json
from pathlib import Path

import pytest

from dualpipe_jax.commands import main as cli

TINY = str(Path(__file__).parent.parent / "train" / "tiny.py")


@pytest.mark.slow
def test_a_config_is_compiled_for_gpus(capsys):
    assert cli.main(["memory", TINY, "--json", "--gpu", "a100"]) == 0
    read = json.loads(capsys.readouterr().out)
    assert {"parameters", "optimizer"} <= read["arguments"].keys()
    assert 0 < read["working_set"] < read["expected"]
    assert read["spare"] == read["capacity"] - read["total"] > 0


def test_no_such_config(capsys):
    assert cli.main(["memory", "no_such_config"]) == 2
    assert "'no_such_config' not found" in capsys.readouterr().err
