"""The pipelined step of the whole model against one device and `jax.grad`.

With other mesh axes, and with what a config may add.
"""

import dataclasses

import jax
import numpy as np
import pytest

from dualpipe_jax.train import make_programs
from tests.deepseek.model import small
from tests.executor.order import without_order

pytestmark = pytest.mark.slow  # each compiles a whole train step


def build(config):
    """The model that `make_programs` makes for itself."""
    programs = make_programs(config)
    model = config.model.build(
        programs.schedule,
        programs.mesh,
        microbatch_size=config.microbatch_size,
        sequence_length=config.sequence_length,
    )
    return model, programs


def pipelined_steps(config, num_steps):
    """Metrics of the pipelined steps, and the last state."""
    model, programs = build(config)
    state, pipelined = small.initial_state(config, model, programs), []
    tokens = programs.abstract_tokens
    # Compiled once: a placement that changes is other values, and no other program.
    step = programs.train_step.lower(state, tokens, tokens).compile()
    assert without_order(step.as_text()) == []
    for number in range(num_steps):
        batch = jax.device_put(small.batch(config, number), tokens.sharding)
        state, metrics = step(state, *batch)
        pipelined.append(
            {k: np.asarray(value).tolist() for k, value in metrics.items()}
        )
    return pipelined, state


def assert_equal_steps(pipelined, expected, rtol):
    # Of other numbers of devices.
    others = {"balancedness", "balancedness_layers"}
    names = expected[0].keys() & pipelined[0].keys() - others
    assert {"loss", "grad_norm", "balance_loss", "overflow"} <= names
    for name in sorted(names):
        got, wanted = (
            [record[name] for record in each] for each in (pipelined, expected)
        )
        np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-6, err_msg=name)


# ZB1P and 1F1B run below, GPipe in test_resume.py, each combined with something else;
# benchmarks/train.py runs all five with the main job's config. With three layers on two
# stages, one position has either kind of layer, and one has a layer or padding: stages
# run their own code here. test_resume.py runs branches, test_padding.py those of
# padding.
def test_training_is_that_of_one_device():
    config = small.config(
        model={"stage_code": "own"},
        mesh={"pp": 2, "dp": 2, "ep": 2},
        shard_at_rest=True,
        architecture={"num_nextn_predict_layers": 1},
    )
    pipelined, state = pipelined_steps(config, 4)
    expected = small.unpipelined_steps(config, 4)
    # f32 in another order of sums, through three steps of Adam.
    assert_equal_steps(pipelined, expected, rtol=1e-4)
    assert {"mtp_loss", "z_loss"} <= pipelined[0].keys()
    assert pipelined[3]["loss"] < pipelined[0]["loss"] - 0.05  # so steps matter
    even = build(config)[0].init_buffers().placement
    assert (np.asarray(state.buffers.placement) != np.asarray(even)).any()


def test_one_rank_tied_and_computed_again():
    config = small.config(
        schedule="1f1b",
        mesh={"pp": 1, "ep": 2},
        architecture={
            "num_hidden_layers": 2,
            "num_nextn_predict_layers": 1,
            "tie_word_embeddings": True,
            "q_lora_rank": None,
        },
        model={"eplb": None, "remat": ("attention", "experts")},
    )
    pipelined, _ = pipelined_steps(config, 3)
    expected = small.unpipelined_steps(config, 3)
    assert_equal_steps(pipelined, expected, rtol=1e-4)  # as above
    assert {"mtp_loss", "z_loss"} <= pipelined[0].keys()


def test_exact_balance_changes_where_rows_are_computed():
    config = small.config(
        mesh={"pp": 2, "ep": 4},
        model={"eplb": None, "balance": "exact", "num_fetched": 3},
    )
    pipelined, _ = pipelined_steps(config, 4)
    assert_equal_steps(pipelined, small.unpipelined_steps(config, 4), rtol=1e-4)
    for record in pipelined:
        assert record["balancedness_exact"] == 1 > record["balancedness_before"]
        assert 0 < record["fetched_experts"] <= 3 and record["overflow"] == 0
        arch = config.model.architecture
        size = 4 * 3 * arch.hidden_size * arch.moe_intermediate_size / 2**20
        fetched = size * record["fetched_experts"]
        np.testing.assert_allclose(record["fetched_mib"], fetched, rtol=1e-6)
        tokens = config.microbatch_size * config.sequence_length / 4
        choices = tokens * arch.num_experts_per_tok
        assert 0 < record["dispatched_mib"] * 2**20 / (4 * arch.hidden_size) < choices


def test_bfloat16_computes_with_float32_masters():
    config = small.config(schedule="zb1p", architecture={"num_hidden_layers": 2})
    rounded = dataclasses.replace(config.model, compute_dtype="bfloat16")
    rounded = dataclasses.replace(config, model=rounded)
    with jax.numpy_dtype_promotion("standard"):  # flax's norms take float32 means
        pipelined, state = pipelined_steps(rounded, 4)
    expected = small.unpipelined_steps(config, 4)
    losses = [[record["loss"] for record in each] for each in (pipelined, expected)]
    # Eight bits of mantissa in each of some ten products on the way to the loss.
    np.testing.assert_allclose(*losses, rtol=1e-2)
    assert losses[0] != losses[1]
    for tree in (state.params, state.opt_state[1][0].mu, state.opt_state[1][0].nu):
        assert {leaf.dtype for leaf in jax.tree.leaves(tree)} == {np.dtype("float32")}
