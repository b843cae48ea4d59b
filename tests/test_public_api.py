"""The package roots are the public API: their names are frozen and documented.

Doctests of all modules run on their own (`--doctest-modules` in pyproject.toml).
"""

import dataclasses
import doctest
import inspect

import pytest

import dualpipe_jax
import dualpipe_jax.deepseek
import dualpipe_jax.deepseek.serve
import dualpipe_jax.train
import eplb_jax

FROZEN = {
    dualpipe_jax: [
        "Costs",
        "MemoryReport",
        "MemoryUse",
        "OverlapReport",
        "Partition",
        "PipelineParams",
        "Program",
        "RankedSchedule",
        "Ranking",
        "Remat",
        "Schedule",
        "StageMemory",
        "Task",
        "Timeline",
        "TraceReport",
        "Weighted",
        "compile_overlapped",
        "dualpipe",
        "dualpipev",
        "gpipe",
        "gpu_compiler_options",
        "gpu_mesh",
        "interleaved_1f1b",
        "interleaved_zero_bubble",
        "looped_bfs",
        "lower",
        "memory_report",
        "one_f_one_b",
        "overlap_report",
        "partition_layers",
        "pipeline_forward",
        "pipeline_value_and_grad",
        "profile",
        "rank_schedules",
        "read_trace",
        "run_interleaved",
        "simulate",
        "split_vjp",
        "stack_stages",
        "v_half",
        "v_min",
        "zb1p",
        "zbv",
    ],
    eplb_jax: [
        "BalancerState",
        "ExpertBalancer",
        "ExpertParallel",
        "ExpertTables",
        "ExpertWeights",
        "LoadEstimator",
        "MicrobatchPlan",
        "MoE",
        "MoEStats",
        "Outcome",
        "PlacementFile",
        "Recording",
        "Routing",
        "Scaled",
        "balancedness",
        "balancedness_bound",
        "balancedness_figure",
        "count_migrated",
        "grouped_matmul",
        "migrate",
        "mix_experts",
        "moving_average",
        "physical_weights",
        "placement_figure",
        "placement_text",
        "plan_microbatch",
        "quantize_blocks",
        "quantize_tiles",
        "read_loads",
        "read_placement",
        "rebalance_experts",
        "refine_placement",
        "replay",
        "replay_figure",
        "replay_text",
        "restore_state",
        "save_state",
        "scaled_grouped_matmul",
        "scaled_matmul",
        "sequence_balance_loss",
        "sigmoid_group_top_k",
        "softmax_top_k",
        "sum_of_last",
        "update_bias",
        "write_placement",
    ],
    dualpipe_jax.deepseek: [
        "DeepSeek",
        "DeepSeekConfig",
        "EplbConfig",
        "Pretrained",
        "RopeScaling",
        "ServeConfig",
        "break_even",
        "load_pretrained",
    ],
    dualpipe_jax.deepseek.serve: [
        "Engine",
        "RebalanceConfig",
        "ServeConfig",
        "ServeParams",
        "ServePrograms",
        "Token",
        "break_even",
        "initial_params",
        "load_checkpoint",
        "load_published",
        "make_serve_programs",
        "prometheus",
    ],
    dualpipe_jax.train: [
        "ModelConfig",
        "OptimizerConfig",
        "PipelineModel",
        "Programs",
        "Result",
        "Text",
        "TrainConfig",
        "TrainState",
        "load_config",
        "load_text",
        "make_programs",
        "train",
    ],
}
EXPORTED = [
    pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
    for package, names in FROZEN.items()
    for name in names
]


@pytest.mark.parametrize("package", FROZEN, ids=lambda package: package.__name__)
def test_exported_names_are_frozen(package):
    # Adding or removing a name is a decision: update this list too.
    assert sorted(getattr(package, "__all__", [])) == sorted(FROZEN[package])
    assert set(FROZEN[package]) <= set(dir(package))


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'dualpype'"):
        _ = dualpipe_jax.dualpype


@pytest.mark.parametrize("exported", EXPORTED)
def test_docstrings_name_every_argument_or_field(exported):
    doc = inspect.getdoc(exported)
    assert doc, "no docstring"
    if inspect.isclass(exported):
        if dataclasses.is_dataclass(exported):
            names = [f.name for f in dataclasses.fields(exported) if f.name[0] != "_"]
        else:
            names = list(getattr(exported, "_fields", ()))
    else:
        names = list(inspect.signature(exported).parameters)
    missing = [name for name in names if name not in doc]
    assert not missing, f"undocumented: {missing}"


@pytest.mark.parametrize(
    "exported",
    [
        pytest.param(getattr(package, name), id=f"{package.__name__}.{name}")
        for package in (dualpipe_jax, eplb_jax)
        for name in FROZEN[package]
        if inspect.isfunction(getattr(package, name))
    ],
)
def test_every_function_of_a_root_shows_an_example(exported):
    tests = doctest.DocTestFinder().find(exported, exported.__name__)
    assert any(test.examples for test in tests), "no Examples block with a doctest"
