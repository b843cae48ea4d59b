"""Reports on a small program that XLA compiled for H100s, without a GPU."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec as P

from dualpipe_jax import overlap_report
from dualpipe_jax.gpu import GPUS, gpu_compiler_options, gpu_mesh
from tests.kept import KeptLowered

pytestmark = pytest.mark.as_users

WIDTH, TRIPS = 2048, 5
MATRIX = 2 * WIDTH * WIDTH  # bytes


@pytest.fixture(scope="module")
def compiled():
    """Two ranks of a node each; collectives beside products, in loops and guards."""
    mesh = gpu_mesh("h100", {"pp": 2, "ep": 8})

    def local(x, y, w, flags):
        def body(_, carry):
            x, y = carry
            # The product of y can run under the all-to-all of x, and vice versa.
            sent = jax.lax.all_to_all(x.reshape(8, -1, WIDTH), "ep", 0, 0)
            y = jnp.tanh(jnp.tanh(y @ w) @ w)
            return sent.reshape(x.shape), y

        def once(carry):
            _, y = carry
            return jnp.zeros((), bool), jax.lax.psum(y, "ep")

        x, y = jax.lax.fori_loop(0, TRIPS, body, (x, y))
        _, y = jax.lax.while_loop(lambda carry: carry[0], once, (flags[0] > 0, y))
        return x, jax.lax.ppermute(y, "pp", [(0, 1), (1, 0)])

    def struct(spec, *shape, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))

    rows = P(("pp", "ep"))
    mapped = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(rows, rows, P(), P("pp")),
        out_specs=rows,
        check_vma=False,
    )
    arguments = (
        struct(rows, 16 * WIDTH, WIDTH),
        struct(rows, 16 * WIDTH, WIDTH),
        struct(P(), WIDTH, WIDTH),
        struct(P("pp"), 2, dtype=jnp.int32),
    )
    lowered = KeptLowered(jax.jit(mapped).lower(*arguments), mesh)
    return lowered.compile(gpu_compiler_options())


@pytest.mark.slow
def test_a_program_that_xla_compiled(compiled):
    report = overlap_report(compiled)
    assert report.gpu is GPUS["h100"]
    steady = report.steady_state
    assert (steady.kind, steady.runs) == ("while", TRIPS)
    (sent,) = steady.collectives
    assert (sent.kind, sent.group_size, sent.link) == ("all-to-all", 8, "nvlink")
    assert sent.num_bytes == MATRIX * 7 / 8
    # One run: both products, whether under the all-to-all or not.
    assert steady.compute.flops == 2 * 2 * WIDTH**3
    assert steady.compute.gemms == 2
    assert sent.hidden_s + sent.exposed_s == pytest.approx(sent.seconds)
    (reduced,) = (each for each in report.collectives if each.kind == "all-reduce")
    guard = report.loop(reduced.computation)
    assert (guard.kind, guard.runs, guard.runs_at_most) == ("guard", None, 1)
    assert reduced.num_bytes == 2 * MATRIX * 7 / 8
    (permute,) = (e for e in report.collectives if e.kind == "collective-permute")
    assert (permute.link, permute.num_bytes) == ("network", MATRIX)
    assert report.loop(permute.computation).runs == 1


@pytest.mark.slow
def test_the_all_to_all_runs_under_the_products(compiled):
    """DualPipe depends on it: XLA's scheduler finds this overlap by itself."""
    (sent,) = overlap_report(compiled).steady_state.collectives
    assert sent.asynchronous
    assert sent.under.gemms >= 1
    assert sent.hidden_s > 0.9 * sent.seconds


@pytest.mark.slow
def test_text_and_program_give_the_same_report(compiled):
    by_text = overlap_report(compiled.as_text(), gpu="h100")
    assert by_text.to_json() == overlap_report(compiled).to_json()


@pytest.mark.slow
def test_smaller_nodes_move_the_all_to_all_to_the_network(compiled):
    (sent,) = overlap_report(compiled, gpus_per_node=4).steady_state.collectives
    assert (sent.link, sent.between_bytes) == ("network", MATRIX * 4 / 8)


@pytest.mark.slow
def test_an_unscheduled_module_is_refused(compiled):
    text = compiled.as_text().replace("is_scheduled=true, ", "")
    with pytest.raises(ValueError, match="is not scheduled"):
        overlap_report(text, gpu="h100")
