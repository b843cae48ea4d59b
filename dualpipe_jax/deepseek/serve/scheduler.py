"""Which request runs when, and in which request slot.

The host keeps the queue and hands out request slots; it never reads arrays of the
device for this.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from dualpipe_jax.deepseek.serve.arrays import Prompts, Sampling
from dualpipe_jax.deepseek.serve.config import HALVES, ServeConfig
from dualpipe_jax.deepseek.serve.prompts import Halves, Span, as_arrays, halve_prompts
from dualpipe_jax.deepseek.serve.requests import Request, RequestSlot


class Admitted(NamedTuple):
    """The prompts that a prefill computes on one device, or pieces of them.

    Attributes:
      requests: each has a request slot.
      spans: which tokens of each prompt.
      halves: of these.
    """

    requests: list[Request]
    spans: list[Span]
    halves: Halves


class Scheduler:
    """Queues requests, and gives them request slots in the order they came.

    Attributes:
      is_idle: [halves, requests] bool, the request slots without a request that
        decodes.
    """

    def __init__(self, config: ServeConfig):
        self._config = config
        self._per_half = config.requests_per_device // HALVES
        self.is_idle = np.ones((HALVES, self._per_half * config.num_devices), bool)
        self._requests: dict[int, Request] = {}
        self._running: dict[RequestSlot, Request] = {}
        self._waiting: collections.deque[Request] = collections.deque()

    def __contains__(self, number: int) -> bool:
        return number in self._requests

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def num_waiting(self) -> int:
        """Requests without a request slot."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Requests with a request slot."""
        return len(self._running)

    def running(self) -> list[tuple[RequestSlot, Request]]:
        """Returns the requests that the next decode step computes."""
        return [each for each in self._running.items() if each[1].is_prefilled]

    def add(self, request: Request) -> None:
        """Queues a request."""
        self._requests[request.number] = request
        self._waiting.append(request)

    def cancel(self, number: int) -> None:
        """Removes a request, which may wait or run."""
        request = self._requests[number]
        if request in self._waiting:
            self._waiting.remove(request)
        self.end(request)

    def start_token(self, request: Request) -> None:
        """Counts a token that a step computes; after the last, the slot is free.

        The device runs steps in order, so another request may have the slot in the next
        one.
        """
        request.num_started += 1
        if request.num_started >= request.max_tokens:
            self._free(request)

    def end(self, request: Request) -> None:
        """Removes a request, and frees its request slot if it has one."""
        del self._requests[request.number]
        request.is_ended = True
        self._free(request)

    def _free(self, request: Request) -> None:
        if request.request_slot is not None:
            self.is_idle[request.request_slot] = True
            self._running.pop(request.request_slot)
            request.request_slot = None

    def admit(self) -> list[Admitted]:
        """Returns what the next prefill computes, for each device; empty if nothing.

        Prompts of which a piece is computed come first, then waiting ones in the order
        they came.
        """
        free = self._free_slots()
        admitted = [
            self._continued(device) for device in range(self._config.num_devices)
        ]
        while self._waiting:
            request = self._waiting[0]
            # The device with the most free request slots first. A device may lack
            # tokens or rows for a prompt that fits on another.
            for device in sorted(range(len(free)), key=lambda d: -len(free[d])):
                more = self._joined(admitted[device], request) if free[device] else None
                if more is not None:
                    request.request_slot = slot = free[device].pop(0)
                    self._running[slot] = request
                    admitted[device] = more
                    break
            else:
                break
            self._waiting.popleft()
        for each in admitted:
            for request, (_, stop) in zip(each.requests, each.spans, strict=True):
                request.num_prefilled = stop
                self.is_idle[request.request_slot] = not request.is_prefilled
        return admitted if any(each.requests for each in admitted) else []

    def _continued(self, device: int) -> Admitted:
        """Returns the next piece of the device's long prompt, if it has one."""
        num_rows = self._config.prompts_per_device // HALVES
        admitted = Admitted([], [], Halves([None] * num_rows, [None] * num_rows))
        for slot in self._slots_of(device):
            request = self._running.get(slot)
            if request is not None and not request.is_prefilled:
                admitted = self._joined(admitted, request) or admitted
        return admitted

    def _joined(self, admitted: Admitted, request: Request) -> Admitted | None:
        """Returns what a device computes with one more prompt, if there is room.

        A prompt that is too long for a prefill gets a whole one, until its last piece.
        """
        c = self._config
        start, stop = request.num_prefilled, len(request.prompt)
        spans = [*admitted.spans, (start, min(stop, start + c.max_prefill_tokens))]
        halves = halve_prompts(
            spans, c.max_prefill_tokens // HALVES, c.prompts_per_device // HALVES
        )
        if halves is None:
            return None
        return Admitted([*admitted.requests, request], spans, halves)

    def _free_slots(self) -> list[list[RequestSlot]]:
        """Returns the free request slots of each device, taken from both in turn."""
        return [
            [slot for slot in self._slots_of(device) if slot not in self._running]
            for device in range(self._config.num_devices)
        ]

    def _slots_of(self, device: int) -> Iterator[RequestSlot]:
        for i in range(self._per_half):
            for half in range(HALVES):
                yield RequestSlot(half, device * self._per_half + i)


def prefill_arrays(
    config: ServeConfig, admitted: Sequence[Admitted], half: int
) -> tuple[Prompts, list[Request | None]]:
    """Returns one microbatch of a prefill, of all devices.

    Args:
      config: of the server.
      admitted: for each device.
      half: which microbatch.

    Returns:
      prompts: NumPy arrays over all devices.
      ending: for each row the request whose first token it computes, or None.
    """
    per_half = config.requests_per_device // HALVES
    of_row: list[Request | None] = []
    parts = []
    for own, _, halves in admitted:
        prompts = [request.prompt for request in own]
        part = as_arrays(halves[half], prompts, config.max_prefill_tokens // HALVES)
        of_row += [None if number < 0 else own[number] for number in part.prompts]
        parts.append(part)

    def joined(name: str) -> np.ndarray:
        return np.concatenate([getattr(part, name) for part in parts])

    def slot_on_device(request: Request | None) -> int:
        if request is None or request.request_slot is None:
            return -1
        slot = request.request_slot
        return slot.half * per_half + slot.column % per_half

    def of_rows(empty: Any, dtype: Any, get: Callable[[Request], Any]) -> np.ndarray:
        return np.array([get(each) if each else empty for each in of_row], dtype)

    last = joined("last")
    prompts = Prompts(
        tokens=joined("tokens"),
        positions=joined("positions"),
        rows=joined("rows"),
        request_slots=np.array([slot_on_device(each) for each in of_row], np.int32),
        last=last,
        sampling=Sampling(
            temperature=of_rows(0.0, np.float32, lambda r: r.temperature),
            seed=of_rows(0, np.int32, lambda r: r.seed),
            top_p=of_rows(1.0, np.float32, lambda r: r.top_p),
            has_logprobs=of_rows(False, bool, lambda r: r.num_logprobs is not None),
        ),
    )
    ending = [r if at >= 0 else None for r, at in zip(of_row, last, strict=True)]
    return prompts, ending
