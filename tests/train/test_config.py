"""Configs are found by path or name, and those that cannot be run are refused."""

import dataclasses
import functools
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dualpipe_jax.commands import main as cli
from dualpipe_jax.schedules.generators.interleaved_1f1b import interleaved_1f1b
from dualpipe_jax.train import config as config_module
from dualpipe_jax.train.mesh import ask_for_devices, check_memory, make_mesh
from tests.train import tiny

ROOT = Path(__file__).parents[2]


def test_by_path_and_by_name():
    by_path = config_module.load_config(str(Path(__file__).with_name("tiny.py")))
    assert (by_path.name, by_path.tokens_per_step) == ("tiny", 4 * 2 * 16)
    assert config_module.load_config("tiny").num_devices == 8


def test_a_missing_config_is_named_with_those_that_exist():
    with pytest.raises(ValueError, match=r"'tinny' not found .* one of .*tiny"):
        config_module.load_config("tinny")
    with pytest.raises(ValueError, match=r"'no/such.py' not found"):
        config_module.load_config("no/such.py")


def test_a_file_without_config_is_refused(tmp_path):
    path = tmp_path / "empty.py"
    path.touch()
    with pytest.raises(ValueError, match=r"empty.py defines no config\(\)"):
        config_module.load_config(str(path))


def test_a_function_of_another_name(tmp_path):
    text = Path(__file__).with_name("tiny.py").read_text()
    path = tmp_path / "several.py"
    path.write_text(text.replace("def config(", "def smallest("))
    assert config_module.load_config(f"{path}:smallest").name == "tiny"
    with pytest.raises(ValueError, match=r"several.py defines no config\(\).*colon"):
        config_module.load_config(str(path))
    with pytest.raises(ValueError, match=r"several.py defines no larger\(\)"):
        config_module.load_config(f"{path}:larger")


def test_a_function_of_a_module():
    by_name = config_module.load_config("profiles:training")
    assert by_name.name == "profile_training"
    of_module = config_module.load_config("dualpipe_jax.configs.profiles:training")
    assert of_module == by_name
    with pytest.raises(ValueError, match=r"prefill\(\) of .* returns a ServeConfig"):
        config_module.load_config("profiles:prefill")
    # What can be compiled for a mesh is either.
    for name in ("profiles:training", "profiles:prefill"):
        config_module.load_as(config_module.StepConfig, name)
    with pytest.raises(ValueError, match=r"returns a DeepSeekConfig; .* a StepConfig"):
        config_module.load_as(config_module.StepConfig, "tiny:architecture")
    with pytest.raises(ValueError, match=r"'no.such.module' not found"):
        config_module.load_config("no.such.module:config")


@pytest.mark.slow
def test_recipes_are_where_only_the_packages_are_installed(tmp_path):
    # As a wheel has them: links are files there.
    find = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    assert find["packages"]["find"]["include"] == ["dualpipe_jax*", "eplb_jax*"]
    for name in ("dualpipe_jax", "eplb_jax"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, tmp_path / name, ignore=ignored)
    code = (
        "from dualpipe_jax.train import config, load_as\n"
        "for name in 'tiny', 'small', 'tiny_server:config', 'profiles:decode':\n"
        "    print(load_as(object, name).name)\n"
        "print(config.__file__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    names = ["tiny", "small", "tiny_server", "profile_decode"]
    file = str(tmp_path / "dualpipe_jax" / "train" / "config.py")
    assert done.stdout.splitlines() == [*names, file], done.stderr


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_steps": 0}, r"num_steps=0 must be at least 1"),
        ({"sequence_length": 0}, r"sequence_length=0 must be at least 1"),
        ({"eval_every": -1}, r"eval_every=-1 must be at least 1"),
        ({"max_skipped_steps": -1}, r"max_skipped_steps=-1 must be at least 0"),
        ({"ignore_index": -100}, r"ignore_index=-100 must be at least 0"),
        ({"mesh": {"dp": 2}}, r"mesh=\{'dp': 2\} must have the axis pp"),
        (
            {"mesh": {"pp": 2, "tp": 2}},
            r"mesh=.*: 'tp' must be 'pp' or 'dp' or 'ep'\.",
        ),
        ({"schedule": "dualpip"}, r"schedule='dualpip' must be one of dualpipe, dual"),
        ({"mesh": {"pp": 2, "ep": 4}}, r"microbatch_size=2 must be a multiple of 4"),
        ({"mesh": {"pp": 2, "dp": 0}}, r"mesh=.*: 0 must be at least 1\."),
        ({"mesh": {"pp": 2, "dp": 3}}, r"microbatch_size=2 must be a multiple of 3"),
        ({"held_out_fraction": 1.0}, r"held_out_fraction=1.0 must be below 1"),
        (
            {"num_microbatches": 2**30},
            r"num_microbatches=1073741824 is more than 1,048",
        ),
        ({"name": None}, r"name=None must be a text"),
        ({"name": "../a"}, r"name='../a' must be the name of a folder"),
        ({"seed": 2**70}, r"seed=1180\d+ must be at most 9223372036854775807"),
        ({"num_steps": float("inf")}, r"num_steps=inf must be an integer"),
        ({"eval_every": True}, r"eval_every=True must be an integer"),
        ({"model": None}, r"model=None must be a ModelConfig"),
        ({"schedule": 3}, r"schedule=3 must be a text or a function"),
        ({"overlap": 1}, r"overlap=1 must be True or False or None"),
    ],
)
def test_values_that_cannot_be_run_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny.config(), **change)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def config(:\n", r"bad.py, line 1: SyntaxError: "),
        ("import numpy\n1 / 0\n", r"bad.py, line 2: ZeroDivisionError: division by"),
        ("import no_such\n", r"bad.py, line 1: ModuleNotFoundError: No module named"),
        ("def config():\n\n  return {}['a']\n", r"bad.py, line 3: KeyError: 'a'"),
        (
            "import dataclasses\nfrom tests.train import tiny\n"
            "def config():\n  c = tiny.config()\n"
            "  return dataclasses.replace(c, num_steps=0)\n",
            r"bad.py, line 5: num_steps=0 must be at least 1\.$",
        ),
    ],
)
def test_a_config_file_that_raises_is_one_line(text, message, tmp_path, capsys):
    (tmp_path / "bad.py").write_text(text)
    args = ["train", str(tmp_path / "bad.py"), "--out", str(tmp_path / "run")]
    assert cli.main(args) == 2
    errors = capsys.readouterr().err
    assert re.search(message, errors) and errors.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_more_than_a_machine_has_is_refused():
    mesh = make_mesh(tiny.config())
    check_memory(10**6, mesh, "A little")
    with pytest.raises(ValueError, match=r"A lot takes 1,000,000,000 GB, but this mac"):
        check_memory(10**18, mesh, "A lot")
    with pytest.raises(ValueError, match=r"needs 5,000 devices in this process, more"):
        ask_for_devices(5000, "cpu")


def test_an_interrupted_command_says_so_in_one_line(tmp_path, capsys):
    (tmp_path / "slow.py").write_text("raise KeyboardInterrupt")
    assert cli.main(["train", str(tmp_path / "slow.py")]) == 130
    assert capsys.readouterr().err == "\npython -m dualpipe_jax: interrupted\n"


def test_json_names_the_schedule():
    read = json.loads(tiny.config().to_json())
    assert read["schedule"] == "dualpipe"
    assert read["model"]["width"] == 16
    assert read["mesh"] == {"pp": 2}


def test_stages_per_rank_are_part_of_the_schedule_and_of_its_text():
    """The text has no address: processes compare it."""
    many = functools.partial(interleaved_1f1b, stages_per_rank=3)
    config = dataclasses.replace(tiny.config(), schedule=many)
    schedule = config.make_schedule()
    assert schedule.num_stages == 3 * schedule.num_ranks
    written = json.loads(config.to_json())["schedule"]
    assert "interleaved_1f1b" in written and "stages_per_rank=3" in written
    assert " at 0x" not in written
