"""What a ranking says of candidates that fit, do not fit, or do not exist."""

import pytest

from dualpipe_jax import Costs, Remat, StageMemory, rank_schedules
from tests.planning.rankings import ALL, DEEPSEEK, NOTHING


def test_nothing_fits_and_what_comes_closest():
    memory = StageMemory(residuals=2, wgrad_residuals=1, parameters=2, gradients=4)
    ranking = rank_schedules(8, 32, DEEPSEEK, memory, limit=4, schedules=ALL)
    assert ranking.best is None and ranking.fitting == ()
    assert ranking.reason.startswith(
        "Nothing fits in 4 B. The smallest is 1F1B, M=32: needs 22 B, 18 B more than "
        "the limit: 16 B for 8 activation slots and 4 B for accumulators of 1 stage."
    )
    needs = [each.memory.total for each in ranking.candidates]
    assert needs == sorted(needs)
    assert "best: none" in repr(ranking)


def test_what_needs_all_of_the_limit_fits():
    memory = StageMemory(residuals=2, wgrad_residuals=1, parameters=2, gradients=4)
    exact = rank_schedules(8, 32, DEEPSEEK, memory, limit=22, schedules=ALL)
    assert exact.best.schedule == "1f1b" and exact.best.spare == 0
    less = rank_schedules(8, 32, DEEPSEEK, memory, limit=22 - 1e-9, schedules=ALL)
    assert less.best is None


def test_sizes_without_a_schedule_are_left_out_with_the_reason():
    ranking = rank_schedules(8, [12, 17, 32], DEEPSEEK, NOTHING, limit=1, schedules=ALL)
    left_out = {(name, size) for name, size, _ in ranking.left_out}
    assert left_out == {("dualpipe", 12), ("dualpipev", 12), ("dualpipe", 17)}
    assert "must be even and >= 2*num_ranks=8" in ranking.reason
    assert len(ranking.candidates) == 3 * 5 - 3
    none = rank_schedules(3, 7, DEEPSEEK, NOTHING, limit=1, schedules=["dualpipe"])
    assert (none.best, none.candidates) == (None, ())
    assert "No schedule can be built" in str(none) and "must be even" in str(none)
    assert "<table>" in none._repr_html_()


def test_equally_fast_ones_are_ranked_by_memory():
    memory = StageMemory(residuals=1, wgrad_residuals=0, parameters=0, gradients=0)
    ranking = rank_schedules(
        4, 16, Costs(), memory, limit=99, schedules=["gpipe", "1f1b"]
    )
    assert [each.schedule for each in ranking.candidates] == ["1f1b", "gpipe"]
    assert "just as fast as the best, but needs 16 B" in ranking.reason


def test_notebooks_show_a_table_that_escapes_names():
    remat = Remat("<b>&", 0, 0)
    ranking = rank_schedules(
        2, 4, Costs(), NOTHING, limit=1, remat=remat, schedules=ALL
    )
    html = ranking._repr_html_()
    assert "<b>" not in html and "&lt;b&gt;&amp;" in html
    assert html.count("<tr") == 1 + len(ranking.candidates) == 11
    assert html.count("<li>") == len(ranking.reason.splitlines())


def test_a_ranking_does_not_change():
    ranking = rank_schedules(4, 8, DEEPSEEK, NOTHING, limit=1)
    with pytest.raises(AttributeError):
        ranking.limit = 3
    with pytest.raises(AttributeError):
        ranking.best.time = 0
