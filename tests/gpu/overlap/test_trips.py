"""How often computations run: loops, guards, branches, and blocks of a buffer."""

import pytest

from tests.gpu.overlap.modules import (
    ALL_TO_ALL,
    COPY,
    PERMUTE,
    PERMUTED,
    M,
    all_to_all_done,
    all_to_all_start,
    branch,
    copy,
    loop,
    permute_done,
    permute_start,
    report_of,
    run_loop,
)


def test_loops_count_as_compute_of_all_their_trips():
    lines = "\n".join([permute_start("p"), run_loop("inner", 3), permute_done("p")])
    report = report_of(lines, loop("inner", copy("k")))
    (permute,) = report.collectives
    assert permute.under.kernels == 3
    assert permute.exposed_s == pytest.approx(PERMUTE - 3 * COPY)


@pytest.mark.parametrize(
    ("given", "trips"), [(None, 1), (7, 7), ({"inn*": 4}, 4), ({"other": 4}, 1)]
)
def test_trips_that_depend_on_data_can_be_given(given, trips):
    lines = "\n".join([permute_start("p"), run_loop("inner"), permute_done("p")])
    report = report_of(lines, loop("inner", copy("k")), trip_counts=given)
    assert report.collectives[0].under.kernels == trips
    guesses = [each for each in report.assumptions if "data-dependent" in each]
    assert bool(guesses) == (trips == 1)


def test_runs_multiply_along_the_way():
    report = report_of(
        run_loop("outer", 3),
        loop("inner", PERMUTED),
        loop("outer", run_loop("inner", 5)),
    )
    (found,) = report.loops
    assert (found.runs, found.runs_at_most) == (15, 15)
    assert [frame.computation for frame in found.path] == ["outer", "inner"]


def test_runs_that_depend_on_data_are_unknown():
    report = report_of(
        run_loop("outer"),
        loop("inner", PERMUTED),
        loop("outer", run_loop("inner", 5)),
    )
    (found,) = report.loops
    assert (found.runs, found.runs_at_most) == (None, None)
    assert "unknown" in str(report)


def test_a_loop_that_is_named_so_is_not_counted_on():
    run = run_loop("inner", scope="rarely")
    lines = "\n".join([permute_start("p"), run, permute_done("p")])
    report = report_of(lines, loop("inner", copy("k")))
    assert report.collectives[0].under.kernels == 0
    assert any("in exceptional cases only" in each for each in report.assumptions)


def test_a_guard_runs_at_most_once():
    guard = loop("guard", PERMUTED, flag="%false")
    report = report_of(run_loop("outer", 3), guard, loop("outer", run_loop("guard")))
    (found,) = report.loops
    assert (found.kind, found.runs, found.runs_at_most) == ("guard", None, 3)
    assert "<=3" in str(report)


def test_a_copy_may_clear_the_flag_of_a_guard():
    lines = "  %cleared = pred[] copy(%false)\n" + permute_start("p")
    guard = loop("guard", f"{lines}\n{permute_done('p')}", flag="%cleared")
    assert report_of(run_loop("guard"), guard).loops[0].kind == "guard"
    # One number for all loops does not apply to guards; a number by name does.
    lines = "\n".join([permute_start("p"), run_loop("guard"), permute_done("p")])
    guard = loop("guard", copy("k"), flag="%false")
    for given, kernels in [(9, 1), ({"guard": 0}, 0)]:
        report = report_of(lines, guard, trip_counts=given)
        assert report.collectives[0].under.kernels == kernels


@pytest.mark.parametrize("flag", ["%flag", "%true", "%more"])
def test_a_loop_that_does_not_clear_its_flag_is_not_a_guard(flag):
    lines = f"""  %true = pred[] constant(true)
  %more = pred[] compare(%i, %i), direction=LT
{permute_start("p")}
{permute_done("p")}"""
    (found,) = report_of(run_loop("body"), loop("body", lines, flag=flag)).loops
    assert (found.kind, found.runs_at_most) == ("while", None)


def test_branches_run_at_most_once_and_the_longest_counts():
    lines = f"""  %which = s32[] constant(1)
{permute_start("p")}
  %c = {M} conditional(%which, %x, %x), branch_computations={{%few, %many}}
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


def test_blocks_of_a_ragged_buffer_are_guessed_to_fill_it_once():
    """As in a grouped product: 4 groups, in blocks of 100 rows, then of 10."""
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
    # 10 large blocks over 4 groups, and one small block per group; two kernels each.
    in_blocks = (10 / 4 * 2 + 1 * 2) * 4
    conditions = 5 + 4 * (10 / 4 + 1) + 4 * 2
    assert report.collectives[0].under.kernels == pytest.approx(in_blocks + conditions)
    assert any(
        "2 loops run over the blocks of a buffer" in a for a in report.assumptions
    )
