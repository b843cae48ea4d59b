"""Shows a profile's figures as text and as HTML tables."""

from __future__ import annotations

from html import escape
from typing import TYPE_CHECKING

from dualpipe_jax.pictures import TableRow, aligned, html_table, named_phase

if TYPE_CHECKING:
    from dualpipe_jax.profiles.records import Phase
    from dualpipe_jax.profiles.report import TraceReport

_KERNELS = 10
_NAME = 64

Rows = list[TableRow]


def text(report: TraceReport, chunks: int | None = None) -> str:
    """Returns the headline, and tables of phases, streams and the costliest kernels."""
    parts = [headline(report)]
    for rows in tables(report):
        parts.append("\n".join(aligned(rows)))
    if report.phases:
        parts.append(costs_line(report, chunks))
    return "\n\n".join(parts)


def html(report: TraceReport) -> str:
    """Returns the same as HTML tables."""
    lines = "".join(f"<p>{escape(line)}</p>" for line in headline(report).splitlines())
    found = "".join(html_table(rows) for rows in tables(report))
    costs = f"<p>{escape(costs_line(report))}</p>" if report.phases else ""
    return f"<div>{lines}{found}{costs}</div>"


def headline(report: TraceReport) -> str:
    """Returns four lines: the title, span, compute and communication."""
    devices = len(report.devices)
    count = f"{devices} devices (means below)" if devices > 1 else "1 device"
    lines = [
        f"{report.title}: {len(report.spans):,} kernels on {count}",
        f"span           {_ms(report.span_us)}",
        f"compute        {_ms(report.compute_us)}  busy {report.compute_busy:.1%}",
    ]
    if report.comm_us:
        lines.append(
            f"communication  {_ms(report.comm_us)}  {report.comm_hidden:.1%} hidden "
            f"under compute, {report.exposed_us / 1e3:.1f} ms exposed"
        )
    else:
        lines.append("communication  none")
    return "\n".join(lines)


def costs_line(report: TraceReport, chunks: int | None = None) -> str:
    """Returns the costs as an argument of `simulate --costs`."""
    costs = report.costs(chunks)
    given = {"F": costs.F, "I": costs.I, "W": costs.W}
    if costs.F + (costs.B or 0.0) != costs.FB:
        given["FB"] = costs.FB or 0.0
    listed = ",".join(f"{name}={value:.4g}" for name, value in given.items())
    return f"in ms, for simulate: --costs {listed}"


def tables(report: TraceReport) -> list[Rows]:
    """Returns tables of phases, devices if there are several, streams and kernels."""
    found = []
    if report.phases:
        found.append(
            [
                ("phase", "kernels", "compute", "communication", "hidden"),
                *map(_phase_row, report.phases.values()),
            ]
        )
    if len(report.devices) > 1:
        found.append(
            [
                ("device", "span", "compute", "communication", "hidden"),
                *(
                    (
                        each.name,
                        _ms(each.span_us),
                        _ms(each.compute_us),
                        _ms(each.comm_us),
                        _share(each.hidden_us, each.comm_us),
                    )
                    for each in report.devices
                ),
            ]
        )
    found.append(
        [
            ("stream", "kernels", "busy", "communication"),
            *(
                (
                    f"{each.device}, {each.name}",
                    f"{each.num_kernels:,}",
                    _ms(each.busy_us),
                    _ms(each.comm_us),
                )
                for each in report.streams
            ),
        ]
    )
    found.append(
        [
            ("kernel", "count", "time", "kind"),
            *(
                (
                    short(each.name),
                    f"{each.count:,}",
                    _ms(each.total_us),
                    "communication" if each.is_comm else "compute",
                )
                for each in report.kernels[:_KERNELS]
            ),
        ]
    )
    return found


def short(name: str) -> str:
    """Returns a kernel's name without its arguments, cut off if it is long."""
    if named_phase(name):
        return name
    bare = name.removeprefix("void ").partition("(")[0].strip() or name
    return bare if len(bare) <= _NAME else f"{bare[: _NAME - 3]}..."


def _phase_row(phase: Phase) -> tuple[str, ...]:
    return (
        phase.name,
        f"{phase.num_kernels:,}",
        _ms(phase.compute_us),
        _ms(phase.comm_us),
        _share(phase.hidden_us, phase.comm_us),
    )


def _ms(us: float) -> str:
    return f"{us / 1e3:.1f} ms" if us else "-"


def _share(part: float, whole: float) -> str:
    return f"{part / whole:.1%}" if whole else "-"
