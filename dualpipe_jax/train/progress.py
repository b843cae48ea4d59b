"""What a run shows while it trains: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)


class TrainProgress:
    """Loss, tokens/s, balancedness of the experts and bubble of the last step.

    Args:
      console: shows a bar if it is a terminal, else a line now and then.
      num_steps: of the whole run.
      step: steps done already.
      lines: how many lines the whole run prints without a terminal.
    """

    def __init__(
        self, console: Console, num_steps: int, step: int = 0, *, lines: int = 20
    ):
        self._console = console
        self._num_steps = num_steps
        self._every = max(1, num_steps // lines)
        self._progress = Progress(
            TextColumn("step"),
            MofNCompleteColumn(),
            BarColumn(),
            TextColumn("{task.fields[text]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._task = self._progress.add_task(
            "", total=num_steps, completed=step, text=""
        )

    def __enter__(self) -> TrainProgress:
        self._progress.start()
        return self

    def __exit__(self, *_) -> None:
        self._progress.stop()

    def update(self, record: dict[str, Any]) -> None:
        """Shows one record of metrics.jsonl."""
        step = record["step"]
        text = f"loss {record['loss']:.3f}  {record['tokens_per_s']:,.0f} tokens/s"
        if "balancedness" in record:
            text += f"  balancedness {record['balancedness']:.2f}"
        text += f"  bubble {record['pipeline_bubble_ratio']:.1%}"
        self._progress.update(self._task, completed=step, text=text)
        if not self._console.is_terminal and (
            step % self._every == 0 or step == self._num_steps
        ):
            self._console.print(f"step {step}/{self._num_steps}  {text}")
