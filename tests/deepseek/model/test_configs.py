"""The configs fit their meshes and have the published sizes; none is compiled here."""

import math

import jax
import pytest
from jax.sharding import AbstractMesh

from dualpipe_jax.configs import deepseek_v3, moe_16b, profiles, small, tiny

TRAINING = [
    tiny.config,
    tiny.fp8,
    small.config,
    moe_16b.config,
    deepseek_v3.config,
    deepseek_v3.two_pods,
    deepseek_v3.fp8,
    profiles.training,
    profiles.exact_training,
    profiles.fp8_training,
]


def build(config):
    """The model over its stages, on devices that need not be there."""
    shape = config.mesh_shape
    return config.model.build(
        config.make_schedule(),
        AbstractMesh(tuple(shape.values()), tuple(shape)),
        microbatch_size=config.microbatch_size,
        sequence_length=config.sequence_length,
    )


@pytest.mark.parametrize("make", TRAINING, ids=lambda make: make().name)
def test_stages_hold_every_layer_and_room_for_no_more_than_it_takes(make):
    config = make()
    model = build(config)
    params = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    padding = 0
    for position, tree in enumerate(params.stages):
        for name in tree:
            kinds = {"dense": [1], "moe": [2]}.get(name, [1, 2])
            unused = sum(
                kind not in kinds for kind in model.layout.kind_GP[:, position]
            )
            one = sum(math.prod(leaf.shape[1:]) for leaf in jax.tree.leaves(tree[name]))
            padding += unused * one
    counted = config.model.architecture.count_parameters()
    total = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
    assert total - padding == counted.total + counted.mtp


def test_deepseek_v3_has_its_published_size():
    counted = deepseek_v3.architecture().count_parameters()
    assert round(counted.total / 1e9) == 671
    assert counted.active // 10**9 == 37
    assert deepseek_v3.config().num_devices == 1024
    assert deepseek_v3.two_pods().num_devices == 2048


def test_the_16b_class():
    # DeepSeek-V2-Lite: 15.7B in all (its paper, appendix B).
    assert round(moe_16b.architecture().count_parameters().total / 1e8) == 157


def test_the_settings_of_the_published_profiles():
    training = profiles.training()
    assert training.mesh["ep"] == 64 and training.sequence_length == 4096
    layout = build(training).layout
    assert {len(own) for own in layout.layers} == {4}
    # No position differs between stages: nothing in the steady state is in a branch.
    assert all(layout.kinds(position) == {2} for position in range(4))
    prefill, decode = profiles.prefill(), profiles.decode()
    assert (prefill.num_devices, prefill.tokens_per_device) == (32, 16 * 1024)
    assert (decode.num_devices, decode.tokens_per_device) == (128, 128)
    assert decode.context_length == 4096
    assert profiles.fp8_decode().products == "fp8"
