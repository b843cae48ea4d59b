"""Profiles of our own programs, recorded and read."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax import (
    PipelineParams,
    dualpipe,
    pipeline_value_and_grad,
    profile,
    read_trace,
)
from dualpipe_jax.profiles.names import read_names
from dualpipe_jax.profiles.reading import find_trace


def stage(params, x):
    with jax.named_scope("attn"):
        x = x + jnp.tanh(x @ params["attn"])
    with jax.named_scope("mlp"):
        return x + jnp.tanh(x @ params["mlp"])


@pytest.mark.slow
def test_a_pipeline_has_phases(tmp_path):
    mesh = jax.make_mesh((2,), ("pp",), axis_types=(jax.sharding.AxisType.Auto,))
    step = pipeline_value_and_grad(
        stage,
        lambda head, y, target: jnp.mean((y - target) ** 2),
        schedule=dualpipe(2, 6),
        mesh=mesh,
    )
    rng = np.random.default_rng(0)
    weights = {name: rng.normal(size=(2, 64, 64)) for name in ("attn", "mlp")}
    params = PipelineParams(jax.tree.map(jnp.float32, weights))
    x = jnp.float32(rng.normal(size=(6, 8, 64)))
    compiled = jax.jit(step).lower(params, x, x).compile()
    jax.block_until_ready(compiled(params, x, x))
    with profile(tmp_path, compiled):
        jax.block_until_ready(compiled(params, x, x))
    report = read_trace(tmp_path)
    assert set(report.phases) == {
        f"{part}({step})" for part in ("attn", "mlp") for step in "FBW"
    }
    assert [device.name for device in report.devices] == ["CPU 0", "CPU 1"]
    permutes = [span for span in report.spans if span.name.startswith("ppermute")]
    assert permutes and all(span.is_comm for span in permutes)
    costs = report.costs(chunks=6)
    assert min(costs.F, costs.I, costs.W) > 0


def test_the_newest_profile_is_read(tmp_path):
    step = jax.jit(lambda x: x * 2).lower(jnp.ones(8)).compile()
    for date in ("2026_01_02_03_04_05", "2026_01_02_03_04_06"):
        with profile(tmp_path, step):
            step(jnp.ones(8)).block_until_ready()
        newest = max(tmp_path.rglob("*.trace.json.gz"), key=lambda f: f.stat().st_mtime)
        if newest.parent.name != date:
            newest.parent.rename(newest.parent.with_name(date))
    assert find_trace(tmp_path).parent.name == date


def test_only_informative_names_are_written(tmp_path):
    def f(x):
        with jax.named_scope("mlp"):
            y = x @ x
        return jnp.sin(y) + 1

    step = jax.jit(f).lower(jnp.ones((64, 64))).compile()
    with profile(tmp_path, step):
        step(jnp.ones((64, 64))).block_until_ready()
    (ops,) = read_names(tmp_path / "trace.json").values()
    assert ops and all("mlp" in op.op_name for op in ops.values())


def test_a_profile_inside_another_leaves_the_outer_one_intact(tmp_path):
    def f(x):
        with jax.named_scope("mlp"):
            return x @ x

    step = jax.jit(f).lower(jnp.ones((64, 64))).compile()
    with profile(tmp_path, step):
        with (
            pytest.raises(ValueError, match=r"the profiler cannot start .*end"),
            profile(tmp_path),
        ):
            pass
        step(jnp.ones((64, 64))).block_until_ready()
    assert list(read_trace(tmp_path).phases) == ["mlp(F)"]


def test_two_programs_of_one_name(tmp_path):
    one, other = (
        jax.jit(lambda x, k=k: x * k).lower(jnp.ones(4)).compile() for k in (2, 3)
    )
    with (
        pytest.raises(ValueError, match="two of the compiled programs are called"),
        profile(tmp_path, one, other),
    ):
        pass


def test_a_function_that_is_not_compiled_is_refused(tmp_path):
    with (
        pytest.raises(ValueError, match=r"must be a compiled program; pass jit\(f\)"),
        profile(tmp_path / "none", jax.jit(jnp.sin)),
    ):
        pass
    assert not (tmp_path / "none").exists()
