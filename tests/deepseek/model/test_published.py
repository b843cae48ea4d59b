"""The `config.json` of published models, and what is refused by name."""

import json
from pathlib import Path

import pytest

from dualpipe_jax.configs import deepseek_v3
from dualpipe_jax.deepseek import DeepSeekConfig, RopeScaling

# What the published V3 and V2-Lite say, without fields that change no number.
V3 = {
    "model_type": "deepseek_v3",
    "attention_bias": False,
    "first_k_dense_replace": 3,
    "hidden_act": "silu",
    "hidden_size": 7168,
    "initializer_range": 0.006,
    "intermediate_size": 18432,
    "kv_lora_rank": 512,
    "max_position_embeddings": 163840,
    "moe_intermediate_size": 2048,
    "moe_layer_freq": 1,
    "n_group": 8,
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "norm_topk_prob": True,
    "num_attention_heads": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 61,
    "num_key_value_heads": 128,
    "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "rms_norm_eps": 1e-06,
    "rope_scaling": {
        "beta_fast": 32,
        "beta_slow": 1,
        "factor": 40,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
        "original_max_position_embeddings": 4096,
        "type": "yarn",
    },
    "rope_theta": 10000,
    "routed_scaling_factor": 2.5,
    "scoring_func": "sigmoid",
    "tie_word_embeddings": False,
    "topk_group": 4,
    "topk_method": "noaux_tc",
    "v_head_dim": 128,
    "vocab_size": 129280,
}
V2 = V3 | {
    "model_type": "deepseek_v2",
    "q_lora_rank": None,
    "scoring_func": "softmax",
    "topk_method": "group_limited_greedy",
    "norm_topk_prob": False,
    "topk_group": 3,
    "routed_scaling_factor": 16.0,
}


def read(folder: Path, config) -> DeepSeekConfig:
    (folder / "config.json").write_text(
        config if isinstance(config, str) else json.dumps(config)
    )
    return DeepSeekConfig.from_pretrained(folder)


def test_deepseek_v3_is_the_recipes_with_yarn(tmp_path):
    config = read(tmp_path, V3)
    yarn = RopeScaling(
        factor=40,
        original_max_position_embeddings=4096,
        mscale=1.0,
        mscale_all_dim=1.0,
    )
    assert config.rope_scaling == yarn
    assert config == read(tmp_path, V3 | {"scoring_func": None, "topk_method": None})
    ours = deepseek_v3.architecture()
    assert config.count_parameters() == ours.count_parameters()
    plain = {name: V3[name] for name in V3 if name != "rope_scaling"}
    assert read(tmp_path, plain) == ours


def test_old_and_new_spelling_are_one(tmp_path):
    rope = V3["rope_scaling"] | {"rope_type": "yarn", "rope_theta": 10000}
    rope = {name: value for name, value in rope.items() if name != "type"}
    new = {name: V3[name] for name in V3 if not name.startswith("rope_")}
    assert read(tmp_path, new | {"rope_parameters": rope}) == read(tmp_path, V3)
    plain = {"rope_type": "default", "rope_theta": 500.0}
    config = read(tmp_path, new | {"rope_parameters": plain})
    assert (config.rope_theta, config.rope_scaling) == (500.0, None)


def test_deepseek_v2(tmp_path):
    config = read(tmp_path, V2)
    assert config.q_lora_rank is None and not config.has_router_bias
    assert (config.n_group, config.topk_group) == (8, 3)
    assert config.routed_scaling_factor == 16 and not config.norm_topk_prob
    # Greedy selection, the default, ignores groups; null is no group.
    for changes in ({"topk_method": None}, {"topk_method": "greedy", "n_group": None}):
        config = read(tmp_path, V2 | changes)
        assert (config.topk_method, config.n_group) == ("greedy", 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"model_type": "llama"}, "model_type='llama' is not implemented; the known"),
        ({"model_type": ["deepseek_v3"]}, r"\['deepseek_v3'\] is not implemented"),
        ({"qk_nope_head_dim": "128"}, "qk_nope_head_dim='128' must be an integer"),
        ({"hidden_size": None}, "has no hidden_size, which a deepseek_v3 model needs"),
        ({"hidden_size": "7168"}, "hidden_size='7168' must be an integer"),
        ({"attention_bias": True}, "attention_bias=True is not implemented; only"),
        ({"hidden_act": "gelu"}, "hidden_act='gelu' is not implemented; .*'silu'"),
        ({"sliding_window": 128}, "sliding_window=128 is not implemented"),
        ({"num_key_value_heads": 8}, "num_key_value_heads=8 is not .*=128"),
        ({"rope_interleave": False}, "rope_interleave=False is not implemented"),
        ({"topk_method": "best"}, "topk_method='best' must be 'greedy' or"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers=2 must be 0 or 1"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "of type 'linear' is not"),
        ({"rope_scaling": {"type": "yarn"}}, "has no factor"),
        ({"rope_scaling": {"type": "yarn", "factor": 0.5}}, "factor=0.5 must be at"),
        (
            {"rope_scaling": {"type": "yarn", "factor": 2, "long_factor": [1]}},
            "long_factor of rope_scaling is not implemented; the known fields",
        ),
    ],
)
def test_what_is_not_implemented_is_refused_by_name(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message) as raised:
        read(tmp_path, V3 | changes)
    assert str(raised.value).startswith(str(tmp_path / "config.json"))


def test_folders_without_a_config(tmp_path):
    with pytest.raises(ValueError, match=r"nowhere is not a folder; download"):
        DeepSeekConfig.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"has no config\.json"):
        DeepSeekConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        read(tmp_path, "{")
    with pytest.raises(ValueError, match="must hold a JSON object"):
        read(tmp_path, "[]")
