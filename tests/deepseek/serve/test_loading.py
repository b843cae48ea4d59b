"""From a training run to completions: checkpoints, and the command line."""

import dataclasses
import io
import json

import jax
import numpy as np
import pytest
from rich.console import Console

from dualpipe_jax import read_trace
from dualpipe_jax.commands import main as cli
from dualpipe_jax.deepseek.serve import Engine, load_checkpoint, load_published
from dualpipe_jax.train import Text, train
from tests.deepseek.model import small

pytestmark = pytest.mark.slow  # a training run

SERVER = """
import dataclasses
from dualpipe_jax.deepseek.serve import ServeConfig
from tests.deepseek.model.small import ARCHITECTURE

SIZES = dataclasses.replace(ARCHITECTURE, vocab_size=256, num_hidden_layers=2)

def config(**changes):
    return ServeConfig(
        name="served",
        architecture=SIZES,
        num_devices=2,
        num_redundant=2,
        requests_per_device=2,
        context_length=24,
        max_prompt_length=12,
        max_prefill_tokens=16,
        **changes,
    )

def number():
    return 3
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of three steps, and server.py beside it."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "server.py").write_text(SERVER)
    rng = np.random.default_rng(0)
    text = Text(
        train=rng.integers(0, 256, 4000).astype(np.uint8),
        held_out=rng.integers(0, 256, 400).astype(np.uint8),
        source="noise",
    )
    config = small.config(
        architecture={"num_hidden_layers": 2, "vocab_size": 256},
        schedule="1f1b",
        num_steps=3,
        eval_every=3,
        checkpoint_every=3,
    )
    train(config, text, folder, console=Console(file=io.StringIO()))
    return folder


@pytest.fixture(scope="module")
def config(folder):
    names = {}
    exec((folder / "server.py").read_text(), names)
    return names["config"]()


def test_weights_are_those_of_the_checkpoint(folder, config):
    params, placement = load_checkpoint(config, folder)
    # By orbax, whole: what was written.
    import orbax.checkpoint as ocp

    path = folder / "checkpoints" / "3" / "state"
    with pytest.warns(UserWarning, match="Sharding info not provided"):
        state = ocp.PyTreeCheckpointHandler().restore(path)
    info = json.loads((folder / "checkpoints" / "3" / "info" / "metadata").read_text())
    layers = info["info"]["layout"]["layers"]
    place = {
        layer: (stage, position)
        for stage, own in enumerate(layers)
        for position, layer in enumerate(own)
    }
    np.testing.assert_array_equal(params.embed, state["params"]["embed"])
    for layer, tree in enumerate(params.layers):
        stage, position = place[layer]
        part = state["params"]["stages"][position]
        np.testing.assert_array_equal(
            tree["attention"]["kv_up"]["kernel"],
            part["attention"]["kv_up"]["kernel"][stage],
        )
    stage, position = place[1]
    moe = state["params"]["stages"][position]["moe"]
    np.testing.assert_array_equal(
        params.layers[1]["moe"]["bias"], state["buffers"]["bias"][0]
    )
    expert = np.arange(6) % 4
    np.testing.assert_array_equal(
        params.experts[0].gate, moe["experts"]["gate"][stage][expert]
    )
    assert placement.shape == (1, 6) and set(placement.ravel()) == set(range(4))
    placed, same = load_checkpoint(config, folder, is_placed=True)
    np.testing.assert_array_equal(same, placement)
    for name, leaf in placed.experts[0]._asdict().items():
        np.testing.assert_array_equal(leaf, moe["experts"][name][stage][placement[0]])


def test_what_cannot_be_loaded(folder, config, tmp_path):
    with pytest.raises(ValueError, match=r"no checkpoint in .*train a model there"):
        load_checkpoint(config, tmp_path)
    other = dataclasses.replace(config.architecture, num_attention_heads=4)
    with pytest.raises(
        ValueError, match=r"another model: its num_attention_heads is 2"
    ):
        load_checkpoint(dataclasses.replace(config, architecture=other), folder)


def test_serve_writes_completions_in_order(folder, config, capsys, tmp_path):
    prompts = tmp_path / "prompts.jsonl"
    lines = [
        {"prompt": "one", "max_tokens": 3},
        {"prompt": "this is too long"},
        {"prompt": "two", "max_tokens": 9, "temperature": 1.0, "seed": 4},
        {"prompt": "three", "max_tokens": 2, "tokens": 1},
        {"prompt": "ab", "max_tokens": "2"},
        {"prompt": "ab", "temperature": 10**400},
        {"prompt": ""},
        {"prompt": "four", "max_tokens": 4},
    ]
    text = "\n".join([*map(json.dumps, lines), "{"])
    prompts.write_text(text + "\n")
    metrics = tmp_path / "metrics.prom"
    command = ["serve", f"{folder / 'server.py'}:config", str(prompts)]
    command += ["--run", str(folder), "--max-tokens", "12", "--metrics", str(metrics)]
    command += ["--profile", str(tmp_path / "profile")]
    assert cli.main(command) == 1
    printed = capsys.readouterr()
    # The same by the engine itself, one after the other.
    params, placement = load_checkpoint(config, folder)
    engine = Engine(config, params)
    engine.place(placement)
    expected = ""
    for prompt, options in (
        ("one", {"max_tokens": 3}),
        ("two", {"max_tokens": 9, "temperature": 1.0, "seed": 4}),
        ("four", {"max_tokens": 4}),
    ):
        (tokens,) = engine.generate([list(prompt.encode())], **options)
        expected += prompt + bytes(tokens.tolist()).decode(errors="replace") + "\n"
    assert printed.out == expected
    for message in (
        "prompt 2 is refused: prompt has 16 tokens, but max_prompt_length=12",
        "prompt 4 is refused: 'tokens' is unknown",
        "prompt 5 is refused: max_tokens='2' must be a number",
        "prompt 6 is refused: temperature=1000",
        "prompt 7 is refused: prompt has shape (0,)",
        "prompt 9 is refused: '{' is not JSON",
        "16 tokens in 1 prefills and 8 decode steps",
    ):
        assert message in printed.err
    assert "eplb_tokens_total 16.0" in metrics.read_text()
    report = read_trace(tmp_path / "profile")
    assert {"attn(F)", "dispatch(F)", "mlp(F)", "combine(F)"} == report.phases.keys()
    assert len(report.devices) == config.num_devices


def test_an_exported_run_is_a_published_model(folder, config, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = ["export", str(folder), "--out", str(out), "--dtype", "float32"]
    assert cli.main(arguments) == 0 and capsys.readouterr().out == f"{out}\n"
    want, _ = load_checkpoint(config, folder)
    got = load_published(config, out)
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for ours, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert cli.main(arguments) == 2
    assert "out exists; save to a new folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tiny", "--run", "x"], "returns a TrainConfig; it must return a ServeConfig"),
        (["tiny_server", "--run", "nowhere"], "no checkpoint in nowhere"),
        (["tiny_server"], "one of the arguments --run --pretrained is required"),
        (["tiny_server", "--pretrained", "x"], "x is not a folder; download the model"),
        (["tiny_server", "none.txt", "--run", "x"], "none.txt"),
    ],
)
def test_bad_input_in_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO("a prompt\n"))
    try:
        status = cli.main(["serve", *arguments])
    except SystemExit as exit_:
        status = exit_.code
    assert status == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
