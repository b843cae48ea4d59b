"""Fixtures of runs that compile nothing."""

import gc

import pytest

from dualpipe_jax.train import loop
from tests.train import cheap
from tests.train.cheap_runs import run


@pytest.fixture
def collect_garbage():
    """What a test leaves is found in that test, and not in whichever comes later."""
    yield
    gc.collect()


@pytest.fixture(scope="module")
def cheap_programs():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_programs", cheap.CheapPrograms)
        yield


@pytest.fixture(scope="module")
def finished(tmp_path_factory, cheap_programs):
    """One run from start to end: its folder, result and what it printed."""
    folder = tmp_path_factory.mktemp("run") / "cheap"
    return folder, *run(folder)


@pytest.fixture
def after_step(monkeypatch):
    """Calls a function of the step when it is done, before anything is recorded."""

    def patch(function):
        class Patched(cheap.CheapPrograms):
            def train_step(self, state, *batch):
                state, metrics = super().train_step(state, *batch)
                function(int(state.step))
                return state, metrics

        monkeypatch.setattr(loop, "make_programs", Patched)

    return patch
