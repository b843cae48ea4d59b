"""Request slots: which request gets one, for which piece, and when it is free."""

import numpy as np
import pytest

from dualpipe_jax.deepseek.serve.requests import Request
from dualpipe_jax.deepseek.serve.scheduler import Scheduler
from tests.deepseek.serve import small_server


@pytest.fixture
def scheduler():
    """Of two devices with two request slots each, and six tokens to a prefill."""
    config = small_server.config(
        num_devices=2,
        num_redundant=0,
        max_prompt_length=40,
        max_prefill_tokens=6,
        prompts_per_device=4,
    )
    return Scheduler(config)


def add(scheduler, number, length, max_tokens=2):
    prompt = np.zeros(length, np.int32)
    request = Request(number, prompt, max_tokens, 0.0, 0, 1.0, None, frozenset())
    scheduler.add(request)
    return request


def spans(admitted):
    """What a prefill computes of each request, by number."""
    return {
        request.number: span
        for own in admitted
        for request, span in zip(own.requests, own.spans, strict=True)
    }


def test_a_slot_is_free_when_its_last_token_is_started(scheduler):
    request = add(scheduler, 0, length=3, max_tokens=2)
    assert spans(scheduler.admit()) == {0: (0, 3)}
    slot = request.request_slot
    assert scheduler.running() == [(slot, request)] and not scheduler.is_idle[slot]
    scheduler.start_token(request)
    scheduler.start_token(request)
    assert scheduler.running() == [] and scheduler.is_idle.all()
    # The host has not read its tokens: the request is still there.
    assert 0 in scheduler and not request.is_ended
    scheduler.cancel(0)
    assert request.is_ended and len(scheduler) == 0


def test_pieces_of_a_long_prompt(scheduler):
    long = add(scheduler, 0, length=15)
    short = add(scheduler, 1, length=4)
    assert spans(scheduler.admit()) == {0: (0, 6), 1: (0, 4)}
    # It has a slot, but does not decode; the other one does.
    assert [each for _, each in scheduler.running()] == [short]
    assert scheduler.is_idle[long.request_slot] and scheduler.num_running == 2
    assert spans(scheduler.admit()) == {0: (6, 12)}
    # No other request gets its slot; beside the last piece there is room for one.
    for number in (2, 3, 4):
        add(scheduler, number, length=3)
    assert spans(scheduler.admit()) == {0: (12, 15), 2: (0, 3), 3: (0, 3)}
    assert long in [each for _, each in scheduler.running()]
    assert scheduler.num_running == 4 and scheduler.num_waiting == 1
    assert scheduler.admit() == []


def test_a_long_prompt_that_is_cancelled_halfway(scheduler):
    add(scheduler, 0, length=30)
    scheduler.admit()
    scheduler.cancel(0)
    assert scheduler.admit() == [] and scheduler.num_running == 0
    add(scheduler, 1, length=30)
    assert spans(scheduler.admit()) == {1: (0, 6)}
