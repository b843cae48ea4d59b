"""Bad input is refused, and the message says what to do."""

import jax
import jax.numpy as jnp
import pytest

from dualpipe_jax import overlap_report
from dualpipe_jax.gpu import GPUS
from tests.gpu.overlap.modules import GPU, module

TEXT = module("")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {},
            r"gpu=None: the device kind None is not a known GPU; pass gpu= one",
        ),
        ({"gpu": "h1000"}, r"gpu='h1000' is unknown; choose from h100, .*gpu\.Gpu"),
        ({"gpu": GPU, "efficiency": 0}, r"efficiency=0 must be above 0 and at most 1"),
        ({"gpu": GPU, "efficiency": 1.5}, r"efficiency=1.5 must be above 0"),
        ({"gpu": GPU, "gpus_per_node": 0}, r"gpus_per_node=0 must be at least 1"),
        (
            {"gpu": GPU, "trip_counts": {"a": -1}},
            r"trip_counts=\{'a': -1\} must not be negative",
        ),
        ({"gpu": GPU, "trip_counts": -1}, r"trip_counts=-1 must not be negative"),
    ],
)
def test_options(options, message):
    with pytest.raises(ValueError, match=message):
        overlap_report(TEXT, **options)


def test_input_that_is_neither_compiled_nor_text():
    lowered = jax.jit(jnp.sin).lower(1.0)
    with pytest.raises(ValueError, match=r"compiled=Lowered is neither .*compile\(\)"):
        overlap_report(lowered)
    with pytest.raises(ValueError, match=r"not an HLO module .*as_text"):
        overlap_report(lowered.as_text(), gpu="h100")


def test_a_program_for_cpus():
    compiled = jax.jit(jnp.sin).lower(1.0).compile()
    with pytest.raises(ValueError, match=r"compiled for 'cpu', .*gpu_mesh"):
        overlap_report(compiled)


def test_a_truncated_module():
    with pytest.raises(ValueError, match="contains no ENTRY computation; pass all of"):
        overlap_report(TEXT.partition("ENTRY")[0], gpu="h100")
    missing = module("  %r = bf16[2] fusion(%x), kind=kLoop, calls=%gone")
    with pytest.raises(ValueError, match=r"computation 'gone'.* pass all of"):
        overlap_report(missing, gpu="h100")


@pytest.mark.parametrize("key", GPUS)
def test_every_gpu_has_a_report(key):
    assert overlap_report(TEXT, gpu=key).gpu is GPUS[key]
