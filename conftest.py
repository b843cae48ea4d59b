"""The test session's JAX: 8 virtual CPU devices, strict promotion, strict ranks.

It stands at the repository's root, and not in tests/, so that the doctests of
the packages run under it too. Nothing here is a fixture: XLA reads its flags
once, when jax first asks for devices.
"""

import os

NUM_DEVICES = 8

os.environ["JAX_PLATFORMS"] = "cpu"
_flag = f"--xla_force_host_platform_device_count={NUM_DEVICES}"
if _flag not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_flag}".strip()
os.environ.setdefault("MPLBACKEND", "Agg")

import jax  # noqa: E402

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
