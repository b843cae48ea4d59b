"""The test session's JAX: 8 virtual CPU devices, strict promotion, strict ranks.

Programs of tests run for milliseconds, so most of the time would go into optimizing
their machine code: that is left out, but in tests marked `as_users`. What compiles is
kept among the user's caches, for all checkouts and for the processes that tests start;
JAX_COMPILATION_CACHE_DIR names another folder, or none if it is empty.

It stands at the repository's root, and not in tests/, so that the doctests of
the packages run under it too. Nothing here is a fixture: XLA reads its flags
once, when jax first asks for devices, and a module's fixtures compile before those
of a test are made.
"""

import gc
import itertools
import os

NUM_DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
_flag = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import jax  # noqa: E402
import pytest  # noqa: E402

from dualpipe_jax.train.compilation_cache import prepare_folder  # noqa: E402

if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    _folder = prepare_folder("tests", say=print)
    # jax takes an empty name for none; the variable is for processes of tests.
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(_folder or "")
    jax.config.update("jax_compilation_cache_dir", str(_folder or ""))
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_sessionstart(session):
    if jax.device_count() != NUM_DEVICES:
        raise RuntimeError(
            f"The tests need {NUM_DEVICES} virtual CPU devices, but jax has "
            f"{jax.device_count()} ({jax.devices()[0].platform}): something asked "
            "jax for devices before conftest.py, or XLA_FLAGS names another "
            f"device count ({os.environ['XLA_FLAGS']!r})."
        )
    # Tracing makes objects by the million and hardly any garbage: a fifth of its time
    # would go into looking for some.
    gc.freeze()
    gc.set_threshold(50_000, 20, 50)


@pytest.hookimpl(trylast=True)  # of the tests that are selected
def pytest_collection_modifyitems(items):
    """Slow tests first, on every worker: the last to finish then has a quick one.

    pytest-xdist gives each worker as many tests, in this order, and moves some when a
    worker has run all of its own. Tests `as_users` come before all others: nothing that
    jax traced survives a change between them.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
    if workers == 1:
        return
    first, others = [], []
    for item in items:
        is_slow = item.get_closest_marker("slow") is not None
        (first if is_slow or not _compiles_quickly(item) else others).append(item)
    first.sort(key=_compiles_quickly)
    # Whole modules, whose tests share what they compile.
    modules = [list(each) for _, each in itertools.groupby(first, lambda x: x.path)]
    ordered = []
    for worker in range(workers):
        own = list(itertools.chain(*modules[worker::workers]))
        end = len(items) * (worker + 1) // workers
        number = max(0, end - len(ordered) - len(own))
        ordered += own + others[:number]
        others = others[number:]
    items[:] = ordered + others


def _compiles_quickly(item):
    return item.get_closest_marker("as_users") is None


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    quickly = _compiles_quickly(item)
    name = "jax_disable_most_optimizations"
    if jax.config.values[name] != quickly:
        jax.config.update(name, quickly)
        jax.clear_caches()  # or a test would depend on what ran before it
        gc.unfreeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    if nextitem is not None and nextitem.path != item.path:
        # Tests that collect garbage look no further back than their module.
        gc.collect()
        gc.freeze()
