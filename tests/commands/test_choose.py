"""The command `choose` prints the ranking of its arguments, or one line of error."""

import json
import re
import shlex
from pathlib import Path

import pytest

from dualpipe_jax import Remat, StageMemory, rank_schedules
from dualpipe_jax.commands import main as cli
from tests.planning.rankings import DEEPSEEK, GIB

OPTIONS = {
    "--ranks": "8",
    "--microbatches": "32,64",
    "--costs": "F=97,I=104,W=35,FB=129,p2p=1.2",
    "--activations": "residuals=2GiB,wgrad_residuals=1GiB,message=56MiB",
    "--memory": "limit=40GiB,parameters=2GiB,gradients=4GiB",
    "--remat": "full:residuals=0.2GiB,wgrad_residuals=2GiB,cost=40",
}


def choose(capsys, *more, **changes):
    changes = {f"--{name.replace('_', '-')}": text for name, text in changes.items()}
    pairs = (OPTIONS | changes).items()
    args = [word for pair in pairs if pair[1] is not None for word in pair]
    try:
        status = cli.main(["choose", *args, *more])
    except SystemExit as error:
        status = error.code
    return status, *capsys.readouterr()


def ranking_of_options():
    return rank_schedules(
        8,
        [32, 64],
        DEEPSEEK,
        StageMemory(2 * GIB, GIB, 2 * GIB, 4 * GIB, message=56 * 2**20),
        limit=40 * GIB,
        remat=Remat("full", 0.2 * GIB, 2 * GIB, cost=40),
    )


def test_the_command_prints_the_ranking(capsys):
    status, out, _ = choose(capsys)
    assert (status, out) == (0, f"{ranking_of_options()}\n")
    lines = out.splitlines()
    assert lines[0].split()[:5] == ["schedule", "M", "remat", "time", "speed"]
    assert "optim" not in lines[0] and "msgs" in lines[0]  # there is no optimizer
    assert lines[1].split()[:5] == ["1", "DualPipe", "64", "none", "4,962.6"]
    assert "memory per device in GiB, limit 40.0 GiB" in out
    assert "Note: task_overhead=0" in out
    assert max(map(len, lines)) <= 120
    words = " ".join(out.split())  # reasons are wrapped, and otherwise as they are
    assert " ".join(ranking_of_options().reason.split()) in words


def test_the_command_of_the_document_prints_its_table(capsys):
    text = (Path(__file__).parents[2] / "docs/choosing.md").read_text()
    text = text.replace("\\\n", "")  # one line again
    (command,) = re.findall(r"^\$ python -m dualpipe_jax (choose .*)", text, re.M)
    assert cli.main(shlex.split(command)) == 0
    assert capsys.readouterr().out in text


def test_json_is_the_ranking(capsys):
    status, out, _ = choose(capsys, "--json")
    found, ranking = json.loads(out), ranking_of_options()
    assert status == 0
    assert found == json.loads(json.dumps(ranking.to_dict()))
    assert found["best"] == {
        "schedule": "dualpipe",
        "num_microbatches": 64,
        "remat": "none",
    }
    first = found["candidates"][0]
    assert first["memory"]["total"] == ranking.best.memory.total
    assert first["spare"] == found["limit"] - first["memory"]["total"]
    assert (first["num_slots"], first["num_wgrad_residual_slots"]) == (9, 4)
    assert found["left_out"] == [] and len(found["notes"]) == 1


def test_the_status_says_that_nothing_fits(capsys):
    status, out, err = choose(capsys, memory="limit=1MB,parameters=2GiB,gradients=4GiB")
    assert (status, err) == (1, "")
    assert "Nothing fits in 976.6 KiB" in out


def test_all_options_reach_the_ranking(capsys):
    more = {
        "schedules": "1f1b,zb1p",
        "measured_at": "64",
        "task_overhead": "2",
        "update_time": "30",
        "exchange_time": "4",
        "activations": "residuals=2,wgrad_residuals=1,workspace=5,pair_workspace=8",
        "memory": "limit=90,parameters=1,gradients=2,at_rest=3,optimizer=4,other=6",
        "remat": "r:residuals=1,wgrad_residuals=1,cost=9,overlapped_cost=8,workspace=7",
    }
    _, out, _ = choose(capsys, "--json", **more)
    expected = rank_schedules(
        8,
        [32, 64],
        DEEPSEEK,
        StageMemory(
            2, 1, 1, 2, at_rest=3, optimizer=4, workspace=5, pair_workspace=8, other=6
        ),
        limit=90,
        remat=Remat("r", 1, 1, cost=9, overlapped_cost=8, workspace=7),
        schedules=["1f1b", "zb1p"],
        measured_at=64,
        task_overhead=2,
        update_time=30,
        exchange_time=4,
    )
    assert json.loads(out) == json.loads(json.dumps(expected.to_dict()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"costs": None}, "required: --costs"),
        ({"memory": None}, "required: --memory"),
        ({"costs": "F=97,I=104"}, "--costs lacks W; give F, I and W"),
        ({"costs": "F=97,I=104,W=-3"}, "W=-3.0 must be a finite number >= 0"),
        ({"microbatches": "16;32"}, "--microbatches '16;32' must be integers; write"),
        ({"memory": "limit=80GiB"}, "lacks parameters, gradients; give bytes"),
        (
            {"memory": "limit=0,parameters=1,gradients=1"},
            "limit=0.0 must be a finite number > 0",
        ),
        ({"activations": "residuals=1GiB"}, "lacks wgrad_residuals; give bytes"),
        ({"activations": "residuals=x"}, "'residuals=x': 'x' is not a number of bytes"),
        ({"activations": "size=1"}, "'size' is unknown; give each of residuals"),
        ({"activations": "residuals=1,residuals=1"}, "'residuals' is given twice"),
        (
            {"remat": "residuals=1,wgrad_residuals=2"},
            "'' lacks residuals, wgrad_residuals",
        ),
        ({"remat": ":residuals=1,wgrad_residuals=2"}, "name='' must be a word"),
        (
            {"remat": "f:residuals=1,wgrad_residuals=2,cost=x"},
            "'cost=x': could not convert",
        ),
        ({"schedules": "zb2p"}, "names 'zb2p', which is unknown"),
    ],
)
def test_errors_are_one_line_and_exit_2(changes, message, capsys):
    status, out, err = choose(capsys, **changes)
    assert (status, out) == (2, "")
    assert err.startswith("python -m dualpipe_jax choose: error: ")
    assert err.count("\n") == 1
    assert message in err
