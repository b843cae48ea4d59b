"""A run that resumes with other ranks, stages and placements, and changes nothing."""

import dataclasses
import io
import shutil

import numpy as np
import pytest
from rich.console import Console

from dualpipe_jax.deepseek import DeepSeek, EplbConfig
from dualpipe_jax.train import Text, train
from tests.deepseek.model import small
from tests.deepseek.model.sizes import SMALL

TEXT = Text(
    train=np.random.default_rng(0).integers(0, 16, 4000).astype(np.uint8),
    held_out=np.random.default_rng(1).integers(0, 16, 400).astype(np.uint8),
    source="noise",
)


def run(config, folder, *, resume=False):
    console = Console(file=io.StringIO(), width=200)
    return train(config, TEXT, folder, resume=resume, console=console)


@pytest.mark.slow
def test_another_mesh_schedule_and_placement(tmp_path):
    config = small.config(
        architecture={"num_hidden_layers": 2},
        schedule="1f1b",
        num_steps=6,
        checkpoint_every=3,
        eval_every=3,
    )
    whole = run(config, tmp_path).metrics
    # As if the nodes had been lost between the two checkpoints.
    shutil.rmtree(tmp_path / "checkpoints" / "6")
    eplb = EplbConfig(
        every=2, num_redundant=4
    )  # eight physical experts, as four devices need
    fewer_ranks = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, eplb=eplb),
        mesh={"pp": 1, "ep": 4},
        schedule="gpipe",
        sample_tokens=5,
    )
    resumed = run(fewer_ranks, tmp_path, resume=True)
    for name in ("loss", "grad_norm", "held_out_loss", "learning_rate"):
        got, expected = (
            [record[name] for record in records if name in record]
            for records in (resumed.metrics, whole)
        )
        assert len(got) == len(expected) > 0
        # f32 in another order of sums, through five steps of Adam.
        np.testing.assert_allclose(got, expected, rtol=1e-4, err_msg=name)
    prompt, new = resumed.sample
    assert len(prompt) == 4 and len(new) == 5
    other = dataclasses.replace(config.model.architecture, routed_scaling_factor=2.0)
    other = dataclasses.replace(config.model, architecture=other)
    with pytest.raises(
        ValueError, match=r"of another model: its routed_scaling_factor is 1.0"
    ):
        run(dataclasses.replace(config, model=other), tmp_path, resume=True)


@pytest.mark.parametrize(
    "change, message",  # None: a field that the checkpoint does not have
    [
        ({"hidden_size": None}, "has no field hidden_size; resume with the version"),
        ({"dim": 12}, "has the unknown field dim; resume with the version"),
        (
            {"v_head_dim": 4, "kv_lora_rank": 3},
            "its kv_lora_rank is 3, v_head_dim is 4, but the config's kv_lora_rank is",
        ),
    ],
)
def test_checkpoints_of_other_models_and_versions_are_refused(change, message):
    model = DeepSeek(architecture=SMALL).build_unpipelined()
    info = model.checkpoint_info
    assert model.from_checkpoint_info(info).layout == model.layout
    older = {
        name: value
        for name, value in info["architecture"].items()
        if name not in ("rope_scaling", "scoring_func")
    }
    assert model.from_checkpoint_info(info | {"architecture": older}) is not None
    sizes = info["architecture"] | change
    sizes = {
        name: value for name, value in sizes.items() if value or name not in change
    }
    with pytest.raises(ValueError, match=message):
        model.from_checkpoint_info(info | {"architecture": sizes})
    with pytest.raises(ValueError, match="of another model: it has no architecture of"):
        model.from_checkpoint_info({"layout": [2, 2]})
