"""The costs that XLA's scheduler reads, and the order that it then chooses."""

import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import compile_overlapped, gpu_compiler_options, gpu_mesh
from dualpipe_jax.gpu.overlap import overlap_report
from dualpipe_jax.gpu.overlap.compiling import scheduling_profile
from tests.kept import KeptLowered

pytestmark = pytest.mark.as_users


def lowered():
    """Two exchanges, and beside them many small products that take as long."""
    mesh = gpu_mesh("h100", {"ep": 16})

    def run(x, y, w):
        for _ in range(2):
            x = jnp.tanh(x)
            x = lax.all_to_all(x, "ep", split_axis=0, concat_axis=0, tiled=True)
        for _ in range(80):
            y = jnp.tanh(y @ w)
        return x, y

    def struct(spec, *shape):
        sharding = NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=sharding)

    mapped = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(P("ep"), P("ep"), P()),
        out_specs=P("ep"),
        check_vma=False,
    )
    x, y = struct(P("ep"), 16 * 4096, 1024), struct(P("ep"), 16 * 1024, 1024)
    lowered = jax.jit(mapped).lower(x, y, struct(P(), 1024, 1024))
    return KeptLowered(lowered, mesh)


@pytest.mark.slow
def test_the_scheduler_reads_what_everything_costs():
    program = lowered()
    plain = overlap_report(program.compile(gpu_compiler_options()), gpu="h100")
    text = scheduling_profile(plain)
    costs = dict(re.findall(r'costs \{ name: "(.*)" cost_us: (.*) \}\n', text))
    # Every line is a cost, and an exchange's is the report's.
    assert len(costs) == text.count("\n") > 80
    for exchange in plain.collectives:
        want = pytest.approx(1e6 * exchange.seconds, abs=1e-3)
        assert float(costs[exchange.name]) == want
    steered = overlap_report(compile_overlapped(program), gpu="h100")
    ((before,), (after,)) = plain.loops, steered.loops
    assert after.hidden_fraction > 0.97 > before.hidden_fraction


def test_a_program_for_cpus_is_refused():
    program = jax.jit(jnp.sin).lower(jnp.ones(3))
    with pytest.raises(ValueError, match="GPU"):
        compile_overlapped(program)
