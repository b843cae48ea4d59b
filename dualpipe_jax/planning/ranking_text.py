"""Puts a ranking into words, and into tables of text and of HTML."""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterable, Sequence
from html import escape
from typing import TYPE_CHECKING

from dualpipe_jax.pictures import KINDS, format_bytes, parse_bytes
from eplb_jax.style import FAINT

if TYPE_CHECKING:
    from dualpipe_jax.planning.ranking import RankedSchedule, Ranking

_HEAD = ("", "schedule", "M", "remat", "time", "speed", "bubble")
_BYTES = ("params", "grads", "optim", "resid", "W resid", "msgs", "work", "other")


def title(candidate: RankedSchedule) -> str:
    """Names a candidate, for example `DualPipe, M=32, remat full`."""
    words = [_kind(candidate), f"M={candidate.num_microbatches}"]
    if candidate.remat != "none":
        words.append(f"remat {candidate.remat}")
    return ", ".join(words)


def with_reasons(ranked: Sequence[RankedSchedule]) -> tuple[RankedSchedule, ...]:
    """Returns the candidates, each with the reason why it is or is not the first."""
    if not ranked:
        return ()
    best = ranked[0] if ranked[0].fits else None
    return tuple(
        dataclasses.replace(each, reason=_reason(each, best) + ".") for each in ranked
    )


def _reason(each: RankedSchedule, best: RankedSchedule | None) -> str:
    if each is best:
        return _why_best(each)
    if each.fits and best is not None:
        return _why_slower(each, best)
    lacks = _why_too_large(each, best)
    if best is None:
        return lacks
    if each.time < best.time and not _same(each.time, best.time):
        faster = 100 * (1 - each.time / best.time)
        return f"would take {faster:.1f} % less time than the best, but {lacks}"
    return f"{lacks}; it would not be faster either"


def _why_best(best: RankedSchedule) -> str:
    text = (
        f"the fastest that fits: {best.time:,.6g} per step, "
        f"{_percent(best.bubble_ratio)} bubbles; needs "
        f"{format_bytes(best.memory.total)} of {format_bytes(best.limit)}"
    )
    if _has_pairs(best):
        alone, pair = _alone(best), _pair(best)
        if pair < alone:
            text += (
                f"; its pairs take {pair:,.5g} where F and B alone take {alone:,.5g}"
            )
    return text


def _why_slower(each: RankedSchedule, best: RankedSchedule) -> str:
    if _same(each.time, best.time):
        if _same(each.memory.total, best.memory.total):
            return "just as fast as the best, in the same memory"
        return f"just as fast as the best, but needs {format_bytes(each.memory.total)}"
    ratio = each.time / best.time
    more = 100 * (ratio - 1)
    text = f"takes {more:{'.1f' if more >= 0.1 else '.2g'}} % longer than the best"
    if ratio > 1.5:
        text = f"takes {ratio:.2f} times as long as the best"
    causes = []
    if _has_pairs(best) and not _has_pairs(each) and _pair(best) < _alone(best):
        scale = each.costs.F / best.costs.F
        causes.append(
            f"it runs F and B one after the other ({_alone(each):,.5g}, where a pair "
            f"would take {_pair(best) * scale:,.5g})"
            if each.remat == best.remat
            else "it runs F and B one after the other"
        )
    if each.remat not in ("none", best.remat):
        causes.append(f"recomputes ({each.remat})")
    if each.num_microbatches != best.num_microbatches:
        causes.append(f"M={each.num_microbatches} instead of {best.num_microbatches}")
    waits = (
        f"waits {each.bubble:,.5g} ({_percent(each.bubble_ratio)}), the best "
        f"{best.bubble:,.5g} ({_percent(best.bubble_ratio)})"
    )
    work = f"works {_work(each):,.5g}, the best {_work(best):,.5g}"
    numbers = [waits] if _same(_work(each), _work(best)) else [work, waits]
    return f"{text}: {', '.join(causes + numbers)}"


def _why_too_large(each: RankedSchedule, best: RankedSchedule | None) -> str:
    need = f"needs {format_bytes(each.memory.total)}, {format_bytes(-each.spare)}"
    return f"{need} more than the limit: {_largest(each, best)}"


def _largest(each: RankedSchedule, best: RankedSchedule | None) -> str:
    """Names the two largest parts of its memory, or of its excess over the best."""
    program = each.program
    stages = len(program.chunks[0])
    half = "half " if program.schedule.num_stages > program.schedule.num_ranks else ""
    words = {
        "parameters": "parameters at rest and in use",
        "gradients": f"accumulators of {stages} {half}stage{'s' * (stages > 1)}",
        "optimizer": "optimizer state",
        "residuals": f"{program.num_slots} activation slots",
        "wgrad_residuals": (
            f"{program.num_wgrad_residual_slots} slots of wgrad residuals"
        ),
        "messages": "messages",
        "workspace": "workspace",
        "other": "the rest",
    }
    mine = vars(each.memory)
    theirs = vars(best.memory) if best else dict.fromkeys(mine, 0.0)
    extra = {name: mine[name] - theirs[name] for name in mine}
    top = sorted((n for n in extra if extra[n] > 0), key=lambda n: -extra[n])[:2]
    return " and ".join(
        f"{format_bytes(mine[name])} for {words[name]}"
        + (f" ({format_bytes(theirs[name])} in the best)" if best else "")
        for name in top
    )


def reasons(ranking: Ranking) -> Iterable[str]:
    """Yields why the best is best, then lines on other schedules, and the notes."""
    best = ranking.best
    if best is not None:
        yield f"{title(best)}: {best.reason}"
    elif ranking.candidates:
        least = ranking.candidates[0]
        yield (
            f"Nothing fits in {format_bytes(ranking.limit)}. The smallest is "
            f"{title(least)}: {least.reason} Recompute more, shard more, or use more "
            "ranks or smaller microbatches."
        )
    else:
        yield "No schedule can be built for these sizes."
    schedules = dict.fromkeys(each.schedule for each in ranking.candidates)
    for schedule in schedules:
        own = [each for each in ranking.candidates if each.schedule == schedule]
        fitting = [each for each in own if each.fits]
        too_large = [each for each in own if not each.fits]
        # Of those that would be faster, the one closest to fitting.
        told = [each for each in too_large if best and each.time < best.time][:1]
        told += [each for each in fitting[:1] if each is not best]
        if not told and not fitting and own[0] is not ranking.candidates[0]:
            told = own[:1]
        for each in told:
            none_fits = best and not fitting and len(own) > 1
            end = f" No {_kind(each)} fits." if none_fits else ""
            yield f"{title(each)}: {each.reason}{end}"
    for schedule, size, why in ranking.left_out:
        yield f"{schedule} with M={size} is left out: {why}"
    for note in ranking.notes:
        yield f"Note: {note}"


def table(ranking: Ranking) -> list[tuple[str, ...]]:
    """Returns rows of text, heading first, without kinds of memory that none needs."""
    unit = _unit(ranking)
    size = parse_bytes(f"1{unit}")
    rows: list[tuple[str, ...]] = [(*_HEAD, *_BYTES, "total", "spare")]
    first = ranking.candidates[0].time if ranking.candidates else 1.0
    for place, each in enumerate(ranking.candidates, start=1):
        parts = (*vars(each.memory).values(), each.memory.total, each.spare)
        rows.append(
            (
                str(place) if each.fits else "-",
                _kind(each),
                str(each.num_microbatches),
                each.remat,
                f"{each.time:,.6g}",
                f"{first / each.time:.2f}",
                _percent(each.bubble_ratio),
                *(f"{part / size:,.1f}" for part in parts),
            )
        )
    used = [
        at
        for at, column in enumerate(zip(*rows, strict=True))
        if column[0] not in _BYTES or set(column[1:]) != {"0.0"}
    ]
    return [tuple(row[at] for at in used) for row in rows]


def text(ranking: Ranking) -> str:
    """Returns the table and the reasons."""
    rows = table(ranking)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    left = (1, 3)
    lines = [
        "  ".join(
            cell.ljust(width) if at in left else cell.rjust(width)
            for at, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]
    lines = [line.rstrip() for line in lines] if ranking.candidates else []
    for line in (_caption(ranking), *ranking.reason.splitlines()):
        lines += textwrap.wrap(line, 96, subsequent_indent="    ")
    return "\n".join(lines)


def html(ranking: Ranking) -> str:
    """Returns the table for notebooks, in which candidates that do not fit are grey."""
    head, *rows = table(ranking)
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    lines = [f"<table><tr>{cells}</tr>"]
    for each, row in zip(ranking.candidates, rows, strict=True):
        faint = "" if each.fits else f' style="color:{FAINT}"'
        cells = "".join(f"<td>{escape(cell)}</td>" for cell in row)
        lines.append(f'<tr{faint} title="{escape(each.reason)}">{cells}</tr>')
    lines.append(f"</table><p>{escape(_caption(ranking))}</p><ul>")
    lines += [f"<li>{escape(line)}</li>" for line in ranking.reason.splitlines()]
    return "\n".join([*lines, "</ul>"])


def _caption(ranking: Ranking) -> str:
    return (
        f"time in the unit of the costs; memory per device in {_unit(ranking)}, limit "
        f"{format_bytes(ranking.limit)}; - does not fit"
    )


def _unit(ranking: Ranking) -> str:
    return format_bytes(ranking.limit).rpartition(" ")[2]


def _kind(candidate: RankedSchedule) -> str:
    return KINDS[candidate.program.schedule.kind]


def _has_pairs(candidate: RankedSchedule) -> bool:
    return any(len(kind) == 2 for kind in candidate.program.kinds)


def _alone(candidate: RankedSchedule) -> float:
    return candidate.costs.F + (candidate.costs.B or 0.0)


def _pair(candidate: RankedSchedule) -> float:
    return candidate.costs.FB or 0.0  # a number always; its type allows None


def _work(candidate: RankedSchedule) -> float:
    """Returns the mean time of a rank outside of bubbles."""
    return candidate.time - candidate.bubble


def _percent(ratio: float) -> str:
    return f"{100 * ratio:.1f} %"


def _same(a: float, b: float) -> bool:
    return abs(a - b) <= 1e-8 * max(abs(a), abs(b))
