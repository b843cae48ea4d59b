"""The page of a run while it trains: how often it is written, and how it ends."""

import resource
import shutil

import numpy as np
import pytest

from dualpipe_jax.train.report import LiveReport, Pace, write_report
from tests.train.runs import PUBLISHED, RELOAD, make_run


@pytest.mark.parametrize(("cost", "wait"), [(0.05, 10), (2.0, 200)])
def test_a_live_page_costs_less_than_a_hundredth(cost, wait):
    now, written = 100.0, []
    pace = Pace(clock=lambda: now)
    while now < 100 + 10 * wait:
        if pace.is_due:
            with pace.measured():
                written.append(now)
                now += cost
        now += 0.5  # a step
    gaps = np.diff(written)
    assert len(gaps) >= 8 and (gaps >= wait).all() and (gaps < wait + 4).all()


def test_what_takes_long_to_read_is_read_at_the_end(tmp_path):
    folder = make_run(tmp_path / "a")
    (folder / "profile").mkdir()
    shutil.copy(PUBLISHED, folder / "profile" / "host.trace.json.gz")
    live = LiveReport(folder, {})
    live.update()
    page = (folder / "report.html").read_text()
    assert "when the run has ended" in page and "Measured: " not in page
    live.finish("done")
    assert "Measured: 96.3% of" in (folder / "report.html").read_text()
    assert live.failure is None


def test_what_cannot_be_written_ends_no_run(tmp_path):
    folder = make_run(tmp_path / "a")
    live = LiveReport(folder, {})
    live.update()
    assert live.failure is None and RELOAD in (folder / "report.html").read_text()
    before = (folder / "report.html").read_text()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))  # as on a full disk
    try:
        live.finish("done")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert live.failure.startswith("OSError: ")
    assert (folder / "report.html").read_text() == before
    assert not list(folder.glob("*.new"))
    (folder / "metrics.jsonl").write_text("{}\n")
    live.finish("done")
    assert "without a step" in live.failure


def test_an_error_in_the_steps_is_what_the_page_says(tmp_path):
    folder = make_run(tmp_path / "a")
    with pytest.raises(FloatingPointError), LiveReport(folder, {"devices": "8 x cpu"}):
        raise FloatingPointError("loss=nan at step=41")
    html = (folder / "report.html").read_text()
    assert "ended by FloatingPointError: loss=nan at step=41" in html
    assert RELOAD not in html
    assert write_report(folder).read_text().count("8 x cpu") == 1
