"""The report as text, JSON, tables and HTML."""

import json
import sys

import pytest

from tests.gpu.overlap.modules import (
    PERMUTED,
    STEADY,
    gemm,
    loop,
    report_of,
    run_loop,
)


def test_loops_that_are_alike_share_a_line():
    report = report_of(
        "\n".join([run_loop("first", 2), run_loop("second", 2), run_loop("other", 3)]),
        *(loop(name, PERMUTED) for name in ("first", "second", "other")),
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
    assert read["gpu"] == "round numbers" and read["efficiency"] == 0.5
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
    monkeypatch.setitem(sys.modules, "rich.table", None)
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
