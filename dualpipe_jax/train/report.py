"""A training run as one page of HTML: RUN/report.html, written while it trains."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from dualpipe_jax.files import replace_text
from dualpipe_jax.train import page as _page, report_overlap, report_sections
from dualpipe_jax.train.metrics import read_metrics
from dualpipe_jax.train.report_sections import RUNNING, Record, is_number

FILE, FACTS = "report.html", "run.json"


class Pace:
    """When to repeat something that should take a small share of the time.

    Args:
      every_s: the least number of seconds between two repetitions.
      share: the largest share of the time that they may take.
      clock: returns seconds.
    """

    def __init__(
        self,
        every_s: float = 10.0,
        share: float = 0.01,
        clock: Callable[[], float] = time.perf_counter,
    ):
        self._every_s, self._share, self._clock = every_s, share, clock
        self._due = -float("inf")

    @property
    def is_due(self) -> bool:
        """Whether it is time for the next one."""
        return self._clock() >= self._due

    @contextlib.contextmanager
    def measured(self) -> Iterator[None]:
        """Measures the block, which is one repetition."""
        started = self._clock()
        try:
            yield
        finally:
            ended = self._clock()
            self._due = ended + max(self._every_s, (ended - started) / self._share)


class LiveReport:
    """Keeps a run's page up to date. A page that cannot be written never ends the run.

    Use it as a context manager around the steps: the page tells of an error that leaves
    it. Call `finish` when all went well.

    Args:
      folder: the run's.
      facts: the contents of run.json, about devices, versions and the compilation.

    Attributes:
      failure: why the page could not be written the last time, or None.
    """

    def __init__(self, folder: Path, facts: dict[str, Any]):
        self._folder, self._facts = folder, facts
        self._pace = Pace()
        self.failure: str | None = None
        self._tell(RUNNING)

    def __enter__(self) -> LiveReport:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: Any, _) -> None:
        if kind is not None:
            self.finish(f"ended by {kind.__name__}: {error}")

    def update(self) -> None:
        """Writes the page now and then; call this after each step."""
        if self._pace.is_due:
            self._write(live=True)

    def finish(self, state: str) -> None:
        """Writes the page for the last time; `state` is how the run ended."""
        self._tell(state)
        self._write(live=True)
        # A profile of hundreds of thousands of kernels takes a while to read.
        if (self._folder / report_overlap.PROFILE).is_dir():
            self._write(live=False)

    def _tell(self, state: str) -> None:
        facts = json.dumps(self._facts | {"state": state}, indent=2) + "\n"
        with contextlib.suppress(OSError):
            replace_text(self._folder / FACTS, facts)

    def _write(self, *, live: bool) -> None:
        self.failure = None
        with self._pace.measured():
            try:
                write_report(self._folder, live=live)
            except Exception as error:  # a picture of a run is not worth the run
                self.failure = f"{type(error).__name__}: {error}"


def write_report(
    folder: str | Path, out: str | Path | None = None, *, live: bool = False
) -> Path:
    """Writes a run's page and returns where; see `report_html`.

    Args:
      folder: the run's.
      out: the file; None: report.html in the folder.
      live: as for `report_html`.
    """
    path = Path(out) if out is not None else Path(folder) / FILE
    replace_text(path, report_html(folder, live=live))
    return path


def report_html(folder: str | Path, *, live: bool = False) -> str:
    """The page of a run: what it is, its curves, experts, schedule and overlap.

    Everything is in the one file; it loads nothing. While the run is unfinished the
    page reloads itself.

    Args:
      folder: the run's. Its config.json and metrics.jsonl are read, and run.json,
        launches.jsonl, schedule.svg, sample.txt, overlap.json and profile/ if they
        exist.
      live: leave out what takes long to read.

    Raises:
      ValueError: the folder is not a run's, has no record yet, or one of its files
        cannot be read.
    """
    folder = Path(folder)
    config, facts = _object(folder / "config.json"), _object(folder / FACTS)
    records = _records(folder)
    name, state = str(config.get("name", folder.name)), str(facts.get("state", ""))
    parts = [
        f"<h1>{_page.escape(name)}</h1>",
        _page.paragraph(report_sections.status(config, records, state), "faint"),
        _page.figures(report_sections.headline(records)),
        _page.facts(report_sections.summary(config, facts, records)),
        *report_sections.launches(folder),
        *report_sections.model(facts),
        *report_sections.curves(records, str(facts.get("unit", "byte"))),
        *report_sections.experts(records, config),
        *report_sections.schedule(folder),
        *report_overlap.section(folder, live=live),
        *report_sections.sample(folder),
        "<h2>Config</h2>",
        _page.folded(
            "config.json", f"<pre>{_page.escape(json.dumps(config, indent=2))}</pre>"
        ),
    ]
    return _page.page(name, parts, reload=state == RUNNING)


def _object(path: Path) -> dict[str, Any]:
    """A JSON file's object; an empty one where there is no file."""
    if not path.exists():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}.") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} does not hold a JSON object; is it a run's?")
    return found


def _records(folder: Path) -> list[Record]:
    path = folder / "metrics.jsonl"
    if not path.is_file():
        raise ValueError(
            f"{folder} is not the folder of a run: it has no metrics.jsonl; give the "
            "folder that train's --out named."
        )
    try:
        records = read_metrics(path)
    except ValueError as error:
        raise ValueError(f"{path} has a line that is not JSON: {error}.") from None
    if not all(isinstance(r, dict) and is_number(r.get("step")) for r in records):
        raise ValueError(f"{path} has a record without a step; is it a run's?")
    if not records:
        raise ValueError(f"{path} has no record yet; try again after the first step.")
    return records
