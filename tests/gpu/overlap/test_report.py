"""Where collectives stand, how often they run, and how much of them is hidden."""

import json

import pytest

from dualpipe_jax import overlap_report
from tests.gpu.overlap import modules
from tests.gpu.overlap.modules import (
    ALL_TO_ALL,
    COPY,
    GEMM,
    HALF,
    PERMUTE,
    all_to_all_done,
    all_to_all_start,
    copy,
    gemm,
    loop,
    module,
    permute_done,
    permute_start,
    run_loop,
)


def report_of(*args, **options):
    return overlap_report(module(*args), **{**HALF, **options})


STEADY = "\n".join(
    [
        permute_start("p"),
        all_to_all_start("a"),
        gemm("g"),
        all_to_all_done("a"),
        permute_done("p"),
        permute_start("q"),
        copy("k"),
        permute_done("q"),
    ]
)


def test_the_timeline_of_a_loop():
    report = report_of(run_loop("body", 5), loop("body", STEADY))
    steady = report.steady_state
    assert (steady.name, steady.kind, steady.runs) == ("body", "while", 5)
    p, a, q = steady.collectives
    assert [each.seconds for each in (p, a, q)] == pytest.approx(
        [PERMUTE, ALL_TO_ALL, PERMUTE]
    )
    # The product of 2 ms covers both; the copy of 5.5 us covers little of 220.
    assert PERMUTE < GEMM
    assert [each.exposed_s for each in (p, a, q)] == pytest.approx(
        [0, 0, PERMUTE - COPY]
    )
    assert steady.makespan_s == pytest.approx(GEMM + PERMUTE)
    assert steady.compute.seconds == pytest.approx(GEMM + COPY)
    assert steady.hidden_fraction == pytest.approx(
        (PERMUTE + ALL_TO_ALL + COPY) / (2 * PERMUTE + ALL_TO_ALL)
    )
    assert [each.under.gemms for each in (p, a, q)] == [1, 1, 0]
    assert [each.under.flops for each in (p, a, q)] == [2e9, 2e9, 0]
    assert [each.name for each in steady.without_gemms] == ["q"]


def test_links_do_not_wait_for_each_other_but_for_themselves():
    lines = "\n".join(
        [
            permute_start("p"),
            permute_start("q"),
            all_to_all_start("a"),
            all_to_all_done("a"),
            permute_done("q"),
            permute_done("p"),
        ]
    )
    report = report_of(lines)
    assert [each.exposed_s for each in report.collectives] == pytest.approx(
        # The all-to-all is through first; p has then run for as long.
        [PERMUTE - ALL_TO_ALL, PERMUTE, ALL_TO_ALL]
    )
    assert report.steady_state.makespan_s == pytest.approx(2 * PERMUTE)


def test_loops_count_as_compute_of_all_their_trips():
    lines = "\n".join([permute_start("p"), run_loop("inner", 3), permute_done("p")])
    report = report_of(lines, loop("inner", copy("k")))
    (permute,) = report.collectives
    assert permute.under.kernels == 3
    assert permute.exposed_s == pytest.approx(PERMUTE - 3 * COPY)


@pytest.mark.parametrize(
    ("given", "trips"), [(None, 1), (7, 7), ({"inn*": 4}, 4), ({"other": 4}, 1)]
)
def test_trips_that_depend_on_data_may_be_given(given, trips):
    lines = "\n".join([permute_start("p"), run_loop("inner"), permute_done("p")])
    report = report_of(lines, loop("inner", copy("k")), trip_counts=given)
    assert report.collectives[0].under.kernels == trips
    said = [each for each in report.assumptions if "as often as data say" in each]
    assert bool(said) == (trips == 1)


def test_runs_multiply_along_the_way():
    report = report_of(
        run_loop("outer", 3),
        loop("inner", permute_start("p") + "\n" + permute_done("p")),
        loop("outer", run_loop("inner", 5)),
    )
    (found,) = report.loops
    assert (found.runs, found.runs_at_most) == (15, 15)
    assert [frame.computation for frame in found.path] == ["outer", "inner"]


def test_runs_that_depend_on_data_are_unknown():
    report = report_of(
        run_loop("outer"),
        loop("inner", permute_start("p") + "\n" + permute_done("p")),
        loop("outer", run_loop("inner", 5)),
    )
    (found,) = report.loops
    assert (found.runs, found.runs_at_most) == (None, None)
    assert "unknown" in str(report)


def test_a_guard_runs_at_most_once():
    guard = loop("guard", permute_start("p") + "\n" + permute_done("p"), flag="%false")
    report = report_of(run_loop("outer", 3), guard, loop("outer", run_loop("guard")))
    (found,) = report.loops
    assert (found.kind, found.runs, found.runs_at_most) == ("guard", None, 3)
    assert "<=3" in str(report)


def test_a_guard_that_is_cleared_by_a_copy_is_one_too():
    lines = "  %cleared = pred[] copy(%false)\n" + permute_start("p")
    guard = loop("guard", f"{lines}\n{permute_done('p')}", flag="%cleared")
    assert report_of(run_loop("guard"), guard).loops[0].kind == "guard"
    # A number for all loops is not meant for guards; their own is.
    lines = "\n".join([permute_start("p"), run_loop("guard"), permute_done("p")])
    guard = loop("guard", copy("k"), flag="%false")
    for given, kernels in [(9, 1), ({"guard": 0}, 0)]:
        report = report_of(lines, guard, trip_counts=given)
        assert report.collectives[0].under.kernels == kernels


@pytest.mark.parametrize("flag", ["%flag", "%true", "%more"])
def test_a_loop_that_does_not_clear_its_flag_is_no_guard(flag):
    lines = f"""  %true = pred[] constant(true)
  %more = pred[] compare(%i, %i), direction=LT
{permute_start("p")}
{permute_done("p")}"""
    (found,) = report_of(run_loop("body"), loop("body", lines, flag=flag)).loops
    assert (found.kind, found.runs_at_most) == ("while", None)


BRANCH = """%{name} (y: {m}) -> {m} {{
  %x = {m} parameter(0)
{lines}
  ROOT %r = {m} bitcast(%x)
}}"""


def test_branches_run_at_most_once_and_the_longest_counts():
    def branch(name, *lines):
        return BRANCH.format(name=name, m=modules.M, lines="\n".join(lines))

    lines = f"""  %which = s32[] constant(1)
{permute_start("p")}
  %c = {modules.M} conditional(%which, %x, %x), branch_computations={{%few, %many}}
{permute_done("p")}"""
    report = report_of(
        lines,
        branch("few", copy("k")),
        branch("many", copy("k1"), all_to_all_start("a"), all_to_all_done("a")),
    )
    permute = report.loop("main").collectives[0]
    assert permute.exposed_s == pytest.approx(PERMUTE - COPY - ALL_TO_ALL)
    inside = report.loop("many")
    assert (inside.kind, inside.runs, inside.runs_at_most) == ("branch", None, 1)
    lines = lines.replace("s32[]", "pred[]").replace(
        "branch_computations={%few, %many}",
        "true_computation=%few, false_computation=%few",
    )
    permute = report_of(lines, branch("few", copy("k"))).collectives[0]
    assert permute.exposed_s == pytest.approx(PERMUTE - COPY)


def test_calls_are_part_of_the_computation_that_calls():
    lines = f"{permute_start('p')}\n{gemm('g')}\n{permute_done('p')}"
    called = BRANCH.format(name="command_buffer", m=modules.M, lines=lines)
    report = report_of(f"  %c = {modules.M} call(%x), to_apply=%command_buffer", called)
    (found,) = report.loops
    assert (found.kind, found.collectives[0].exposed_s) == ("entry", 0)


def test_generic_asynchronous_calls():
    called = """%wrapped (y: bf16[1000,1000]) -> bf16[1000,1000] {
  %y = bf16[1000,1000] parameter(0)
  ROOT %r = bf16[1000,1000] all-to-all(%y), replica_groups=[2,8]<=[16], dimensions={0}
}"""
    wrapped = "((bf16[1000,1000]), bf16[1000,1000], s32[])"
    lines = f"""  %s = {wrapped} async-start(%x), calls=%wrapped
{copy("k")}
  %u = {wrapped} async-update(%s)
  %d = bf16[1000,1000] async-done(%u)"""
    (found,) = report_of(lines, called).collectives
    assert (found.kind, found.asynchronous) == ("all-to-all", True)
    assert found.exposed_s == pytest.approx(ALL_TO_ALL - COPY)


def test_compute_that_runs_asynchronously_is_compute():
    """It counts where it starts; its done is free."""
    fused = BRANCH.format(name="fused", m=modules.M, lines=gemm("g"))
    lines = f"""{permute_start("p")}
  %f = (({modules.M}), {modules.M}) fusion-start(%x), kind=kCustom, calls=%fused
  %fd = {modules.M} fusion-done(%f)
  %c = ({modules.M}, {modules.M}, u32[]) copy-start(%x)
  %cd = {modules.M} copy-done(%c)
{permute_done("p")}"""
    (permute,) = report_of(lines, fused).collectives
    assert (permute.under.kernels, permute.under.flops) == (2, 2e9)
    # The fusion reads a matrix twice that is one parameter, and writes one.
    assert permute.under.num_bytes == 4e6 + 4e6


def test_what_xla_marks_as_synchronous_hides_nothing():
    sync = (
        'source_target_pairs={{0,8}}, backend_config={"collective_backend_config":'
        '{"is_sync":true}}'
    )
    lines = f"{permute_start('p', sync)}\n{gemm('g')}\n{permute_done('p')}"
    (found,) = report_of(lines).collectives
    assert not found.asynchronous
    assert (found.hidden_s, found.under.gemms) == (0, 0)


def test_blocks_of_a_ragged_buffer_are_guessed_to_fill_it_once():
    """As a grouped product has them: 4 groups, in blocks of 100 rows, then of 10."""
    rows = "bf16[1000,1000]"
    carry = f"(s32[], s32[], {rows})"

    def blocks(name, size):
        return f"""%{name} (c: {carry}) -> {carry} {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  %b = {rows} get-tuple-element(%c), index=2
  %part = bf16[{size},1000] dynamic-slice(%b, %i, %n)
  %new = {rows} dynamic-update-slice(%b, %part, %i, %n)
  ROOT %t = {carry} tuple(%i, %n, %new)
}}"""

    until = f"""%until (c: {carry}) -> pred[] {{
  %c = {carry} parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %n = s32[] get-tuple-element(%c), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}}"""
    groups = f"""%groups (c: {carry}) -> {carry} {{
  %c = {carry} parameter(0)
  %w = {carry} while(%c), condition=%until, body=%large
  ROOT %v = {carry} while(%w), condition=%until, body=%small
}}"""
    known = 'backend_config={"known_trip_count":{"n":"4"}}'
    lines = f"""  %i = s32[] constant(0)
  %t = {carry} tuple(%i, %i, %x)
{permute_start("p")}
  %w = {carry} while(%t), condition=%until, body=%groups, {known}
{permute_done("p")}"""
    computations = [blocks("large", 100), blocks("small", 10), until, groups]
    report = report_of(lines, *computations)
    # 10 blocks in 4 groups, each of two kernels; once the small ones in each group.
    in_blocks = (10 / 4 * 2 + 1 * 2) * 4
    conditions = 5 + 4 * (10 / 4 + 1) + 4 * 2
    assert report.collectives[0].under.kernels == pytest.approx(in_blocks + conditions)
    assert any(
        "2 loops run as often as it takes to go through" in a
        for a in report.assumptions
    )


def test_the_steady_state_is_the_loop_with_the_most_communication():
    both = f"{permute_start('p')}\n{permute_done('p')}"
    report = report_of(
        "\n".join([STEADY, run_loop("small", 9), run_loop("large", 2)]),
        loop("small", all_to_all_start("b") + "\n" + all_to_all_done("b")),
        loop("large", both.replace("p", "s", 1)),
    )
    assert report.steady_state.name == "large"
    assert {each.name for each in report.loops} == {"main", "small", "large"}
    assert report.loop("sm").name == "small"
    with pytest.raises(ValueError, match=r"name='' is the begin of 3 .*main"):
        report.loop("")
    with pytest.raises(ValueError, match=r"name='none' is the begin of 0 .*small"):
        report.loop("none")


def test_a_guard_may_be_the_steady_state():
    """Of a loop whose trips differ between ranks; one as large as a loop's is not."""
    permutes = [permute_start("p"), permute_done("p")]
    exchange = [all_to_all_start("a"), all_to_all_done("a")]
    report = report_of(
        run_loop("outer", 3),
        loop("outer", "\n".join([*exchange, run_loop("guard")])),
        loop("guard", "\n".join(permutes), flag="%false"),
    )
    assert report.steady_state.name == "guard"
    assert "steady state guard" in report.summary()
    report = report_of(
        run_loop("outer", 3),
        loop("outer", "\n".join([run_loop("guard"), *permutes])),
        loop("guard", "\n".join(permutes).replace("p", "q", 1), flag="%false"),
    )
    assert report.steady_state.name == "outer"


def test_loops_that_are_alike_share_a_line():
    both = f"{permute_start('p')}\n{permute_done('p')}"
    report = report_of(
        "\n".join([run_loop("first", 2), run_loop("second", 2), run_loop("other", 3)]),
        *(loop(name, both) for name in ("first", "second", "other")),
    )
    rows = [
        line
        for line in report.text().splitlines()
        if "(while)" in line and " ms" in line
    ]
    assert [row.split(" (while)")[0] for row in rows] == ["other", "first and 1 more"]
    assert len(report.loops) == 3


def test_json_has_what_the_report_has():
    report = report_of(run_loop("body", 5), loop("body", STEADY))
    read = json.loads(report.to_json())
    assert read["gpu"] == "round figures" and read["efficiency"] == 0.5
    (body,) = read["loops"]
    assert (read["steady_state"], body["name"], body["runs"]) == ("body", "body", 5)
    assert body["without_gemms"] == ["q"]
    assert body["hidden_s"] + body["exposed_s"] == pytest.approx(
        body["communication_s"]
    )
    assert body["collectives"][0]["under"]["flops"] == 2e9


def test_text_table_and_html_name_every_collective():
    report = report_of(run_loop("body", 5), loop("body", STEADY))
    table = report.table()
    assert table.row_count == 3
    for shown in (str(report), report._repr_html_()):
        assert all(each.name in shown for each in report.collectives)
        assert "with no GEMM under them: 1 of 3 (1 collective-permute)" in shown
    assert "assumed:" in str(report)


def test_the_table_says_how_to_get_rich(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "rich.table", None)
    report = report_of(STEADY)
    with pytest.raises(ImportError, match=r"need rich; pip install .*\[train\]"):
        report.table()
    assert "collectives of main" in str(report)


def test_a_module_without_collectives():
    report = report_of(gemm("g"))
    assert report.loops == report.collectives == ()
    assert str(report) == "by_hand: no collectives, so nothing to hide."
    assert "no collectives" in report._repr_html_()
    assert json.loads(report.to_json())["steady_state"] is None
    assert report.table().row_count == 0
    with pytest.raises(ValueError, match=r"by_hand has no collectives"):
        _ = report.steady_state
