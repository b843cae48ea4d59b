"""Counts by formula against arrays, traced programs and the published model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dualpipe_jax.backward.flop_count import flops
from dualpipe_jax.configs import deepseek_v3
from dualpipe_jax.deepseek import DeepSeek, DeepSeekConfig
from dualpipe_jax.deepseek.model.config import layer_parameters
from dualpipe_jax.deepseek.model.layers import Layer, MultiTokenPrediction
from eplb_jax import ExpertParallel, MoE
from tests.deepseek.model.sizes import SMALL, small

DEEPSEEK_V3 = deepseek_v3.architecture()


def drawn(seed):
    """Sizes with no regard for what is sensible."""
    rng = np.random.default_rng(seed)
    names = [
        *("vocab_size", "hidden_size", "num_hidden_layers", "intermediate_size"),
        *("num_attention_heads", "kv_lora_rank", "qk_nope_head_dim", "v_head_dim"),
        *("n_routed_experts", "moe_intermediate_size", "q_lora_rank"),
    ]
    sizes = {name: int(rng.integers(1, 9)) for name in names}
    return DeepSeekConfig(
        **sizes | {"q_lora_rank": None} if seed % 3 == 0 else sizes,
        qk_rope_head_dim=2 * int(rng.integers(1, 4)),
        first_k_dense_replace=int(rng.integers(sizes["num_hidden_layers"] + 1)),
        n_shared_experts=int(rng.integers(3)),
        num_experts_per_tok=int(rng.integers(sizes["n_routed_experts"])) + 1,
        tie_word_embeddings=bool(seed & 1),
        num_nextn_predict_layers=seed >> 1 & 1,
    )


def size(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("seed", range(8))
def test_parameters_are_counted_as_they_are_made(seed):
    config = drawn(seed)
    model = DeepSeek(architecture=config).build_unpipelined()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    counts = config.count_parameters()
    assert size(shapes) == counts.total + counts.mtp
    assert size(shapes.head.get("mtp")) == counts.mtp
    assert (counts.mtp > 0) == (config.num_nextn_predict_layers == 1)
    experts = [size(each["moe"]["experts"]) for each in shapes.stages if "moe" in each]
    idle = config.n_routed_experts - config.num_experts_per_tok
    left_out = sum(experts) * idle // config.n_routed_experts
    assert counts.total - counts.active == left_out


def test_random_sizes_cover_the_choices():
    configs = [drawn(seed) for seed in range(8)]
    assert {(c.tie_word_embeddings, c.num_nextn_predict_layers) for c in configs} == {
        (a, b) for a in (0, 1) for b in (0, 1)
    }
    assert {c.q_lora_rank is None for c in configs} == {True, False}
    assert {c.n_shared_experts for c in configs} >= {0, 1}
    assert any(0 < c.first_k_dense_replace < c.num_hidden_layers for c in configs)


def test_deepseek_v3s_parameters():
    """The total of the published main model, which counts the routers' biases too."""
    counts = DEEPSEEK_V3.count_parameters()
    biases = DEEPSEEK_V3.num_moe_layers * DEEPSEEK_V3.n_routed_experts
    assert biases == 58 * 256
    assert counts.total == 671_026_404_352
    assert counts.total + biases == 671_026_419_200
    # "37B activated for each token"; 0.93B of these are the embedding.
    assert round(counts.active / 1e9, 1) == 37.6


def test_deepseek_v3s_arrays_are_as_many_as_its_formula_says():
    # One dense layer and one with experts.
    two = dataclasses.replace(DEEPSEEK_V3, num_hidden_layers=2, first_k_dense_replace=1)
    model = DeepSeek(architecture=two).build_unpipelined()
    shapes = jax.eval_shape(lambda: model.init(jax.random.key(0)))
    counts = layer_parameters(DEEPSEEK_V3)
    for layer, feed_forward in enumerate((counts.dense, counts.moe)):
        want = counts.attention + counts.norms + feed_forward
        assert size(shapes.stages[layer]) == want


BATCH, LENGTH = 2, 6
TOKENS = BATCH * LENGTH


def products(config, call, make):
    """FLOPs of all matrix products of a call on BATCH sequences, a token."""
    module = nnx.eval_shape(make)
    for _, layer in nnx.iter_graph(module):
        if isinstance(layer, MoE):
            # Not in blocks, whose number is known only when they run.
            layer.implementation = "xla"
    graph, state = nnx.split(module)
    x = jax.ShapeDtypeStruct((BATCH, LENGTH, config.hidden_size), jnp.float32)
    total = flops(lambda state, x: call(nnx.merge(graph, state), x), state, x)
    return total / TOKENS


def inner_norms(config):
    """Their parameters are in no product, but count as such in the estimate."""
    return (config.q_lora_rank or 0) + config.kv_lora_rank


def upper_triangle(config):
    """The products of queries with later keys: computed here, and then masked."""
    return (
        config.num_attention_heads
        * (config.qk_head_dim + config.v_head_dim)
        * LENGTH
        / 2
    )


@pytest.mark.parametrize("is_dense", [True, False])
@pytest.mark.parametrize("q_lora_rank", [None, 10])
def test_a_layers_flops_are_those_of_its_products(is_dense, q_lora_rank):
    config = small(q_lora_rank=q_lora_rank, n_shared_experts=2)
    key = jax.random.key(0)

    def make():
        has = {"has_dense": is_dense, "has_moe": not is_dense}
        return Layer(config, ExpertParallel(), **has, key=key)

    def call(layer, x):
        x = layer.attend(x)
        return layer.feed_forward(x) if is_dense else layer.mix(x, None)

    got = products(config, call, make)
    layer = 0 if is_dense else config.first_k_dense_replace
    estimate = config.forward_flops(layer, LENGTH)
    # Exact, except for what the estimate's docstring says it leaves out.
    assert got == estimate + 2 * (upper_triangle(config) - inner_norms(config))


def test_head_flops_are_those_of_its_products():
    config = small()
    x = jax.ShapeDtypeStruct((TOKENS, config.hidden_size), jnp.float32)
    kernel = jax.ShapeDtypeStruct((config.hidden_size, config.vocab_size), jnp.float32)
    head = flops(jnp.matmul, x, kernel) / TOKENS
    assert config.head_flops(LENGTH) == head
    config = small(num_nextn_predict_layers=1)
    got = products(
        config,
        lambda module, x: module(x, x, None),
        lambda: MultiTokenPrediction(config, ExpertParallel(), jax.random.key(0)),
    )
    estimate = config.head_flops(LENGTH) - 2 * head
    assert got == estimate + 2 * (upper_triangle(config) - inner_norms(config))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"hidden_size": 0}, "hidden_size=0 must be at least 1"),
        ({"hidden_size": 2.5}, "hidden_size=2.5 must be an integer"),
        ({"rms_norm_eps": float("nan")}, "rms_norm_eps=nan must be a finite number"),
        ({"first_k_dense_replace": -1}, "first_k_dense_replace=-1 must be at least 0"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1 must be at least 0"),
        ({"q_lora_rank": 0}, "q_lora_rank=0 must be at least 1"),
        (
            {"first_k_dense_replace": 4},
            "first_k_dense_replace=4 must be at most .*num_hidden_layers=3",
        ),
        ({"qk_rope_head_dim": 3}, "qk_rope_head_dim=3 must be even"),
        (
            {"num_experts_per_tok": 5},
            "num_experts_per_tok=5 must be at most .*n_routed_experts=4",
        ),
        (
            {"num_nextn_predict_layers": 2},
            "num_nextn_predict_layers=2 must be 0 or 1",
        ),
        (
            {"num_nextn_predict_layers": -1},
            "num_nextn_predict_layers=-1 must be at least 0",
        ),
        ({"n_group": 3}, "n_group=3 must divide .*n_routed_experts=4"),
        (
            {"n_group": 2, "topk_group": 3},
            "topk_group=3 must be at most .*n_group=2",
        ),
        (
            {"scoring_func": "softmax"},
            "'noaux_tc' does not go with .*'softmax'; use 'greedy' or 'group_limited",
        ),
        ({"topk_method": "greedy"}, "'greedy' does not go with .*; use 'noaux_tc'"),
        (
            {"scoring_func": "softmax", "topk_method": "greedy", "n_group": 2},
            "n_group=2 has no meaning with topk_method='greedy'",
        ),
        ({"rope_scaling": {"type": "yarn"}}, "must be a RopeScaling or None"),
        (
            {"hidden_size": 2**31 - 1, "vocab_size": 2**30},
            r"hidden_size=2,147,483,647 makes 4.6e\+18 parameters, more than 1.1e\+15",
        ),
        ({"num_hidden_layers": 5000}, "num_hidden_layers=5000 must be at most 4096"),
    ],
)
def test_sizes_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        small(**changes)


COUNTS = ("Count", "Size", "NumLayers", "NumExperts")
MAY_BE_ZERO = ["first_k_dense_replace", "n_shared_experts", "num_nextn_predict_layers"]


@pytest.mark.parametrize("name", MAY_BE_ZERO)
def test_zero_is_a_size_where_it_makes_sense(name):
    assert getattr(small(**{name: 0}), name) == 0


def test_no_other_size_may_be_zero():
    fields = [f.name for f in dataclasses.fields(SMALL) if f.type in COUNTS]
    assert len(fields) == 17
    for name in set(fields) - set(MAY_BE_ZERO):
        with pytest.raises(ValueError, match=f"{name}=0 must be at least 1"):
            small(**{name: 0})


@pytest.mark.parametrize(
    "changes, message",
    [
        (
            {"remat": ("attention", "mlp")},
            r"remat=\(.*\): 'mlp' must be 'attention' or 'experts'",
        ),
        ({"payload": "fp8"}, r"which do not divide \d+ features; use payload='plain'"),
        ({"rank_speeds": [1.0, 2.0]}, r"rank_speeds=\[1.0, 2.0\] must be a tuple or N"),
        ({"compute_dtype": "float16"}, "compute_dtype='float16' must be 'float32' or"),
        ({"buffer_factor": -1.0}, "buffer_factor=-1.0 must be above 0"),
        ({"head_cost": 1.0}, "layer_costs and head_cost share a unit; set both"),
        ({"layer_costs": (1.0,) * 3}, "layer_costs and head_cost share a unit"),
        (
            {"layer_costs": (1.0,) * 9, "head_cost": 1.0},
            "layer_costs has 9 entries, but the model has num_hidden_layers=",
        ),
    ],
)
def test_models_that_do_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        DeepSeek(architecture=SMALL, **changes)
