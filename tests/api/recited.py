"""An engine without a model: it recites the alphabet, and takes its time.

It has the methods of `Engine` that the API uses, and its checks of requests.
"""

import collections
import itertools
import threading
import time

import numpy as np

from dualpipe_jax.deepseek.serve import Engine, Token
from tests.deepseek.serve import small_server


class RecitingEngine:
    """After a prompt, its last letter and those that follow, over and over.

    Attributes:
      gate: while it is not set, `step` waits.
      fault: what `step` raises, if anything.
      submitted: arguments of `submit`.
    """

    check = Engine.check

    def __init__(self, num_slots=4, step_seconds=0.002):
        self.config = small_server.config(
            num_devices=num_slots // 2,
            num_redundant=0,
            max_prompt_length=100,
            max_prefill_tokens=100,
        )
        self.gate, self.fault, self.submitted = threading.Event(), None, []
        self.gate.set()
        self._numbers = itertools.count()
        self._running, self._waiting = {}, collections.deque()
        self._step_seconds = step_seconds

    def submit(self, prompt, *, max_tokens, num_logprobs, stop_tokens, **options):
        number = next(self._numbers)
        request = [prompt, max_tokens, num_logprobs, frozenset(stop_tokens), 0]
        self.submitted.append({"prompt": prompt, "max_tokens": max_tokens} | options)
        self._waiting.append((number, request))
        return number

    def cancel(self, number):
        self._running.pop(number, None)
        kept = [each for each in self._waiting if each[0] != number]
        self._waiting = collections.deque(kept)

    def step(self):
        self.gate.wait()
        if self.fault is not None:
            raise self.fault
        time.sleep(self._step_seconds)
        while self._waiting and len(self._running) < self.config.num_request_slots:
            number, request = self._waiting.popleft()
            self._running[number] = request
        tokens = []
        for number, request in list(self._running.items()):
            prompt, max_tokens, num_logprobs, stop_tokens, count = request
            token = (int(prompt[-1]) - 1 + count) % 26 + 1
            request[-1] = count + 1
            is_last = count + 1 >= max_tokens or token in stop_tokens
            own = Token(number, token, is_last)
            if num_logprobs is not None:
                top = tuple((token + i, -0.5 - i) for i in range(num_logprobs))
                own = own._replace(logprob=-0.5, top_logprobs=top)
            tokens.append(own)
            if is_last:
                del self._running[number]
        return tokens

    @property
    def num_left(self):
        return len(self._running) + len(self._waiting)

    def metrics(self):
        return {
            "num_running": float(len(self._running)),
            "num_waiting": float(len(self._waiting)),
        }

    def layer_metrics(self):
        return {"balancedness": np.array([0.5, 1.0]), "device_loads": np.ones((2, 2))}
