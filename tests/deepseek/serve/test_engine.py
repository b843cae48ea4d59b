"""The server's tokens, whatever else it serves and wherever its experts are."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dualpipe_jax.deepseek.serve import Engine, make_serve_programs
from tests.deepseek.serve import small_server

# Programs of eight devices, that run for hundreds of steps.
pytestmark = [pytest.mark.slow, pytest.mark.as_users]


@pytest.fixture(scope="module")
def config():
    return small_server.config()


@pytest.fixture(scope="module")
def programs(config):
    return small_server.engine(config).programs


@pytest.fixture
def make_engine(config, programs):
    def make(params=None, placement=None, **changes):
        changed = dataclasses.replace(config, **changes)
        params = small_server.params(changed)[0] if params is None else params
        engine = Engine(changed, params, placement=placement)
        # The changes affect the host only, so the compiled programs are the same.
        engine.programs = programs
        return engine

    return make


def test_tokens_are_those_of_the_model_that_was_trained(config, make_engine):
    """More requests than request slots; split prompts; experts that move."""
    engine = make_engine()
    prompts = small_server.prompts(40, config)
    lengths = np.random.default_rng(1).integers(1, 9, len(prompts))
    numbers = [
        engine.submit(prompt, max_tokens=int(n))
        for prompt, n in zip(prompts, lengths, strict=True)
    ]
    written = {number: [] for number in numbers}
    ended = []
    for token in engine.run():
        written[token.request].append(token.token)
        ended += [token.request] * token.is_last
    assert sorted(ended) == numbers
    complete = small_server.reference(config, small_server.params(config)[1])
    for number, prompt, n in zip(numbers, prompts, lengths, strict=True):
        assert written[number] == complete(prompt, n).tolist()
    metrics = engine.metrics()
    assert metrics["num_moves"] > 0 and metrics["num_refused"] == 0
    assert metrics["num_tokens"] == lengths.sum() and metrics["num_overflowed"] == 0


def test_two_hundred_steps_with_experts_on_the_move_and_without(
    config, programs, make_engine
):
    prompts = small_server.prompts(16, config, seed=2)
    moving, still = make_engine(), make_engine(rebalance=None)
    got = moving.generate(prompts, max_tokens=201)
    expected = still.generate(prompts, max_tokens=201)
    np.testing.assert_array_equal(got, expected)
    assert moving.num_decode_steps == still.num_decode_steps == 200
    assert moving.metrics()["num_moves"] > 20 and still.metrics()["num_moves"] == 0
    for each in (programs.prefill, programs.decode, programs.rebalance):
        assert each._cache_size() == 1


def test_prefills_are_observed_and_followed_by_plans(config, make_engine):
    """A server that only prefills moves experts, too."""
    prompts = small_server.prompts(60, config, seed=11)
    moving, still = make_engine(), make_engine(rebalance=None)
    got = moving.generate(prompts, max_tokens=1)
    np.testing.assert_array_equal(got, still.generate(prompts, max_tokens=1))
    metrics = moving.metrics()
    assert metrics["num_decode_steps"] == 0 and metrics["num_prefills"] > 2
    assert metrics["num_moves"] > 0 and still.metrics()["num_moves"] == 0
    # What was observed: each token of a prompt chose its experts once.
    loads = still.state.balancer.loads.total
    assert int(still.state.balancer.step) == still.num_prefills and loads.any()


def test_exact_balance_of_prefills(config, programs, make_engine):
    """Large microbatches are balanced exactly; decode steps, of two tokens, are not."""
    changes = {"balance": "exact", "num_fetched": 3, "exact_from": 2}
    changes["spread_shared"] = True
    engine = make_engine(**changes)
    exact = make_serve_programs(engine.config, programs.mesh)
    assert exact.lower("decode").as_text() == programs.lower("decode").as_text()
    engine.programs = dataclasses.replace(programs, prefill=exact.prefill)
    prompts = small_server.prompts(40, config, seed=12)
    expected = make_engine().generate(prompts, max_tokens=2)
    np.testing.assert_array_equal(engine.generate(prompts, max_tokens=2), expected)
    metrics = engine.metrics()
    most = 3 * 8 * 2 * 2 * metrics["num_prefills"]  # devices, layers, microbatches
    assert 0 <= metrics["num_fetched"] <= most and metrics["num_overflowed"] == 0


def test_a_device_that_is_left_changes_nothing(config, make_engine):
    prompts = small_server.prompts(16, config, seed=3)
    expected = make_engine(rebalance=None).generate(prompts, max_tokens=20)
    # No plan is made before the device's speed is set.
    never = dataclasses.replace(config.rebalance, every=1000)
    engine = make_engine(rebalance=never)
    written = {engine.submit(prompt, max_tokens=20): [] for prompt in prompts}
    for step in range(100):
        if step == 6:
            engine.set_capacity([1, 1, 1, 0, 1, 1, 1, 1])
            assert engine.metrics()["num_stranded"] == 0
        for token in engine.step():
            written[token.request].append(token.token)
    np.testing.assert_array_equal(list(written.values()), expected)
    tables = engine.state.balancer.tables
    tables.validate()
    placement = np.asarray(tables.physical_to_logical_map).reshape(2, 8, 3)
    assert (placement[:, 3] == -1).all()
    assert (np.delete(placement, 3, axis=1) >= 0).any()
    assert (np.asarray(tables.expert_count) >= 1).all()
    assert engine.metrics()["num_stranded"] == 0


def test_another_placement(config, make_engine):
    prompts = small_server.prompts(4, config, seed=4)
    expected = make_engine(rebalance=None).generate(prompts, max_tokens=5)
    engine = make_engine(rebalance=None)
    rng = np.random.default_rng(0)
    placement = [rng.permutation(np.arange(24) % 16) for _ in range(2)]
    engine.place(placement)
    np.testing.assert_array_equal(
        engine.state.balancer.tables.physical_to_logical_map, placement
    )
    np.testing.assert_array_equal(engine.generate(prompts, max_tokens=5), expected)
    # The same from the start.
    params, _ = small_server.params(config)
    experts = [
        jax.tree.map(lambda leaf, own=own: leaf[own], each)
        for own, each in zip(placement, params.experts, strict=True)
    ]
    placed = params._replace(experts=experts)
    engine = make_engine(placed, placement, rebalance=None)
    np.testing.assert_array_equal(engine.generate(prompts, max_tokens=5), expected)


def test_what_is_drawn_depends_on_the_request_alone(config, make_engine):
    engine = make_engine()
    prompt = small_server.prompts(1, config, seed=5)[0]
    alone = engine.generate([prompt], max_tokens=8, temperature=1.0, seed=7)[0]
    crowd = small_server.prompts(20, config, seed=6)
    for each in crowd:
        engine.submit(each, max_tokens=11, temperature=0.5)
    again, other, greedy = (
        engine.submit(prompt, max_tokens=8, temperature=t, seed=seed)
        for t, seed in ((1.0, 7), (1.0, 8), (0.0, 7))
    )
    written = {number: [] for number in (again, other, greedy)}
    for token in engine.run():
        if token.request in written:
            written[token.request].append(token.token)
    assert written[again] == alone.tolist()
    assert written[other] != written[again] != written[greedy]
    complete = small_server.reference(config, small_server.params(config)[1])
    assert written[greedy] == complete(prompt, 8).tolist()


def test_a_stop_token_and_a_request_that_is_cancelled(config, make_engine):
    engine = make_engine()
    prompts = small_server.prompts(20, config, seed=7)
    expected = make_engine().generate(prompts, max_tokens=9)
    stop = int(expected[0][4])
    stopping = engine.submit(prompts[0], max_tokens=9, stop_tokens=[stop, -1])
    rest = [engine.submit(each, max_tokens=9) for each in prompts[1:]]
    waiting, running = rest[-1], rest[0]
    engine.cancel(waiting)
    written = {number: [] for number in (stopping, *rest)}
    for step in range(60):
        for token in engine.step():
            written[token.request].append(token.token)
        if step == 2:
            engine.cancel(running)
    at = expected[0].tolist().index(stop)
    assert written[stopping] == expected[0][: at + 1].tolist()
    assert written[waiting] == [] and len(written[running]) < 9
    for number, tokens in zip(rest[1:-1], expected[2:-1], strict=True):
        assert written[number] == tokens.tolist()
    assert engine.step() == []


def test_what_is_refused_leaves_the_others_alone(config, make_engine):
    engine = make_engine()
    prompt = small_server.prompts(1, config, seed=8)[0]
    expected = engine.generate([prompt], max_tokens=6)[0]
    request = engine.submit(prompt, max_tokens=6)
    written = [token.token for token in engine.step()]
    for arguments, message in (
        ({"prompt": []}, "must be one token or more"),
        ({"prompt": [[1, 2]]}, "integers in one axis"),
        ({"prompt": [1.5]}, "integers in one axis"),
        ({"prompt": [1, 32]}, "from 1 to 32, but the model's are from 0 to 31"),
        ({"prompt": [1] * 11}, "11 tokens, but max_prompt_length=10"),
        ({"prompt": [1] * 9, "max_tokens": 216}, "do not fit context_length=224"),
        ({"prompt": [1], "max_tokens": 0}, "max_tokens=0 must be an integer"),
        ({"prompt": [1], "max_tokens": 2.5}, "max_tokens=2.5 must be an integer"),
        ({"prompt": [1], "temperature": -1.0}, "temperature=-1.0 must be"),
        ({"prompt": [1], "temperature": np.nan}, "temperature=nan must be"),
        ({"prompt": [1], "seed": -1}, "seed=-1 must be an integer from 0"),
        ({"prompt": [1], "seed": 0.5}, "seed=0.5 must be an integer from 0"),
        ({"prompt": [1], "top_p": 0}, "top_p=0 must be a number above 0"),
        ({"prompt": [1], "top_p": np.inf}, "top_p=inf must be a number above 0"),
        ({"prompt": [1], "num_logprobs": 21}, "=21 must be an integer from 0 to 20"),
    ):
        with pytest.raises(ValueError, match=message):
            engine.submit(**{"max_tokens": 2} | arguments)
    with pytest.raises(ValueError, match="must be one token"):
        engine.generate([prompt, []], max_tokens=2)
    with pytest.raises(ValueError, match="request=999 is unknown"):
        engine.cancel(999)
    params, _ = small_server.params(config)
    for change in (engine.place, functools.partial(make_engine, params)):
        with pytest.raises(ValueError, match="pass a placement of this model"):
            change(np.zeros((5, 24), np.int32))
        with pytest.raises(ValueError, match="Expert 1 of layer 0 has no replica"):
            change(np.zeros((2, 24), np.int32))
    with pytest.raises(ValueError, match="capacity"):
        engine.set_capacity([1, 1, 1, 0, 0, 0, 0, 0])
    with pytest.raises(ValueError, match="counts"):
        engine.config.balancer.observe(engine.state.balancer, np.zeros((2, 3)))
    written += [token.token for token in engine.run()]
    assert written == expected.tolist()
    with pytest.raises(ValueError, match=f"request={request} is unknown"):
        engine.cancel(request)


def test_weights_of_another_model(config):
    params, _ = small_server.params(config)
    other = small_server.config(num_redundant=0, num_devices=4)
    with pytest.raises(ValueError, match=r"experts.* is float32, \(24, 16, 16\), but"):
        Engine(other, params)
    sizes = dataclasses.replace(config.architecture, num_hidden_layers=2)
    with pytest.raises(ValueError, match="another structure"):
        Engine(small_server.config(architecture=sizes), params)


def test_no_token_is_lost_when_somebody_stops_listening(config, make_engine):
    prompts = small_server.prompts(6, config, seed=9)
    expected = make_engine().generate(prompts, max_tokens=4)
    engine = make_engine()
    numbers = [engine.submit(prompt, max_tokens=4) for prompt in prompts[1:]]
    written = {number: [] for number in numbers}
    for token in engine.run():
        written[token.request].append(token.token)
        if len(written[numbers[2]]) == 2:
            break
    (alone,) = engine.generate(prompts[:1], max_tokens=4)
    np.testing.assert_array_equal(alone, expected[0])
    cancelled = numbers.pop()
    engine.cancel(cancelled)
    for token in engine.run():
        written[token.request].append(token.token)
    for number, tokens in zip(numbers, expected[1:], strict=False):
        assert written[number] == tokens.tolist()
    assert len(written[cancelled]) < 4
    with pytest.raises(ValueError, match=f"request={cancelled} is unknown"):
        engine.cancel(cancelled)


def test_weights_stay_the_callers(config):
    params, _ = small_server.params(config)
    engine = Engine(config, params)
    kept = engine.programs.abstract_params.experts[0].gate.sharding
    params = params._replace(
        experts=[
            type(each)(*(jax.device_put(leaf, kept) for leaf in each))
            for each in params.experts
        ]
    )
    engine = Engine(config, params)
    engine.place([np.random.default_rng(0).permutation(24) % 16 for _ in range(2)])
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_long_prompts_in_pieces_on_devices_that_do_not_divide_the_experts():
    """Only physical experts are divided: 18, of 16 experts, on 3 devices and on 1.

    Four tokens fit a prefill, so that prompts have up to ten pieces.
    """
    changes = {
        "architecture": dataclasses.replace(small_server.SIZES, num_hidden_layers=2),
        "context_length": 64,
        "max_prompt_length": 40,
        "max_prefill_tokens": 4,
        "num_redundant": 2,
        "prompts_per_device": 2,
    }
    config = small_server.config(num_devices=3, **changes)
    rng = np.random.default_rng(10)
    prompts = [rng.integers(0, 32, n) for n in (3, 40, 4, 5, 17, 1, 32, 8, 2, 25)]
    complete = small_server.reference(config, small_server.params(config)[1])
    expected = [complete(prompt, 20).tolist() for prompt in prompts]
    for devices in (3, 1):
        engine = small_server.engine(
            small_server.config(num_devices=devices, **changes)
        )
        ran = with_log(engine)
        first = engine.submit(prompts[0], max_tokens=20)
        written = {first: [token.token for token in engine.step()]}
        for prompt in prompts[1:]:
            written[engine.submit(prompt, max_tokens=20)] = []
        ended = None
        for token in engine.run():
            written[token.request].append(token.token)
            if token.request == first and token.is_last:
                ended = len(ran)
        assert list(written.values()) == expected
        # While the first request got its tokens, others' prompts were computed, and
        # no two pieces without a decode step in between.
        meanwhile = "".join(ran[:ended])
        assert meanwhile.count("P") > 5 and "PP" not in meanwhile
        assert engine.metrics()["num_running"] == 0


def with_log(engine):
    """Returns a list that gets P for each prefill of an engine, and D for a decode."""
    programs, ran = engine.programs, []

    def logged(name, letter):
        def run(*args):
            ran.append(letter)
            return getattr(programs, name)(*args)

        return run

    engine.programs = dataclasses.replace(
        programs, prefill=logged("prefill", "P"), decode=logged("decode", "D")
    )
    return ran


def test_the_next_step_is_started_before_tokens_are_read(config, make_engine):
    engine = make_engine()
    ran = with_log(engine)
    prompt = small_server.prompts(1, config, seed=14)[0]
    engine.submit(prompt, max_tokens=4)
    seen = []
    while tokens := engine.step():
        seen.append((len(tokens), "".join(ran)))
    # One ahead; and nothing after the last token, which is known beforehand.
    assert seen == [(1, "PD"), (1, "PDD"), (1, "PDDD"), (1, "PDDD")]
    # A stop token is not: one step too many runs, whose token is left out.
    (whole,) = engine.generate([prompt], max_tokens=4)
    del ran[:]
    stop = int(whole[0])
    (stopped,) = engine.generate([prompt], max_tokens=4, stop_tokens=[stop])
    assert stopped.tolist() == [stop] and "".join(ran) == "PD"
    assert engine.step() == []


def test_log_probabilities_of_tokens_among_requests_without(config, make_engine):
    engine = make_engine()
    prompts = small_server.prompts(4, config, seed=12)
    with_them = engine.submit(prompts[0], max_tokens=5, num_logprobs=3)
    none = engine.submit(prompts[1], max_tokens=5, num_logprobs=0)
    without = engine.submit(prompts[2], max_tokens=5)
    tokens = list(engine.run())
    for token in tokens:
        if token.request == without:
            assert token.logprob is None and token.top_logprobs == ()
        else:
            assert token.logprob <= 0
        if token.request == none:
            assert token.top_logprobs == ()
        if token.request == with_them:  # greedy: the most likely token is the first
            assert token.top_logprobs[0] == (token.token, token.logprob)
            values = [logprob for _, logprob in token.top_logprobs]
            assert values == sorted(values, reverse=True) and len(values) == 3


def test_what_is_measured_of_layers(config, make_engine):
    engine = make_engine()
    engine.generate(small_server.prompts(16, config, seed=13), max_tokens=4)
    measured, layers = engine.metrics(), engine.layer_metrics()
    assert layers["device_loads"].shape == (2, 8)
    loads = layers["device_loads"]
    np.testing.assert_allclose(loads.mean(axis=1), 1, rtol=1e-5)
    # Balancedness is the mean load over the largest.
    np.testing.assert_allclose(layers["balancedness"], 1 / loads.max(axis=1), rtol=1e-5)
    assert layers["balancedness"].min() == pytest.approx(measured["balancedness_worst"])
