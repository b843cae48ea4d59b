"""Schedules as data: tables of tasks, how they are validated, and what they cost.

Imports: nothing. Without jax.
"""

from dualpipe_jax.schedules.arrays import ScheduleArrays as ScheduleArrays
from dualpipe_jax.schedules.schedule import Schedule, predecessors as predecessors
from dualpipe_jax.schedules.simulator import (
    Costs,
    StepSpan as StepSpan,
    Timeline,
    measure as measure,
    simulate,
    simulate_steps as simulate_steps,
)
from dualpipe_jax.schedules.tasks import (
    OPS as OPS,
    Step as Step,
    Task,
    result_of as result_of,
)
from dualpipe_jax.schedules.validate import check_size as check_size

__all__ = [
    "Costs",
    "Schedule",
    "Task",
    "Timeline",
    "simulate",
]
