"""Every field of every shipped config, with values that it may not have."""

import dataclasses
import functools
import json
import math
import re
from pathlib import Path

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import AbstractMesh

from dualpipe_jax.deepseek.serve import ServeConfig
from dualpipe_jax.train import load_as

FOLDER = Path(__file__).parents[2] / "configs"


def names_of_configs():
    for path in sorted(FOLDER.glob("[!_]*.py")):
        found = re.findall(
            r"^def (\w+)\(\) -> (?:Train|Serve)Config:", path.read_text(), re.M
        )
        yield from (f"{path.stem}:{name}" for name in found)


NAMES = list(names_of_configs())
load = functools.cache(functools.partial(load_as, object))


def paths_of(config, before=()):
    """Yields the path to each field of a config, and of the configs in it."""
    for field in dataclasses.fields(config):
        path, value = (*before, field.name), getattr(config, field.name)
        yield path
        if dataclasses.is_dataclass(value):
            yield from paths_of(value, path)


BAD = [None, True, False, "2", "", "a" * 1000, "fp8", "cpu", b"", -1, 0, 1, 3, 2.5, 1.5]
BAD += [math.nan, math.inf, -math.inf, 1e308, 5e-324, 2**31 - 1, 2**31, 2**70, 10**400]
BAD += [(), [], [1.0], (1.0,), (math.nan,), ("experts", "heads"), {}, {"pp": "2"}]
BAD += [{"pp": 1}, {"pp": 2**20}, {"pp": 1, "ep": 2**31 - 1}, {2: 2}, object(), int]
BAD += [np.float32(0.5), np.int64(2), np.array([1, 2]), np.float64(np.nan)]


def replaced(config, path, value):
    name, *rest = path
    if rest:
        value = replaced(getattr(config, name), rest, value)
    return dataclasses.replace(config, **{name: value})


def use(config):
    """Does what a job does with a config before it compiles and writes anything."""
    if isinstance(config, ServeConfig):
        config.parallel(config.tokens_per_device)
        assert math.prod(config.mesh_shape.values()) >= 1
        return
    json.loads(config.to_json(), parse_constant=pytest.fail)
    shape = config.mesh_shape
    model = config.model.build(
        config.make_schedule(),
        AbstractMesh(tuple(shape.values()), tuple(shape)),
        microbatch_size=config.microbatch_size,
        sequence_length=config.sequence_length,
    )
    assert model.vocab_size >= 1 and config.tokens_per_step >= 1


@pytest.mark.parametrize("name", NAMES)
def test_shipped_configs_can_be_used(name):
    use(load(name))


@hypothesis.given(
    st.sampled_from(NAMES),
    st.lists(st.tuples(st.randoms(), st.sampled_from(BAD)), min_size=1, max_size=3),
)
@hypothesis.settings(max_examples=400, deadline=None, database=None, derandomize=True)
def test_any_value_of_any_field_is_refused_in_one_line_or_legal(name, changes):
    config = load(name)
    try:
        for random, value in changes:
            config = replaced(config, random.choice(list(paths_of(config))), value)
        use(config)
    except ValueError as error:
        text = str(error)
        assert "\n" not in text and len(text) < 300, text
        # It begins with a field, or with what several of them make.
        names = r"self\.|[\w +*]+ ?= ?|layer_costs |speeds |costs |the model has no MoE"
        assert re.match(names, text), text
