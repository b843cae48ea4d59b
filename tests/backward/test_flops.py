"""Compares FLOP counts with hand counts, and with XLA's where XLA counts them."""

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.experimental import pallas as pl
from jax.sharding import AxisType, PartitionSpec as P

from dualpipe_jax.backward.flop_count import flops, jaxpr_flops

X = jax.ShapeDtypeStruct((8, 16), jnp.float32)
W = jax.ShapeDtypeStruct((16, 16), jnp.float32)
ONE = 2 * 8 * 16 * 16  # X @ W


def layer(x, w):
    return jnp.tanh(x @ w)


def custom(x, w):
    product = jax.custom_vjp(lambda x, w: x @ w)
    product.defvjp(lambda x, w: (x @ w, None), lambda _, ct: (ct, ct))
    return product(x, w)


def scan(x, w, length=5):
    return lax.scan(lambda x, _: (layer(x, w), None), x, None, length=length)[0]


def nested(x, w):
    return lax.scan(lambda x, _: (scan(x, w), None), x, None, length=3)[0]


def branches(x, w):
    return lax.switch(0, [lambda x: x, lambda x: x @ w @ w, lambda x: x @ w], x)


def loop(x, w):
    return lax.while_loop(lambda x: x.sum() > 0, lambda x: x @ w, x)


def sharded(x, w):
    mesh = jax.make_mesh((4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)
    specs = {"in_specs": (P("a"), P()), "out_specs": P("a")}
    return jax.shard_map(layer, mesh=mesh, axis_names={"a"}, **specs)(x, w)


def kernel(x, w):
    def body(x_ref, w_ref, out_ref):
        out_ref[...] = x_ref[...] @ w_ref[...]

    rows, whole = pl.BlockSpec((4, 16), lambda i: (i, 0)), pl.BlockSpec((16, 16))
    call = pl.pallas_call(
        body,
        out_shape=X,
        grid=(2,),
        in_specs=[rows, whole],
        out_specs=rows,
        interpret=True,
    )
    return call(x, w)


def estimated_kernel(x, w):
    call = pl.pallas_call(
        lambda x_ref, w_ref, out_ref: None,
        out_shape=X,
        cost_estimate=pl.CostEstimate(flops=ONE, transcendentals=0, bytes_accessed=0),
        interpret=True,
    )
    return call(x, w)


@pytest.mark.parametrize(
    ("fn", "count"),
    [
        (layer, 1),
        (jax.jit(layer), 1),
        (jax.checkpoint(layer), 1),
        (custom, 1),
        (scan, 5),
        (nested, 15),
        (lambda x, w: scan(x, w, length=0), 0),
        (branches, 2),
        (loop, 1),
        (sharded, 1),
        (kernel, 1),
        (estimated_kernel, 1),
        (lambda x, w: jax.vmap(layer, (0, None))(x[:, None], w), 1),
        (lambda x, w: jax.vjp(layer, x, w)[1](x), 3),  # with the forward product
        (lambda x, w: jax.vjp(jax.checkpoint(layer), x, w)[1](x), 4),
        (lambda x, w: jnp.sort(x) + w.sum(), 0),
    ],
)
def test_products_are_multiplied_out(fn, count):
    assert flops(fn, X, W) == count * ONE


def test_the_trips_of_a_while_loop_are_the_callers():
    assert flops(loop, X, W, while_trips=7) == 7 * ONE


def test_keyword_arguments_are_traced_too():
    assert flops(lambda x, *, w: x @ w, X, w=W) == ONE


@pytest.mark.parametrize(
    ("spec", "shapes", "count"),
    [
        ("ij,jk->ik", [(2, 3), (3, 5)], 2 * 2 * 3 * 5),
        ("bij,bjk->bik", [(7, 2, 3), (7, 3, 5)], 2 * 7 * 2 * 3 * 5),
        ("abc,dbc->ad", [(2, 3, 5), (7, 3, 5)], 2 * 2 * 7 * 15),
        ("i,j->ij", [(2,), (3,)], 2 * 2 * 3),
        ("ij,j->i", [(0, 3), (3,)], 0),
        ("ij,jk->ik", [(2, 0), (0, 5)], 0),
    ],
)
def test_einsum(spec, shapes, count):
    args = [jax.ShapeDtypeStruct(s, jnp.float32) for s in shapes]
    assert flops(lambda *xs: jnp.einsum(spec, *xs), *args) == count


def test_ragged_products_count_each_row_once():
    groups = jnp.array([3, 0, 4, 1])
    experts = jax.ShapeDtypeStruct((4, 16, 32), jnp.float32)
    want = 2 * 8 * 16 * 32

    def fn(x, w):
        return lax.ragged_dot(x, w, groups)

    def both(x, w):
        y, pullback = jax.vjp(fn, x, w)
        return pullback(y)

    assert flops(fn, X, experts) == want
    assert flops(both, X, experts) == 3 * want


def test_convolutions():
    image = jax.ShapeDtypeStruct((2, 9, 9, 4), jnp.float32)
    window = jax.ShapeDtypeStruct((3, 3, 2, 6), jnp.float32)

    def fn(x, k):
        numbers = ("NHWC", "HWIO", "NHWC")
        return lax.conv_general_dilated(
            x, k, (1, 1), "VALID", dimension_numbers=numbers, feature_group_count=2
        )

    # Without padding, XLA counts the same taps.
    compiled = jax.jit(fn).lower(image, window).compile()
    assert flops(fn, image, window) == 2 * (2 * 7 * 7 * 6) * (3 * 3 * 2)
    assert flops(fn, image, window) == compiled.cost_analysis()["flops"]


def test_a_jaxpr_may_be_closed_or_open():
    closed = jax.make_jaxpr(layer)(X, W)
    assert jaxpr_flops(closed) == jaxpr_flops(closed.jaxpr) == ONE
