"""The product of groups against a loop over groups, forward and backward."""

import contextlib
import importlib.machinery
import re
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from jax import lax

from dualpipe_jax import compat
from dualpipe_jax.gpu.topology import gpu_mesh
from eplb_jax.products import cross_compiling, load_tokamax, on_cuda
from eplb_jax.products.grouped import grouped_matmul, num_block_rows

SIZES = [
    [5, 0, 40, 3],
    [0, 0, 0, 0],
    [300, 0, 0, 0],
    [0, 128, 0, 129],
    [17, 16, 15, 1],
]
ROWS = 300


def normal(seed, *shape, dtype=jnp.float32):
    values = np.random.default_rng(seed).standard_normal(shape)
    return jnp.asarray(values, dtype)


def loop(x, weight, sizes):
    """In float64 and Python, padding left out."""
    y = np.zeros((len(x), weight.shape[2]))
    x, weight = np.asarray(x, np.float64), np.asarray(weight, np.float64)
    row = 0
    for group, size in enumerate(sizes):
        y[row : row + size] = x[row : row + size] @ weight[group]
        row += size
    return y


def gradients(x, weight, dy, sizes):
    transposed = np.swapaxes(np.asarray(weight, np.float64), 1, 2)
    dx = loop(dy, transposed, sizes)
    dw, row = [], 0
    for size in sizes:
        rows = slice(row, row + size)
        dw.append(np.asarray(x, np.float64)[rows].T @ np.asarray(dy, np.float64)[rows])
        row += size
    return dx, np.stack(dw)


@pytest.mark.parametrize("implementation", ["blocks", "xla"])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_a_loop(sizes, implementation):
    x, weight, dy = normal(0, ROWS, 8), normal(1, 4, 8, 6), normal(2, ROWS, 6)
    # Rows of no group must not matter, whatever they hold.
    padding = jnp.arange(ROWS)[:, None] >= sum(sizes)
    x = jnp.where(padding, jnp.nan, x)
    y, pullback = jax.vjp(
        lambda x, w: grouped_matmul(
            x, w, jnp.array(sizes), implementation=implementation
        ),
        x,
        weight,
    )
    dx, dw = pullback(jnp.where(padding, jnp.inf, dy))
    want = (loop(x, weight, sizes), *gradients(x, weight, dy, sizes))
    for ours, theirs in zip((y, dx, dw), want, strict=True):
        # float32 sums of at most 300 products against float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=3e-6 * np.abs(dw).max())


def test_bfloat16_is_added_in_float32():
    sizes = [100, 200, 0, 0]
    x, weight = (normal(0, ROWS, 512), normal(1, 4, 512, 4))
    x, weight = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
    dy = normal(2, ROWS, 4).astype(jnp.bfloat16)
    y, pullback = jax.vjp(
        lambda x, w: grouped_matmul(x, w, jnp.array(sizes)), x, weight
    )
    want = (loop(x, weight, sizes), *gradients(x, weight, dy, sizes))
    for ours, theirs in zip((y, *pullback(dy)), want, strict=True):
        assert ours.dtype == jnp.bfloat16
        # One rounding to 8 bits at the end; sums in bfloat16 would lose five of them.
        error = np.abs(np.asarray(ours, np.float64) - theirs)
        assert (error <= np.abs(theirs) * 2**-8 + 1e-4).all()


def test_fewer_rows_than_a_block():
    x, weight = normal(0, 3, 8), normal(1, 2, 8, 4)
    y = jax.jit(grouped_matmul)(x, weight, jnp.array([2, 1]))
    np.testing.assert_allclose(y, loop(x, weight, [2, 1]), rtol=0, atol=1e-5)


def test_under_vmap_and_scan():
    x, weight = normal(0, 2, 20, 8), normal(1, 2, 3, 8, 8)
    sizes = jnp.array([[3, 7, 10], [20, 0, 0]])
    mapped = jax.vmap(grouped_matmul)(x, weight, sizes)
    _, scanned = lax.scan(
        lambda _, a: (None, grouped_matmul(*a)), None, (x, weight, sizes)
    )
    for i in range(2):
        want = loop(x[i], weight[i], sizes[i].tolist())
        np.testing.assert_allclose(mapped[i], want, rtol=0, atol=1e-5)
        np.testing.assert_allclose(scanned[i], want, rtol=0, atol=1e-5)


class Interpreter:
    """Runs a function by its jaxpr, loop by loop, and counts FLOPs of its products."""

    def __init__(self, function, *args):
        self.flops = 0
        traced = jax.make_jaxpr(function)(*args)
        self.results = self.run(traced, jax.tree.leaves(args))

    def run(self, closed, args):
        jaxpr = closed.jaxpr
        values = dict(zip(jaxpr.constvars, closed.consts, strict=True))
        values |= dict(zip(jaxpr.invars, args, strict=True))

        def read(atoms):
            return [a.val if hasattr(a, "val") else values[a] for a in atoms]

        for eqn in jaxpr.eqns:
            results = self.step(eqn, read(eqn.invars))
            values |= dict(zip(eqn.outvars, results, strict=True))
        return read(jaxpr.outvars)

    def step(self, eqn, args):
        p = eqn.params
        if eqn.primitive.name == "while":
            first = p["cond_nconsts"] + p["body_nconsts"]
            carry, constants = args[first:], args[p["cond_nconsts"] : first]
            while self.run(p["cond_jaxpr"], [*args[: p["cond_nconsts"]], *carry])[0]:
                carry = self.run(p["body_jaxpr"], [*constants, *carry])
            return carry
        if eqn.primitive.name == "scan":
            num_consts, num_carry = compat.scan_sizes(eqn)
            constants, carry = args[:num_consts], args[num_consts:]
            assert len(carry) == num_carry  # a loop with a counter
            for _ in range(p["length"]):
                carry = self.run(p["jaxpr"], [*constants, *carry])
            return carry
        inner = p.get("call_jaxpr", p.get("jaxpr"))
        if inner is not None:
            return self.run(inner, args)
        result = eqn.primitive.bind(*args, **p)
        if eqn.primitive.name == "dot_general":
            (contracted,), _ = p["dimension_numbers"][0]
            self.flops += 2 * result.size * args[0].shape[contracted]
        return result if eqn.primitive.multiple_results else [result]


@pytest.mark.parametrize("num_groups, top_k", [(64, 1), (64, 8), (32, 1)])
def test_multiplies_little_more_than_it_must(num_groups, top_k):
    d, f, num_rows = 2, 3, 4096 * top_k
    sizes = np.random.default_rng(0).multinomial(
        num_rows, np.ones(num_groups) / num_groups
    )
    x, weight = normal(0, num_rows, d), normal(1, num_groups, d, f)
    done = Interpreter(grouped_matmul, x, weight, jnp.asarray(sizes))
    np.testing.assert_allclose(
        done.results[0], loop(x, weight, sizes), rtol=0, atol=1e-5
    )
    assert done.flops == 2 * d * f * int(num_block_rows(sizes))
    assert done.flops <= 1.3 * 2 * num_rows * d * f


def test_empty_rows_of_a_buffer_cost_nothing():
    assert num_block_rows(jnp.array([3, 0, 0, 1])) == 32
    program = jax.jit(grouped_matmul).lower(
        normal(0, 4096, 8), normal(1, 4, 8, 8), jnp.ones(4, int)
    )
    # The only products in the program are of blocks.
    rows = {128, 16}
    shapes = re.findall(r"dot_general.*->\s*tensor<(\d+)x8xf32>", program.as_text())
    assert {int(n) for n in shapes} == rows


class Option:
    """An option of tokamax's: a value, and a context in which it is another one."""

    value = False

    @contextlib.contextmanager
    def __call__(self, value):
        before, self.value = self.value, value
        yield
        self.value = before


class FakeTokamax(types.ModuleType):
    """Stands for an installed tokamax: one kernel, or an error in its place."""

    def __init__(self, error=None, kernel=lambda x, weight, group_sizes: x @ weight[0]):
        super().__init__("tokamax")
        self.__spec__ = importlib.machinery.ModuleSpec("tokamax", None)
        self.error, self.kernel, self.calls = error, kernel, []
        self.config = types.SimpleNamespace(cross_compile=Option())

    def ragged_dot(self, x, weight, group_sizes, *, implementation):
        self.calls.append((implementation, self.config.cross_compile.value))
        if self.error is not None:
            raise self.error
        return self.kernel(x, weight, group_sizes)


@pytest.fixture
def install(monkeypatch):
    """`install(...)` puts a `FakeTokamax` where Python finds tokamax."""
    was_parsed = flags.FLAGS.is_parsed()

    def install(*args, **options):
        tokamax = FakeTokamax(*args, **options)
        monkeypatch.setitem(sys.modules, "tokamax", tokamax)
        return tokamax

    yield install
    if not was_parsed:
        flags.FLAGS.unparse_flags()


def test_tokamax_is_chosen_when_compiled_for_gpus(install):
    tokamax = install()
    sharding = jax.sharding.NamedSharding(
        gpu_mesh("h100", {"ep": 1}), jax.sharding.PartitionSpec()
    )
    args = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
        for shape, dtype in (((32, 8), "f4"), ((2, 8, 8), "f4"), ((2,), "i4"))
    ]
    with cross_compiling():
        text = jax.jit(grouped_matmul).lower(*args).as_text()
    assert tokamax.calls == [("triton", True)] and "while" not in text
    text = (
        jax.jit(grouped_matmul)
        .lower(*(jnp.zeros(a.shape, a.dtype) for a in args))
        .as_text()
    )
    assert "while" in text


@jax.custom_vjp
def unset_where_empty(x, weight, group_sizes):
    """A right product that never writes the gradients of empty groups."""
    return lax.ragged_dot(x, weight, group_sizes)


def unset_backward(saved, dy):
    x, weight, group_sizes = saved
    dx, dw = jax.vjp(lambda x, w: lax.ragged_dot(x, w, group_sizes), x, weight)[1](dy)
    memory = jnp.where(jnp.arange(len(dw))[:, None, None] % 4 == 1, jnp.nan, 8.3)
    return dx, jnp.where((group_sizes == 0)[:, None, None], memory, dw), None


unset_where_empty.defvjp(lambda *args: (unset_where_empty(*args), args), unset_backward)


def test_gradients_of_empty_groups_are_zero_whatever_the_kernel_says(install):
    install(kernel=unset_where_empty)
    sizes = [8, 0, 8, 0]
    x, weight, dy = normal(0, 20, 8), normal(1, 4, 8, 6), normal(2, 20, 6)

    def product(x, weight, by):
        return grouped_matmul(x, weight, jnp.array(sizes), implementation=by)

    _, pullback = jax.vjp(lambda x, w: product(x, w, "tokamax"), x, weight)
    dx, dw = pullback(dy)
    assert not dw[1].any() and not dw[3].any()
    for ours, theirs in zip((dx, dw), gradients(x, weight, dy, sizes), strict=True):
        # float32 sums of at most 8 products against float64
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("implementation", ["auto", "blocks", "xla", "tokamax"])
@pytest.mark.parametrize(
    ("rows", "groups", "dim"), [(0, 4, 8), (5, 0, 8), (5, 4, 0), (0, 0, 8)]
)
def test_nothing_to_multiply(rows, groups, dim, implementation, install):
    install(NotImplementedError("it is not called"))
    x, weight = jnp.ones((rows, dim)), jnp.ones((groups, dim, 6))
    sizes = jnp.zeros(groups, jnp.int32)
    y, pullback = jax.vjp(
        lambda x, w: grouped_matmul(x, w, sizes, implementation=implementation),
        x,
        weight,
    )
    assert y.shape == (rows, 6)
    for array, like in zip((y, *pullback(y)), (y, x, weight), strict=True):
        assert array.shape == like.shape and not array.any()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_a_kernel_that_is_missing_is_replaced(backend, install, monkeypatch):
    install(ValueError("Unsupported device kind"))
    # A process that says it has GPUs.
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    # Different shapes for each: jax caches what it has traced.
    x, sizes = {"cpu": (normal(0, 3, 8), [2, 1]), "gpu": (normal(0, 5, 8), [1, 4])}[
        backend
    ]
    weight = normal(1, 2, 8, 4)
    expected = pytest.warns(UserWarning, match="slower code takes.*Unsupported device")
    with expected if backend == "gpu" else contextlib.nullcontext():
        y = jax.jit(grouped_matmul)(x, weight, jnp.array(sizes))
    np.testing.assert_allclose(y, loop(x, weight, sizes), rtol=0, atol=1e-5)


@pytest.mark.parametrize("keep", [False, True])
@pytest.mark.parametrize("is_there", [False, True])
def test_a_choice_of_kernels_has_the_gradient_of_what_is_chosen(
    keep, is_there, install
):
    install()

    def kernel(x, n):
        if not is_there:
            raise NotImplementedError("not for this shape")
        return jnp.sin(x) * n.astype(x.dtype)

    def otherwise(x, n):
        return jnp.cos(x) * n.astype(x.dtype)

    x, n = normal(0, 3, 4), jnp.arange(4.0)[None].astype(jnp.int32)

    def loss(x):
        y = on_cuda(kernel, otherwise, x, n, keep=keep)
        return (y * y).sum()

    # This process has CPUs only, so `otherwise` runs.
    got, grad = jax.jit(jax.value_and_grad(loss))(x)
    want, expected = jax.value_and_grad(lambda x: (otherwise(x, n) ** 2).sum())(x)
    np.testing.assert_allclose(got, want, rtol=1e-6)  # float32
    np.testing.assert_allclose(grad, expected, rtol=1e-6, atol=1e-6)


def test_bad_arguments(monkeypatch):
    monkeypatch.setitem(sys.modules, "tokamax", None)  # not installed
    x, weight, sizes = jnp.ones((4, 2)), jnp.ones((3, 2, 5)), jnp.array([1, 1, 1])
    for args, options, message in [
        ((x, weight, sizes), {"implementation": "best"}, "must be one of auto, blocks"),
        ((x, weight, sizes), {"implementation": "tokamax"}, "pip install tokamax"),
        ((x[:, :1], weight, sizes), {}, r"x of shape \(4, 1\) and weight of shape"),
        ((x, weight[0], sizes), {}, r"must be \[rows, d\] and \[groups, d, f\]"),
        ((x, weight, sizes[:2]), {}, r"group_sizes has shape \(2,\), but weight has 3"),
        ((x, weight.astype(jnp.bfloat16), sizes), {}, "one floating dtype"),
        ((x.astype(int), weight.astype(int), sizes), {}, "one floating dtype"),
    ]:
        with pytest.raises(ValueError, match=message):
            grouped_matmul(*args, **options)


def test_tokamax_does_not_read_our_command_line(install, monkeypatch):
    """Its settings are absl's, which would reject `--gpu` and end the process."""
    monkeypatch.setattr(sys, "argv", ["python", "--gpu", "h800"])
    tokamax = install()
    flags.FLAGS.unparse_flags()
    assert load_tokamax() is tokamax
    assert flags.FLAGS.is_parsed()
