"""The table of a program: follows every value from its writer to its last reader."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from dualpipe_jax.lowering.slots import assign_slots
from dualpipe_jax.lowering.ticks import Clock, Messages
from dualpipe_jax.schedules import OPS, ScheduleArrays

# The order of events in a tick. A step reads all its operands before it writes.
EMBED, READ, WRITE, LOSS_READ, LOSS_WRITE, EMBED_BACKWARD, PERMUTE = range(7)

F, B, I, W = range(len(OPS))

Index = tuple[np.ndarray, ...]
Fields = dict[str, Any]  # arrays, by the names of `Table`


class Table(NamedTuple):
    """What each rank does in each tick: int32 arrays [num_ticks, num_ranks].

    Fields of tasks that a tick does not run hold 0. Slots named `*_in` and `*_out` are
    message slots.
    """

    kind: np.ndarray  # index into Program.kinds, -1 when the rank starts nothing
    f_microbatch: np.ndarray
    f_first: np.ndarray  # 1 where F is the first stage's: its input is embedded
    f_last: np.ndarray  # 1 where F is the last stage's: its output makes the loss
    f_in: np.ndarray
    f_out: np.ndarray
    f_slot: np.ndarray  # activation slot that F fills
    b_microbatch: np.ndarray  # of B, I or W
    b_first: np.ndarray  # 1 where B or I is the first stage's
    b_in: np.ndarray
    b_out: np.ndarray
    b_slot: np.ndarray  # activation slot that B, I or W reads
    wgrad_slot: np.ndarray  # slot of wgrad residuals that I fills or W reads
    loss_out: np.ndarray  # message slot for the cotangent of the loss
    send: np.ndarray  # [num_ticks, num_ranks, rounds]: message slot sent
    receive: np.ndarray  # [num_ticks, num_ranks, rounds]: slot filled, or the spare one


def tabulate(
    clock: Clock, kinds_at: np.ndarray, messages: Messages
) -> tuple[Table, dict[str, int]]:
    """Returns the table, and how many slots of each kind a rank needs.

    Args:
      clock: the ticks.
      kinds_at: [ticks, num_ranks] kind of the step that each rank starts, or -1.
      messages: between ranks.
    """
    arrays, num_rounds = (
        clock.schedule.arrays,
        int(messages.permute.max(initial=-1)) + 1,
    )
    fields: Fields = {
        name: np.zeros(kinds_at.shape, np.int32) for name in Table._fields
    }
    for name in ("send", "receive"):
        fields[name] = np.zeros((*kinds_at.shape, num_rounds), np.int32)
    fields["kind"] = kinds_at
    at = (clock.tick[arrays.step], arrays.rank[arrays.step])
    tabulate_tasks(arrays, at, fields)
    values = _Values(clock, at, num_rounds)
    values.of_tasks()
    values.of_messages(messages)
    values.within_ranks()
    sizes = {}
    for name, pool in values.pools.items():
        slots, sizes[name] = pool.assign()
        if name == "message":
            # A rank that receives nothing in a permute writes to the spare slot.
            fields["receive"][:] = sizes[name]
        pool.write(slots, fields)
    return Table(**fields), sizes


def tabulate_tasks(arrays: ScheduleArrays, at: Index, fields: Fields) -> None:
    """Writes which tasks run where; `at` is (tick, rank) of each task."""
    last = arrays.made.shape[1] - 1
    tick, rank = at
    for name, of, value in (
        ("f_microbatch", arrays.op == F, arrays.microbatch),
        ("f_first", arrays.op == F, arrays.stage == 0),
        ("f_last", arrays.op == F, arrays.stage == last),
        ("b_microbatch", arrays.op != F, arrays.microbatch),
        ("b_first", (arrays.op == B) | (arrays.op == I), arrays.stage == 0),
    ):
        fields[name][tick[of], rank[of]] = value[of]


class _Pool:
    """Values of one kind of slot: how long each is alive, and which fields name it."""

    def __init__(self):
        self.lives: list[tuple[np.ndarray, ...]] = []
        self.uses: list[tuple[tuple[str, Index], ...]] = []

    def add(self, rank, start, end, order, *uses: tuple[str, Index]) -> None:
        """Adds values; of those alive alike, the one of the lowest `order` is first."""
        self.lives.append((start, end, rank, order))
        self.uses.append(uses)

    def assign(self) -> tuple[np.ndarray, int]:
        """Returns the slots of all values, and their number."""
        if not self.lives:
            return np.zeros(0, np.int32), 0
        start, end, rank, order = map(np.concatenate, zip(*self.lives, strict=True))
        by_order = np.argsort(order)
        slots = np.empty(len(order), np.int32)
        slots[by_order], count = assign_slots(
            start[by_order], end[by_order], rank[by_order]
        )
        return slots, count

    def write(self, slots: np.ndarray, fields: Fields) -> None:
        """Writes the slots where they are used."""
        cuts = np.cumsum([len(start) for start, *_ in self.lives])[:-1]
        for own, uses in zip(np.split(slots, cuts), self.uses, strict=False):
            for name, index in uses:
                fields[name][index] = own


class _Values:
    """Every value that a rank keeps from one moment to a later one.

    `order` is that in which the tasks, the messages, and the values passed within a
    rank come.
    """

    def __init__(self, clock: Clock, at: Index, num_rounds: int):
        self.clock, self.at, self.num_rounds = clock, at, num_rounds
        self.arrays = clock.schedule.arrays
        self.pools = {
            name: _Pool() for name in ("activation", "message", "wgrad_residuals")
        }

    def _time(self, tick: np.ndarray, phase: int | np.ndarray) -> np.ndarray:
        return tick * (PERMUTE + 2 * self.num_rounds) + phase

    def _tick_of(self, op: int, tasks: np.ndarray) -> np.ndarray:
        """Ticks in which a result of the tasks' stages and microbatches is made."""
        a = self.arrays
        return self.clock.tick[a.made[op, a.stage[tasks], a.microbatch[tasks]]]

    def of_tasks(self) -> None:
        """Adds what tasks make or take alone, and what they keep for later ones."""
        a, last = self.arrays, self.arrays.made.shape[1] - 1
        is_backward = (a.op == B) | (a.op == I)
        ends = (
            (0, "f_in", (a.op == F) & (a.stage == 0), EMBED, READ),
            (1, "f_out", (a.op == F) & (a.stage == last), WRITE, LOSS_READ),
            (0, "b_out", is_backward & (a.stage == 0), WRITE, EMBED_BACKWARD),
        )
        for order, name, chosen, start, end in ends:
            (tasks,) = np.nonzero(chosen)
            tick, rank = at = self.at[0][tasks], self.at[1][tasks]
            self.pools["message"].add(
                rank,
                self._time(tick, start),
                self._time(tick, end),
                4 * tasks + order,
                (name, at),
            )
        if is_backward.any():
            self._losses()
            self._activations()
            self._wgrad_residuals()

    def _losses(self) -> None:
        a, last = self.arrays, self.arrays.made.shape[1] - 1
        (tasks,) = np.nonzero((a.op == F) & (a.stage == last))
        tick, rank = at = self.at[0][tasks], self.at[1][tasks]
        back = self._tick_of(I, tasks)
        starts, ends = self._time(tick, LOSS_WRITE), self._time(back, READ)
        uses = ("loss_out", at), ("b_in", (back, rank))
        self.pools["message"].add(rank, starts, ends, 4 * tasks + 2, *uses)

    def _activations(self) -> None:
        (tasks,) = np.nonzero(self.arrays.op == F)
        tick, rank = at = self.at[0][tasks], self.at[1][tasks]
        back, a = self._tick_of(I, tasks), self.arrays
        has_w = a.made[W, a.stage[tasks], a.microbatch[tasks]] >= 0
        done = np.where(has_w, self._tick_of(W, tasks), back)
        # The slot is taken while F still runs beside the B that frees another.
        starts, ends = self._time(tick, READ), self._time(done, READ)
        uses = ("f_slot", at), ("b_slot", (done, rank)), ("b_slot", (back, rank))
        self.pools["activation"].add(rank, starts, ends, tasks, *uses)

    def _wgrad_residuals(self) -> None:
        (tasks,) = np.nonzero(self.arrays.op == W)
        tick, rank = at = self.at[0][tasks], self.at[1][tasks]
        filled = self._tick_of(I, tasks)
        starts, ends = self._time(filled, WRITE), self._time(tick, READ)
        uses = ("wgrad_slot", (filled, rank)), ("wgrad_slot", at)
        self.pools["wgrad_residuals"].add(rank, starts, ends, tasks, *uses)

    def of_messages(self, messages: Messages) -> None:
        """Adds what is sent and received: from out-slot to in-slot by permute."""
        a, tick, k = self.arrays, messages.tick, messages.permute
        made, used = (
            self.clock.tick[messages.sender],
            self.clock.tick[messages.receiver],
        )
        source, target = a.rank[messages.sender], a.rank[messages.receiver]
        order = 4 * len(a.op) + 2 * np.arange(len(tick))
        for op, out, into in (("F", "f_out", "f_in"), ("I", "b_out", "b_in")):
            own = (a.op[messages.task] == F) == (op == "F")
            self.pools["message"].add(
                source[own],
                self._time(made[own], WRITE),
                self._time(tick[own], PERMUTE + 2 * k[own]),
                order[own],
                (out, (made[own], source[own])),
                ("send", (tick[own], source[own], k[own])),
            )
            self.pools["message"].add(
                target[own],
                self._time(tick[own], PERMUTE + 2 * k[own] + 1),
                self._time(used[own], READ),
                order[own] + 1,
                ("receive", (tick[own], target[own], k[own])),
                (into, (used[own], target[own])),
            )

    def within_ranks(self) -> None:
        """Adds what stages of one rank pass on: from out-slot to in-slot."""
        a = self.arrays
        is_same = a.rank[a.passed] == a.rank[a.step]
        for is_forward, out, into in (
            (True, "f_out", "f_in"),
            (False, "b_out", "b_in"),
        ):
            (tasks,) = np.nonzero(
                (a.passed >= 0) & is_same & ((a.op == F) == is_forward)
            )
            here, there = self.clock.tick[a.passed[tasks]], self.at[0][tasks]
            rank = self.at[1][tasks]
            self.pools["message"].add(
                rank,
                self._time(here, WRITE),
                self._time(there, READ),
                (4 + 2) * len(a.op) + tasks,  # beyond those of all messages
                (out, (here, rank)),
                (into, (there, rank)),
            )
