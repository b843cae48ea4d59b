"""The command line: what it prints, what it writes, and its errors."""

import json
import re
import subprocess
import sys

import pytest

from dualpipe_jax.commands import main as cli
from dualpipe_jax.lowering.program import lower
from dualpipe_jax.pictures import show
from dualpipe_jax.schedules.generators.dualpipe import dualpipe
from dualpipe_jax.schedules.generators.interleaved_1f1b import interleaved_1f1b
from dualpipe_jax.schedules.generators.names import SCHEDULES
from dualpipe_jax.schedules.generators.one_f_one_b import one_f_one_b
from dualpipe_jax.schedules.schedule import Schedule
from dualpipe_jax.schedules.simulator import Costs, simulate

SIZES = ["--ranks", "4", "--microbatches", "8"]
MANY = ["--microbatches", "1000000000"]
CHOICE = ["--costs", "F=1,I=1,W=1", "--activations", "residuals=1,wgrad_residuals=1"]
CHOICE += ["--memory", "limit=9,parameters=1,gradients=1"]
DEEPSEEK = "F=97,I=104,W=35,B=139,FB=129,p2p=1.2"


def test_schedule_prints_the_picture(capsys):
    assert cli.main(["schedule", "dualpipe", *SIZES]) == 0
    assert capsys.readouterr().out == show.text(dualpipe(4, 8)) + "\n"


@pytest.mark.parametrize("kind", sorted(SCHEDULES))
def test_every_kind_travels_as_csv(kind, capsys, tmp_path):
    assert cli.main(["schedule", kind, *SIZES, "--format", "csv"]) == 0
    text = capsys.readouterr().out
    schedule = SCHEDULES[kind](4, 8)
    assert Schedule.from_csv(text, kind=schedule.kind) == schedule
    # And back: a CSV file is a KIND, too.
    path = tmp_path / f"{schedule.kind}.csv"
    path.write_text(text)
    assert cli.main(["schedule", str(path), "--format", "json"]) == 0
    as_json = tmp_path / "any name.json"
    as_json.write_text(capsys.readouterr().out)
    assert cli.main(["schedule", str(as_json), "--format", "csv"]) == 0
    assert capsys.readouterr().out == text
    assert cli.main(["simulate", str(path), "--json"]) == 0
    from_csv = json.loads(capsys.readouterr().out)
    assert cli.main(["simulate", kind, *SIZES, "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == from_csv


def test_stages_per_rank(capsys):
    args = ["schedule", "interleaved_1f1b", *SIZES, "--stages-per-rank", "3"]
    assert cli.main([*args, "--format", "csv"]) == 0
    expected = interleaved_1f1b(4, 8, stages_per_rank=3)
    assert capsys.readouterr().out == expected.to_csv()


@pytest.mark.parametrize("name", sorted(show.FORMATS))
def test_schedule_writes_every_format(name, tmp_path):
    out = tmp_path / "picture"
    args = ["--costs", DEEPSEEK, "--format", name, "--out", str(out)]
    assert cli.main(["schedule", "dualpipe", *SIZES, *args]) == 0
    costs = Costs(F=97, I=104, W=35, B=139, FB=129, p2p=1.2)
    made = show.FORMATS[name](simulate(dualpipe(4, 8), costs))
    written = out.read_bytes()
    if name == "png":
        assert written[:8] == b"\x89PNG\r\n\x1a\n"
    else:
        assert written.decode("utf-8") == made


def test_out_alone_decides_the_format(tmp_path):
    out = tmp_path / "picture.svg"
    assert cli.main(["schedule", "1f1b", *SIZES, "--out", str(out)]) == 0
    assert out.read_text() == show.svg(one_f_one_b(4, 8))


def test_simulate_json_is_the_timeline(capsys):
    args = ["simulate", "dualpipe", "--ranks", "8", "--microbatches", "20", "--json"]
    assert cli.main(args) == 0
    assert json.loads(capsys.readouterr().out) == {
        "kind": "dualpipe",
        "num_ranks": 8,
        "num_stages": 8,
        "num_microbatches": 20,
        "costs": {"F": 1, "I": 1, "W": 1, "B": 2, "FB": 3, "p2p": 0},
        "lowered": False,
        "makespan": 66,
        "bubble_ratio": pytest.approx(6 / 66, rel=1e-15),
        "busy": [60] * 8,
        "bubble": [6] * 8,
        "peak_activations": [9] * 8,
    }


def test_simulate_lowered_is_the_programs_timeline(capsys):
    args = ["simulate", "dualpipe", *SIZES, "--costs", DEEPSEEK, "--lowered"]
    costs = Costs(F=97, I=104, W=35, B=139, FB=129, p2p=1.2)
    program = lower(dualpipe(4, 8))
    timeline = simulate(program, costs)
    assert cli.main([*args, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["lowered"] is True
    assert found["makespan"] == timeline.makespan
    assert found["bubble"] == list(timeline.bubble)
    assert found["event_driven_makespan"] == simulate(dualpipe(4, 8), costs).makespan
    assert (found["num_ticks"], found["num_slots"]) == (
        program.num_ticks,
        program.num_slots,
    )
    assert cli.main(args) == 0
    assert f"{program.num_ticks} ticks" in capsys.readouterr().out


def test_simulate_table(capsys):
    args = [
        "simulate",
        "gpipe",
        "--ranks",
        "2",
        "--microbatches",
        "3",
        "--costs",
        "F=2",
    ]
    assert cli.main(args) == 0
    assert capsys.readouterr().out.splitlines() == [
        "GPipe, 2 ranks, 3 microbatches",
        "costs: F=2 I=1 W=1 B=2 FB=4 p2p=0",
        "makespan: 16",
        "bubble ratio: 0.2500",
        "rank       busy     bubble  peak activations",
        "   0         12          4                 3",
        "   1         12          4                 3",
    ]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], r"required: COMMAND"),
        (["nope"], r"argument COMMAND: invalid choice: 'nope'"),
        (["schedule"], r"schedule: error: .*required: KIND"),
        (
            ["schedule", "nope", *SIZES],
            r"KIND='nope' is unknown; use one of dualpipe, ",
        ),
        (["schedule", "gpipe"], r"gpipe needs --ranks and --microbatches"),
        (["schedule", "gpipe", "--ranks", "2"], r"gpipe needs --microbatches\."),
        (["schedule", "gpipe", "--ranks", "two"], r"--ranks: invalid int value: 'two'"),
        (
            ["simulate", "dualpipe", "--ranks", "3", "--microbatches", "8"],
            r"simulate: error: num_ranks=3 must be even",
        ),
        (
            ["simulate", "dualpipev", "--ranks", "3", "--microbatches", "5"],
            r"num_microbatches=5 must be >= 2\*num_ranks=3",
        ),
        (
            ["simulate", "gpipe", *SIZES, "--costs", "G=1"],
            r"--costs 'G=1': 'G' is unknown; give each of F, I, W, B, FB, p2p at most",
        ),
        (["simulate", "gpipe", *SIZES, "--costs", "F=1,F=2"], r"'F' is given twice"),
        (["simulate", "gpipe", *SIZES, "--costs", "F"], r"'F' has no number; .* F=1.5"),
        (["simulate", "gpipe", *SIZES, "--costs", "F=-1"], r"F=-1.0 must be a finite"),
        (["simulate", "gpipe", *SIZES, "--costs", "F=nan"], r"F=nan must be a finite"),
        (["schedule", "gpipe", *SIZES, "--format", "png"], r"binary; name a file with"),
        (
            ["schedule", "gpipe", *SIZES, "--out", "a.gif"],
            r"format='gif' .* is unknown",
        ),
        (["schedule", "gpipe", *SIZES, "--out", "no/such/a.svg"], r"No such file"),
        (["simulate", "dualpipe", "--ranks", "4", *MANY], r"is more than 1,048,576"),
        (["bubbles", "--ranks", "4", *MANY], r"num_microbatches=1000000000 is more"),
        (["choose", "--ranks", "4", *MANY, *CHOICE], r"num_microbatches=1000000000 is"),
        (["report", "nested"], r"report: error: RecursionError: .*nested too deeply"),
        (
            ["schedule", "zb1p", *SIZES, "--stages-per-rank", "2"],
            r"stages_per_rank=2 cannot be chosen for zb1p; leave it out, or use one of",
        ),
        (
            ["schedule", "looped_bfs", *SIZES, "--stages-per-rank", "0"],
            r"stages_per_rank=0 must be at least 1",
        ),
        (
            ["schedule", "looped_bfs", *SIZES, "--stages-per-rank", "1000000"],
            r"times stages_per_rank=1000000 is more than 1,048,576",
        ),
        (["simulate", "bad.csv", "--stages-per-rank", "2"], r"leave out --stages-per"),
        (["simulate", "missing.csv"], r"No such file or directory: 'missing.csv'"),
        (["simulate", "bad.csv", "--ranks", "2"], r"own sizes; leave out --ranks"),
        (["simulate", "bad.csv"], r"The schedule deadlocks: rank \d at"),
        (["simulate", "short.csv"], r"Stage 0, microbatch 0 has no F; add 0F0"),
    ],
)
def test_errors_are_one_line_and_exit_2(args, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bad.csv").write_text("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n")
    (tmp_path / "short.csv").write_text("0F1,0B1\n")
    (tmp_path / "nested").mkdir()
    (tmp_path / "nested" / "config.json").write_text(100_000 * "[" + 100_000 * "]")
    try:
        status = cli.main(args)
    except SystemExit as error:  # argparse's own way
        status = error.code
    out, err = capsys.readouterr()
    assert (status, out) == (2, "")
    assert err.count("\n") == 1
    assert err.startswith("python -m dualpipe_jax")
    assert re.search(message, err), err


def test_help_lists_every_command_and_loads_none_of_them():
    code = (
        "import sys; from dualpipe_jax.commands.main import main\n"
        "try: main(['--help'])\n"
        "except SystemExit: print([m for m in ('jax', 'rich') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert done.stdout.endswith("[]\n")
    assert all(name in done.stdout for name in cli.COMMANDS)


@pytest.mark.parametrize("name", sorted(cli.COMMANDS))
def test_every_command_can_be_loaded(name, capsys):
    with pytest.raises(SystemExit) as error:
        cli.main([name, "--help"])
    assert error.value.code == 0
    assert f"python -m dualpipe_jax {name}" in capsys.readouterr().out


def test_a_missing_module_of_our_own_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(cli.COMMANDS, "later", cli.Command("not yet"))
    assert cli.main(["later"]) == 2
    assert "later: error: No module named" in capsys.readouterr().err


def test_a_reader_may_stop_early():
    command = [sys.executable, "-m", "dualpipe_jax", "schedule", "dualpipe"]
    command += ["--ranks", "16", "--microbatches", "200"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(10)
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0
