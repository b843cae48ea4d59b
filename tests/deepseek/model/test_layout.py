"""Layers over stages, for every way to cut them."""

import itertools
import json

import jax
import numpy as np
import pytest

from dualpipe_jax.deepseek.model.layout import DENSE, MOE, NONE, Layout, relayout


def layout_of(sizes, num_dense):
    starts = np.cumsum((0, *sizes))
    layers = tuple(
        tuple(range(int(start), int(start) + size))
        for start, size in zip(starts, sizes, strict=False)
    )
    return Layout(layers, num_dense)


def cuts(num_layers):
    """The sizes of the stages, for all contiguous partitions."""
    for marks in itertools.product((False, True), repeat=num_layers - 1):
        bounds = [0, *(i + 1 for i, mark in enumerate(marks) if mark), num_layers]
        yield tuple(np.diff(bounds).tolist())


CASES = [
    layout_of(sizes, num_dense)
    for num_layers in range(1, 6)
    for sizes in cuts(num_layers)
    for num_dense in range(num_layers + 1)
]
assert len(CASES) == sum(2 ** (n - 1) * (n + 1) for n in range(1, 6))


def layer_parts(layer, num_dense):
    """A layer's parameters, whose values differ from those of any other layer."""
    rng = np.random.default_rng(layer)
    kind = "dense" if layer < num_dense else "moe"
    shape = (2, 3) if kind == "dense" else (4,)

    def draw(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    return {"norm": draw(3), "attention": {"q": draw(2, 2)}, kind: {"w": draw(*shape)}}


def lay(layout):
    """What `relayout` takes, by its docstring: room for all kinds of a position."""
    rooms = {"norm": (3,), "attention": {"q": (2, 2)}}
    kinds = {DENSE: {"dense": {"w": (2, 3)}}, MOE: {"moe": {"w": (4,)}}}
    trees = []
    for position in range(layout.num_layer_positions):
        shapes = dict(rooms)
        for kind in layout.kinds(position) - {NONE}:
            shapes |= kinds[kind]
        stages = []
        for own in layout.layers:
            room = jax.tree.map(
                lambda shape: np.zeros(shape, np.float32),
                shapes,
                is_leaf=lambda node: isinstance(node, tuple),
            )
            if position < len(own):
                room |= layer_parts(own[position], layout.first_k_dense_replace)
            stages.append(room)
        trees.append(jax.tree.map(lambda *leaves: np.stack(leaves), *stages))
    return trees


def assert_equal_trees(got, want):
    assert jax.tree.structure(got) == jax.tree.structure(want)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_positions_and_kinds():
    for layout in CASES:
        for stage, own in enumerate(layout.layers):
            for position in range(layout.num_layer_positions):
                layer = layout.layer_GP[stage, position]
                kind = layout.kind_GP[stage, position]
                if position >= len(own):
                    assert (layer, kind) == (-1, NONE)
                    continue
                assert layer == own[position]
                assert kind == (DENSE if layer < layout.first_k_dense_replace else MOE)
                assert kind in layout.kinds(position)
                assert position in layout.positions_of(kind)
        count = sum(map(len, layout.layers))
        assert sorted(layout.layer_GP.ravel())[-count:] == list(range(count))
        every = range(layout.num_layer_positions)
        room = [kind for position in every for kind in layout.kinds(position)]
        for kind in (NONE, DENSE, MOE):
            assert len(layout.positions_of(kind)) == room.count(kind)
            assert (kind in layout.kind_GP) == (room.count(kind) > 0)


@pytest.mark.parametrize("num_layers", [1, 3, 4])
def test_relaying_moves_every_layer_and_only_layers(num_layers):
    """Between any two cuts: the result is what `lay` makes for the new one."""
    for num_dense in {0, 1, num_layers}:
        layouts = [layout_of(sizes, num_dense) for sizes in cuts(num_layers)]
        laid = [lay(layout) for layout in layouts]
        pairs = itertools.product(range(len(layouts)), repeat=2)
        # A third of the pairs, to be quick; each layout is among them, old and new.
        for old, new in itertools.islice(pairs, 0, None, 3):
            # Padding of the old layout must not reach the new one.
            trees = jax.tree.map(np.copy, laid[old])
            for position, tree in enumerate(trees):
                padding = layouts[old].kind_GP[:, position] == NONE
                for leaf in jax.tree.leaves(tree):
                    leaf[padding] = np.nan
            got = relayout(trees, layouts[old], layouts[new])
            assert_equal_trees(got, laid[new])
            assert_equal_trees(relayout(got, layouts[new], layouts[old]), laid[old])


@pytest.mark.parametrize(
    "sizes, num_dense, message",
    [
        ((2, 1), 1, "the layers differ: 4 of which 1 are dense, against 3 of which 1"),
        ((2, 2), 2, "the layers differ: 4 of which 1 are dense, against 4 of which 2"),
        ((2, 3), 1, "the layers differ: 4 of which 1 are dense, against 5 of which 1"),
    ],
)
def test_layouts_of_other_models_are_refused(sizes, num_dense, message):
    old = layout_of((3, 1), 1)
    with pytest.raises(ValueError, match=message):
        relayout(lay(old), old, layout_of(sizes, num_dense))


def test_values_of_layers_to_positions_and_back():
    for layout in CASES:
        first, last = layout.first_k_dense_replace, sum(map(len, layout.layers))
        if first == last:
            continue
        values = np.random.default_rng(0).integers(100, size=(last - first, 2))
        columns = [
            layout.to_position(values, position, first)
            if MOE in layout.kinds(position)
            else None
            for position in range(layout.num_layer_positions)
        ]
        np.testing.assert_array_equal(layout.to_layers(columns, first, last), values)
        for stage, position in np.argwhere(layout.kind_GP == MOE):
            want = values[layout.layer_GP[stage, position] - first]
            np.testing.assert_array_equal(columns[position][stage], want)


def test_json():
    for layout in CASES:
        text = json.dumps(layout.to_json())
        assert Layout.from_json(json.loads(text)) == layout
