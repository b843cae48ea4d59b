"""Folders: what is written is what was read, and what is wrong with one is named."""

import dataclasses
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dualpipe_jax.configs import tiny_server
from dualpipe_jax.deepseek import (
    DeepSeek,
    DeepSeekConfig,
    EplbConfig,
    load_pretrained,
)
from dualpipe_jax.deepseek.pretrained import open_folder
from dualpipe_jax.deepseek.pretrained.saving import save_folder
from dualpipe_jax.deepseek.pretrained.target import Target
from dualpipe_jax.deepseek.serve import load_published
from dualpipe_jax.tokens import PublishedTokenizer
from dualpipe_jax.train import OptimizerConfig, TrainConfig, make_programs
from tests.deepseek.pretrained.folders import V2, V3, config_of, raw, write
from tests.tokens.small import small_tokenizer

NORM = "model.norm.weight"
GATE = "model.layers.1.mlp.gate.weight"
UP = "model.layers.1.mlp.experts.3.up_proj.weight"


@pytest.mark.parametrize("folder", [V2, V3], ids=lambda folder: folder.name)
def test_what_was_read_is_written_bit_for_bit(tmp_path, folder):
    pretrained = load_pretrained(folder)
    pretrained.save(tmp_path / "out", max_file_bytes=200_000)
    assert raw(tmp_path / "out") == raw(folder)
    others = {"config.json", "generation_config.json", "expected.npz"}
    for name in others:
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    files = {path.name for path in (tmp_path / "out").iterdir()} - others
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    places = index["weight_map"]
    assert places.keys() == raw(folder).keys()
    assert files == {*places.values(), "model.safetensors.index.json"}
    assert index["metadata"]["total_size"] == sum(
        len(own) for *_, own in raw(folder).values()
    )
    again = load_pretrained(tmp_path / "out")
    for ours, theirs in zip(
        jax.tree.leaves((again.params, again.buffers)),
        jax.tree.leaves((pretrained.params, pretrained.buffers)),
        strict=True,
    ):
        np.testing.assert_array_equal(ours, theirs)
    with pytest.raises(ValueError, match="out exists; save to a new folder"):
        pretrained.save(tmp_path / "out")


def with_mtp(tensors):
    """Adds a multi-token prediction module: another layer, and what is before it."""
    prefix, width = "model.layers.2.", 192
    layer = {
        name.replace("layers.1.", "layers.2."): own
        for name, own in tensors.items()
        if "layers.1." in name
    }
    for name in ("enorm", "hnorm", "shared_head.norm"):
        layer[f"{prefix}{name}.weight"] = tensors[NORM]
    rng = np.random.default_rng(0)
    halves = rng.integers(0, 2**14, (width, 2 * width), np.uint16).tobytes()
    layer[f"{prefix}eh_proj.weight"] = ("BF16", [width, 2 * width], halves)
    layer[f"{prefix}embed_tokens.weight"] = tensors["model.embed_tokens.weight"]
    layer[f"{prefix}shared_head.head.weight"] = tensors["lm_head.weight"]
    return tensors | layer


def test_multi_token_prediction_is_read_and_written(tmp_path):
    assert config_of(V3)["num_nextn_predict_layers"] == 1
    assert load_pretrained(V3).config.num_nextn_predict_layers == 0  # no weights
    folder = write(tmp_path / "in", with_mtp(raw(V3)), config_of(V3))
    pretrained = load_pretrained(folder)
    assert pretrained.config.num_nextn_predict_layers == 1
    assert pretrained.buffers.bias.shape == (2, 4)
    # In the files the embedding of the next token comes first, here the activations.
    published = raw(folder)["model.layers.2.eh_proj.weight"][2]
    published = np.frombuffer(published, jnp.bfloat16).reshape(192, 384)
    of_tokens, of_activations = np.split(published.T.astype(np.float32), 2)
    project = pretrained.params.head["mtp"]["project"]
    np.testing.assert_array_equal(project[:192], of_activations)
    np.testing.assert_array_equal(project[192:], of_tokens)
    pretrained.save(tmp_path / "out")
    assert raw(tmp_path / "out") == raw(folder)


def test_float8_weights_that_changed_get_new_scales(tmp_path):
    pretrained = load_pretrained(V3)
    params = jax.tree.map(lambda leaf: leaf * 3, pretrained.params)
    dataclasses.replace(pretrained, params=params).save(tmp_path / "out")
    before, after = raw(V3), raw(tmp_path / "out")
    scale = f"{UP}_scale_inv"
    old, new = (np.frombuffer(each[scale][2], np.float32) for each in (before, after))
    np.testing.assert_allclose(new, 3 * old, rtol=1e-6)
    assert before[UP][2] == after[UP][2]


def test_the_tokenizer_of_a_run_is_written_beside_its_weights(tmp_path):
    tokenizer = small_tokenizer(tmp_path / "tokenizer", ["<end>", "a"])
    config = DeepSeekConfig.from_pretrained(V3)
    target = Target(config, "float32", 64, fp8=False, tokenizer=tokenizer.folder)
    (tmp_path / "out").mkdir()
    target.write_others(tmp_path / "out")
    assert PublishedTokenizer(tmp_path / "out").digest == tokenizer.digest
    assert config_of(tmp_path / "out")["eos_token_id"] == tokenizer.end_token == 0


def test_the_tokenizer_of_a_folder_must_fit(tmp_path):
    shutil.copytree(V3, tmp_path / "model")
    with pytest.raises(ValueError, match=r"has no tokenizer\.json"):
        _ = load_pretrained(tmp_path / "model").tokenizer
    other = small_tokenizer(tmp_path / "other", [f"<{i}>" for i in range(97)])
    other.save(tmp_path / "model")
    with pytest.raises(ValueError, match="has 97 tokens, but the model's vocab_size"):
        _ = load_pretrained(tmp_path / "model").tokenizer


def test_a_model_that_was_never_published_is_written_as_one(tmp_path):
    for folder, dtype, fp8 in ((V2, "float32", False), (V3, "bfloat16", True)):
        pretrained, out = load_pretrained(folder), tmp_path / folder.name
        target = Target(pretrained.config, dtype, 64, fp8=fp8)
        state = pretrained.model, pretrained.params, pretrained.buffers
        save_folder(out, target, *state, 10**9)
        kinds = [
            {name: own[:2] for name, own in raw(each).items()} for each in (out, folder)
        ]
        assert kinds[0] == kinds[1]
        again = load_pretrained(out)
        assert again.config == pretrained.config
        assert not (out / "tokenizer.json").exists()
        for ours, theirs in zip(
            jax.tree.leaves(again.params),
            jax.tree.leaves(pretrained.params),
            strict=True,
        ):
            # What float8 holds exactly, and scales rounded again.
            np.testing.assert_allclose(ours, theirs, rtol=3e-7)


def changed(tmp_path, folder, config=(), **tensors):
    """A copy of a folder in one file; None takes a tensor out."""
    kept = raw(folder) | {name: own for name, own in tensors.items() if own}
    kept = {name: own for name, own in kept.items() if tensors.get(name, own)}
    return write(tmp_path / "changed", kept, config_of(folder) | dict(config))


@pytest.mark.parametrize(
    "folder, tensors, message",
    [
        (V2, {GATE: None}, f"changed has no tensor {GATE}, which config.json asks for"),
        (
            V2,
            {GATE: ("F32", [64, 8], raw(V2)[GATE][2])},
            rf"{GATE} has the shape \[64, 8\], but by config.json it is \[8, 64\]",
        ),
        (
            V2,
            {"model.layers.0.mlp.gate_proj.bias": ("F32", [1], b"\0" * 4)},
            "has the tensor model.layers.0.mlp.gate_proj.bias, which config.json says",
        ),
        (
            V2,
            {NORM: ("I16", [64], b"\0" * 128)},
            f"{NORM} has the dtype I16, which is not implemented; the known ones are F",
        ),
        (
            V3,
            {f"{UP}_scale_inv": None},
            f"{UP} is F8_E4M3, but .* has no tensor {UP}_scale_inv",
        ),
        (
            V3,
            {f"{UP}_scale_inv": ("F32", [1, 2], b"\0" * 8)},
            rf"{UP}_scale_inv has the shape \[1, 2\], but .* \[2, 2\]",
        ),
        (
            V2,
            {NORM: ("F32", [64], b"\0" * 128)},
            rf"{NORM} has 128 bytes, which are not those of F32 \[64\]",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path, folder, tensors, message):
    with pytest.raises(ValueError, match=message) as raised:
        open_folder(changed(tmp_path, folder, **tensors))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "config, message",
    [
        ({"quantization_config": None}, "F8_E4M3, but .*has no quantization_config"),
        ({"quantization_config": [1]}, r"quantization_config=\[1\] is not implemented"),
        (
            {"quantization_config": {"quant_method": "fp8", "weight_block_size": 128}},
            "is not implemented; only quant_method='fp8' in e4m3 with a weight_block_s",
        ),
        (
            {"quantization_config": {"quant_method": "gptq"}},
            r"quantization_config=\{'quant_method': 'gptq'\} is not implemented; only",
        ),
    ],
)
def test_quantizations_that_are_not_implemented(tmp_path, config, message):
    with pytest.raises(ValueError, match=message):
        open_folder(changed(tmp_path, V3, config))


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda path: path.unlink(), "model-00002-of-00005.safetensors is missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-9]), "is truncated: model"),
        (lambda path: path.write_bytes(path.read_bytes()[:99]), "is truncated, or no"),
        (lambda path: path.write_bytes(b""), "is truncated, or no safetensors file"),
        (
            lambda path: path.write_bytes(b"\x03\0\0\0\0\0\0\0[1]"),
            "has a damaged header",
        ),
        (
            lambda path: shutil.copy(
                path.with_name("model-00001-of-00005.safetensors"), path
            ),
            "model-00002-of-00005.safetensors has no tensor .*index.json says is there",
        ),
        (
            lambda path: path.with_name("model.safetensors.index.json").write_text(
                "{}"
            ),
            "model.safetensors.index.json is no index of tensors",
        ),
        (
            lambda path: path.with_name("model.safetensors.index.json").unlink(),
            "has neither model.safetensors.index.json nor model.safetensors",
        ),
    ],
)
def test_files_that_are_damaged_are_named(tmp_path, damage, message):
    folder = shutil.copytree(V2, tmp_path / "damaged")
    damage(folder / "model-00002-of-00005.safetensors")
    with pytest.raises(ValueError, match=message):
        open_folder(folder)


def test_values_that_are_nan_are_warned_of_once(tmp_path):
    nan = ("F32", [64], np.full(64, np.nan, np.float32).tobytes())
    _, source = open_folder(changed(tmp_path, V2, **{NORM: nan}))
    whole = slice(0, 64)
    with pytest.warns(UserWarning, match=f"{NORM} has values that are NaN") as caught:
        for _ in range(2):
            source.read(NORM, whole, whole, np.dtype(np.float32))
    assert len(caught) == 1


def test_other_bad_arguments():
    with pytest.raises(ValueError, match="dtype='float16' must be 'float32' or"):
        load_pretrained(V2, dtype="float16")
    mesh = jax.make_mesh((2,), ("tp",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="mesh has the axis 'tp'; the axes of a model"):
        load_pretrained(V2, mesh=mesh)
    pretrained = load_pretrained(V2)
    for tokens, message in [
        ([1, 2], r"tokens has shape \(2,\) .*; it must be \[batch, length\]"),
        ([[1.0]], "dtype float64; it must be"),
        ([[96]], "tokens holds numbers from 96 to 96, but .* from 0 to 95"),
    ]:
        with pytest.raises(ValueError, match=message):
            pretrained.logits(tokens)
    with pytest.raises(ValueError, match=r"vocab_size=256, but .*v2_lite has 96; set"):
        load_published(tiny_server.config(), V2)


def a_run(folder, **changes):
    architecture = DeepSeekConfig.from_pretrained(folder)
    sizes = dataclasses.replace(architecture, num_nextn_predict_layers=0, **changes)
    eplb = EplbConfig(every=1, num_redundant=2)
    return TrainConfig(
        name="finetune",
        model=DeepSeek(architecture=sizes, eplb=eplb),
        mesh={"pp": 2, "ep": 2},
        schedule="dualpipe",
        num_microbatches=4,
        microbatch_size=2,
        sequence_length=8,
        num_steps=1,
        optimizer=OptimizerConfig(learning_rate=1e-3, warmup_steps=0),
        pretrained=str(folder),
        shard_at_rest=True,
    )


def test_a_run_begins_with_published_weights():
    programs = make_programs(a_run(V3))
    abstract = programs.abstract_state
    random = jax.tree.map(
        lambda leaf: jax.device_put(jnp.ones(leaf.shape, leaf.dtype), leaf.sharding),
        abstract,
    )
    state = programs.published(random)
    for leaf, like in zip(
        jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
    ):
        assert (leaf.shape, leaf.dtype) == (like.shape, like.dtype)
        assert leaf.sharding == like.sharding
    want = load_pretrained(V3)
    np.testing.assert_array_equal(state.buffers.bias, want.buffers.bias)
    np.testing.assert_array_equal(state.params.embed, want.params.embed)
    stages, layers = state.params.stages, want.params.stages
    for stage, layer in enumerate(layers):
        for name in ("attention", "attention_norm", *({"dense", "moe"} & layer.keys())):
            jax.tree.map(
                lambda ours, theirs, at=stage: np.testing.assert_array_equal(
                    ours[at], theirs[0]
                ),
                stages[0][name],
                layer[name],
            )


def test_runs_that_cannot_begin_with_a_folder():
    with pytest.raises(ValueError, match=r"has v_head_dim=8, but .*v3_fp8 has 16; set"):
        make_programs(a_run(V3, v_head_dim=8))
    config = a_run(V3)
    whole = DeepSeekConfig.from_pretrained(V3)
    model = dataclasses.replace(config.model, architecture=whole)
    with pytest.raises(ValueError, match="no weights of a multi-token prediction mod"):
        make_programs(dataclasses.replace(config, model=model))
