"""Texts that end a completion, found as the completion grows."""

from __future__ import annotations

from collections.abc import Sequence


class StopFinder:
    r"""Passes a growing text on, up to the first of some stops.

    What may be the beginning of a stop is held back until more of the text is there.

    Examples:
      >>> finder = StopFinder(["\n\n", "END"])
      >>> [finder.add(text) for text in ("one E", "V", "EN", "D two")]
      ['one ', 'EV', '', '']
      >>> finder.is_found
      True
    """

    def __init__(self, stops: Sequence[str]):
        """Makes one for a text that is still empty; `stops` are not empty."""
        self._stops = tuple(stops)
        self._held = ""
        self.is_found = False

    def add(self, text: str, is_last: bool = False) -> str:
        """Returns what can be passed on after more text.

        Args:
          text: what has been added.
          is_last: whether nothing follows: then nothing is held back.
        """
        if self.is_found:
            return ""
        if not self._stops:
            return text
        held = self._held + text
        found = [at for at in map(held.find, self._stops) if at >= 0]
        if found:
            self.is_found, self._held = True, ""
            return held[: min(found)]
        size = 0 if is_last else self._longest_beginning(held)
        self._held = held[len(held) - size :]
        return held[: len(held) - size]

    def _longest_beginning(self, text: str) -> int:
        """Returns how many of the last characters may begin a stop."""
        longest = max(map(len, self._stops)) - 1
        for size in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[len(text) - size :]) for stop in self._stops):
                return size
        return 0
