"""What is written is read back: schedules, lowered programs and their phases."""

import json

import pytest

from dualpipe_jax import (
    Costs,
    dualpipe,
    dualpipev,
    gpipe,
    lower,
    one_f_one_b,
    read_trace,
    simulate,
    zb1p,
)
from dualpipe_jax.commands import main as cli
from dualpipe_jax.pictures import show

DEEPSEEK = Costs(F=97, I=104, W=35, B=139, FB=129, p2p=1.2)
KINDS = [dualpipe, dualpipev, zb1p, one_f_one_b, gpipe]


def read_back(timeline, path):
    path.write_text(show.chrome_trace(timeline))
    return read_trace(path), json.loads(path.read_text())["traceEvents"]


@pytest.mark.parametrize("lowered", [False, True])
@pytest.mark.parametrize("make", KINDS)
def test_a_schedule_is_read_back(make, lowered, tmp_path):
    schedule = make(4, 8)
    timeline = simulate(lower(schedule) if lowered else schedule, DEEPSEEK)
    report, events = read_back(timeline, tmp_path / "trace.json")
    assert [device.name for device in report.devices] == [f"Rank {r}" for r in range(4)]
    assert max(span.end_us for span in report.spans) == pytest.approx(
        1e3 * timeline.makespan
    )
    steps = [e for e in events if e.get("cat") == "user_annotation"]
    for rank in range(4):
        own = [e for e in steps if e["pid"] == rank]
        assert [(e["ts"], e["ts"] + e["dur"]) for e in own] == [
            pytest.approx((1000 * start, 1000 * end))
            for _, start, end in timeline.spans[rank]
        ]
        assert [tuple(e["args"]) for e in own] == [
            tuple(str(task) for task in step) for step in schedule.steps[rank]
        ]
        # Phases fill their steps: only PP computes or communicates outside of them.
        inside = [s for s in report.spans if s.device == f"Rank {rank}" and s.phase]
        for span in inside:
            assert any(
                start - 1e-6 <= span.begin_us / 1e3 and span.end_us / 1e3 <= end + 1e-6
                for _, start, end in timeline.spans[rank]
            )
        singles = [
            (start, end) for step, start, end in timeline.spans[rank] if len(step) == 1
        ]
        for start, end in singles:
            took = sum(
                s.end_us - s.begin_us
                for s in inside
                if start <= (s.begin_us + s.end_us) / 2e3 <= end
            )
            assert took == pytest.approx(1e3 * (end - start))
    passes = {name[-2] for name in report.phases}
    assert passes == {"F", "B", "W"}


def test_a_pair_hides_its_exchanges_and_a_single_step_does_not(tmp_path):
    report, _ = read_back(simulate(one_f_one_b(2, 2), Costs()), tmp_path / "a.json")
    assert report.comm_hidden == pytest.approx(0, abs=1e-9)
    paired, _ = read_back(simulate(dualpipe(2, 40), Costs()), tmp_path / "b.json")
    assert paired.comm_hidden > 0.8
    assert "attn(F) " in str(paired)  # phases keep their names among the kernels


def test_permutes_follow_the_step_that_sends(tmp_path):
    timeline = simulate(one_f_one_b(2, 1), DEEPSEEK)
    report, _ = read_back(timeline, tmp_path / "trace.json")
    sent = [(s.device, s.begin_us, s.end_us) for s in report.spans if s.name == "PP"]
    # One F forth, one B back; each arrives when the other rank begins.
    assert sent == [
        ("Rank 0", 97_000, pytest.approx(98_200)),
        ("Rank 1", pytest.approx(334_200), pytest.approx(335_400)),
    ]
    assert all(s.is_comm for s in report.spans if s.name == "PP")


def test_the_command_writes_a_lowered_program(tmp_path):
    out = tmp_path / "trace.json"
    command = "schedule dualpipe --ranks 4 --microbatches 8 --costs p2p=0.5 --lowered"
    assert cli.main([*command.split(), "--out", str(out)]) == 0
    program = lower(dualpipe(4, 8))
    expected = simulate(program, Costs(p2p=0.5)).makespan
    assert max(s.end_us for s in read_trace(out).spans) == pytest.approx(1e3 * expected)
