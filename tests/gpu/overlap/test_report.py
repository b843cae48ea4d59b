"""How much of the collectives is hidden, and which loop is the steady state."""

import pytest

from tests.gpu.overlap.modules import (
    ALL_TO_ALL,
    COPY,
    GEMM,
    PERMUTE,
    PERMUTED,
    STEADY,
    M,
    all_to_all_done,
    all_to_all_start,
    branch,
    copy,
    gemm,
    loop,
    permute_done,
    permute_start,
    report_of,
    run_loop,
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
        # The all-to-all ends first, when p has run for as long.
        [PERMUTE - ALL_TO_ALL, PERMUTE, ALL_TO_ALL]
    )
    assert report.steady_state.makespan_s == pytest.approx(2 * PERMUTE)


def test_calls_are_part_of_the_computation_that_calls():
    lines = f"{permute_start('p')}\n{gemm('g')}\n{permute_done('p')}"
    called = branch("command_buffer", lines)
    report = report_of(f"  %c = {M} call(%x), to_apply=%command_buffer", called)
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
    """It counts at its start; its done is free."""
    fused = branch("fused", gemm("g"))
    lines = f"""{permute_start("p")}
  %f = (({M}), {M}) fusion-start(%x), kind=kCustom, calls=%fused
  %fd = {M} fusion-done(%f)
  %c = ({M}, {M}, u32[]) copy-start(%x)
  %cd = {M} copy-done(%c)
{permute_done("p")}"""
    (permute,) = report_of(lines, fused).collectives
    assert (permute.under.kernels, permute.under.flops) == (2, 2e9)
    # The fusion reads a matrix twice that is one parameter, and writes one.
    assert permute.under.num_bytes == 4e6 + 4e6


def test_collectives_that_xla_marks_as_synchronous_hide_nothing():
    sync = (
        'source_target_pairs={{0,8}}, backend_config={"collective_backend_config":'
        '{"is_sync":true}}'
    )
    lines = f"{permute_start('p', sync)}\n{gemm('g')}\n{permute_done('p')}"
    (found,) = report_of(lines).collectives
    assert not found.asynchronous
    assert (found.hidden_s, found.under.gemms) == (0, 0)


def test_the_steady_state_is_the_loop_with_the_most_communication():
    report = report_of(
        "\n".join([STEADY, run_loop("small", 9), run_loop("large", 2)]),
        loop("small", all_to_all_start("b") + "\n" + all_to_all_done("b")),
        loop("large", PERMUTED.replace("p", "s", 1)),
    )
    assert report.steady_state.name == "large"
    assert {each.name for each in report.loops} == {"main", "small", "large"}
    assert report.loop("sm").name == "small"
    with pytest.raises(ValueError, match=r"name='' matches 3 .*main"):
        report.loop("")
    with pytest.raises(ValueError, match=r"name='none' matches 0 .*small"):
        report.loop("none")


def test_a_guard_may_be_the_steady_state():
    """Inside a loop; but not one with only as much communication as the loop."""
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
