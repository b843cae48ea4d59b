"""Finds the innermost of a profile's annotations at a moment."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable
from typing import NamedTuple


class Annotation(NamedTuple):
    """A named interval that the profiled program marked."""

    begin: float
    end: float
    name: str


class Innermost:
    """Looks up the innermost of nested annotations at a moment."""

    def __init__(self, annotations: Iterable[Annotation]):
        self.sorted = sorted(annotations, key=lambda each: (each.begin, -each.end))
        self.begins = [each.begin for each in self.sorted]
        # The latest end of all up to here: where a search may stop.
        ends = (each.end for each in self.sorted)
        self.reach = list(itertools.accumulate(ends, max))

    def at(self, moment: float) -> int | None:
        """Returns the index of the annotation, in order of begins; None if none."""
        index = bisect.bisect_right(self.begins, moment) - 1
        while index >= 0 and self.reach[index] >= moment:
            if moment <= self.sorted[index].end:
                return index
            index -= 1
        return None

    def name_at(self, moment: float) -> str | None:
        """Returns the name of the annotation; None if there is none."""
        index = self.at(moment)
        return None if index is None else self.sorted[index].name
