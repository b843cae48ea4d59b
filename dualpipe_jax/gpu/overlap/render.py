"""Shows the report as plain text, as a rich table, and as HTML for Jupyter."""

from __future__ import annotations

import collections
from html import escape
from typing import TYPE_CHECKING

from dualpipe_jax.pictures import aligned, html_table

if TYPE_CHECKING:
    from dualpipe_jax.gpu.overlap.program import CallFrame
    from dualpipe_jax.gpu.overlap.records import LoopReport
    from dualpipe_jax.gpu.overlap.report import OverlapReport

_LOOPS = ("loop", "runs", "time", "compute", "comm", "hidden", "exposed", "hidden %")
_COLLECTIVES = (
    "collective",
    "phase",
    "group",
    "MB",
    "link",
    "time",
    "GEMMs under",
    "GFLOP under",
    "time under",
    "hidden",
    "exposed",
)


def text(report: OverlapReport, name: str | None = None) -> str:
    """Returns all loops, the collectives of one, and the assumptions."""
    if not report.loops:
        return f"{report.module}: no collectives, so nothing to hide."
    loop = _loop(report, name)
    parts = [
        summary(report, name),
        "",
        *aligned([_LOOPS, *_loop_rows(report)]),
        "",
        f"collectives of {_where(loop)}, in the order of their starts:",
        *aligned([_COLLECTIVES, *_collective_rows(loop)]),
        "",
        "assumed:",
        *(f"- {each}" for each in report.assumptions),
    ]
    return "\n".join(parts)


def summary(report: OverlapReport, name: str | None = None) -> str:
    """Summarizes one computation in two lines."""
    if not report.loops:
        return text(report)
    loop = _loop(report, name)
    is_steady = loop is report.steady_state and loop.kind in ("while", "guard")
    kind = "steady state" if is_steady else loop.kind
    lines = (
        f"{report.module}, {kind} {loop.name}: {hidden(loop)}; one run "
        f"{_ms(loop.makespan_s)}, compute {_ms(loop.compute.seconds)}"
    )
    bare = loop.without_gemms
    lines += (
        f"\ncollectives with no GEMM under them: {len(bare)} of {len(loop.collectives)}"
    )
    kinds = collections.Counter(each.kind for each in bare)
    if bare:
        lines += f" ({', '.join(f'{n} {kind}' for kind, n in kinds.most_common())})"
    return lines


def hidden(loop: LoopReport) -> str:
    """Says how much of a computation's communication is hidden."""
    return (
        f"{loop.hidden_fraction:.1%} of {_ms(loop.communication_s)} communication "
        f"hidden, {_ms(loop.exposed_s)} exposed"
    )


def rich_table(report: OverlapReport, name: str | None = None):
    """Returns the collectives of one computation as a `rich.table.Table`."""
    try:
        from rich.table import Table
    except ImportError as error:
        raise ImportError(
            "tables need rich; pip install 'dualpipe-jax[train]', or print the report "
            "as text, which does not."
        ) from error
    if not report.loops:
        return Table(title=str(report))
    loop = _loop(report, name)
    table = Table(
        title=f"{report.module}: {_where(loop)}",
        caption=f"{loop.hidden_fraction:.1%} of {_ms(loop.communication_s)} hidden",
    )
    for number, column in enumerate(_COLLECTIVES):
        table.add_column(column, justify="left" if number < 2 else "right")
    for row, each in zip(_collective_rows(loop), loop.collectives, strict=True):
        bad = each.exposed_s > 0.5 * each.seconds
        table.add_row(*row, style="red" if bad else None)
    return table


def html(report: OverlapReport) -> str:
    """Returns both tables as HTML."""
    if not report.loops:
        return f"<p>{escape(str(report))}</p>"
    loop = report.steady_state
    parts = [
        f"<p>{escape(summary(report))}</p>",
        html_table([_LOOPS, *_loop_rows(report)]),
    ]
    parts.append(f"<p>Collectives of {escape(_where(loop))}:</p>")
    parts.append(html_table([_COLLECTIVES, *_collective_rows(loop)]))
    items = "".join(f"<li>{escape(each)}</li>" for each in report.assumptions)
    return "\n".join([*parts, f"<p>Assumed:</p><ul>{items}</ul>"])


def _loop(report: OverlapReport, name: str | None) -> LoopReport:
    return report.steady_state if name is None else report.loop(name)


def _where(loop: LoopReport) -> str:
    """Names the computation and the loops around it."""
    inside = " > ".join(
        f"{frame.computation} x{_trips(frame)}" for frame in loop.path[:-1]
    )
    return f"{loop.name} ({loop.kind}{', inside ' + inside if inside else ''})"


def _trips(frame: CallFrame) -> str:
    if frame.source == "guard":
        return "0-1"
    return f"{frame.trips:g}" + ("" if frame.source in ("known", "given") else "?")


def runs(loop: LoopReport) -> str:
    """Says how often a computation runs, in a few characters."""
    if loop.runs is not None:
        return f"{loop.runs:g}"
    if loop.runs_at_most is not None:
        return f"<={loop.runs_at_most:g}"
    return "unknown"


def _loop_rows(report: OverlapReport) -> list[tuple[str, ...]]:
    """Returns a row per loop; loops that differ only in their name share one."""
    alike: dict[tuple[str, ...], list[LoopReport]] = {}
    for loop in report.loops:
        alike.setdefault((loop.kind, *_loop_cells(loop)), []).append(loop)
    return [
        (
            loops[0].name
            + (f" and {len(loops) - 1} more" if len(loops) > 1 else "")
            + f" ({kind})",
            *cells,
        )
        for (kind, *cells), loops in alike.items()
    ]


def _loop_cells(loop: LoopReport) -> tuple[str, ...]:
    return (
        runs(loop),
        _ms(loop.makespan_s),
        _ms(loop.compute.seconds),
        _ms(loop.communication_s),
        _ms(loop.hidden_s),
        _ms(loop.exposed_s),
        f"{loop.hidden_fraction:.1%}",
    )


def _collective_rows(loop: LoopReport) -> list[tuple[str, ...]]:
    return [
        (
            each.name + ("" if each.asynchronous else " (sync)"),
            each.phase,
            str(each.group_size),
            f"{each.num_bytes / 1e6:.3g}",
            each.link,
            _ms(each.seconds),
            f"{each.under.gemms:g}",
            f"{each.under.flops / 1e9:.4g}",
            _ms(each.under.seconds),
            _ms(each.hidden_s),
            _ms(each.exposed_s),
        )
        for each in loop.collectives
    ]


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.3f} ms"
