"""The phases of kernels: by annotations of PyTorch's profiles, by scopes of JAX's."""

import pytest

from dualpipe_jax import read_trace
from dualpipe_jax.profiles.names import Op, write_names
from tests.profiles.traces import annotation, kernel, launch, write_trace


def test_phases_by_the_annotation_around_the_launch(tmp_path):
    """The innermost annotation around the call, whatever thread the call is from."""
    events = [
        annotation("1F1B", 0, 100),
        annotation("mlp(B)", 10, 50),
        annotation("mlp(W)", 20, 10),
        annotation("optimizer", 22, 5),  # names no phase
        launch(1, 15),
        launch(2, 25, tid=2),  # autograd's thread
        launch(3, 40),
        launch(4, 150),
    ]
    events += [kernel(str(n), 1000 + 10 * n, 5, correlation=n) for n in (1, 2, 3, 4)]
    report = read_trace(write_trace(tmp_path, events))
    assert {s.name: (s.phase, s.pair) for s in report.spans} == {
        "1": ("mlp(B)", 0),
        "2": ("mlp(W)", 0),
        "3": ("mlp(B)", 0),
        "4": (None, None),
    }
    costs = report.costs()
    # The pair lasts from the first of its kernels to the last one's end.
    assert (costs.F, costs.I, costs.W) == (0.0, 0.010, 0.005)
    assert pytest.approx(0.025) == costs.FB


def test_phases_by_annotations_on_the_gpu(tmp_path):
    events = [
        annotation("attn(F)", 0, 10, "gpu_user_annotation", pid=0, tid=7),
        annotation("nccl:all_to_all", 1, 5, "gpu_user_annotation", pid=0, tid=7),
        kernel("in", 2, 3),
        kernel("behind", 12, 3),
        kernel("beside", 2, 3, stream=8),
    ]
    found = {s.name: s.phase for s in read_trace(write_trace(tmp_path, events)).spans}
    assert found == {"in": "attn(F)", "behind": None, "beside": None}


@pytest.mark.parametrize("correlation", [None, 0])
def test_kernels_that_nothing_launched_have_no_phase(tmp_path, correlation):
    events = [annotation("mlp(F)", 0, 10), launch(correlation, 5)]
    path = write_trace(tmp_path, [*events, kernel("k", 20, 5, correlation=correlation)])
    assert [s.phase for s in read_trace(path).spans] == [None]


def test_ranks_in_one_file_are_kept_apart(tmp_path):
    events = []
    for pid, name in ((9, "attn(F)"), (8, "mlp(B)")):
        events += [annotation(name, 0, 10, pid=pid), launch(7, 5, pid=pid)]
        # Launched by this process alone.
        events += [launch(100 + pid, 6, pid=pid)]
        events += [kernel(str(pid), 20, 5, correlation=100 + pid, device=pid)]
        events += [kernel("whose?", 30, 5, correlation=7, device=pid)]
    found = {
        (s.name, s.device): s.phase
        for s in read_trace(write_trace(tmp_path, events)).spans
    }
    assert found == {
        ("9", "GPU 9"): "attn(F)",
        ("8", "GPU 8"): "mlp(B)",
        ("whose?", "GPU 9"): None,
        ("whose?", "GPU 8"): None,
    }


def jax_gpu_events():
    def op(name, begin, duration, tid, **args):
        event = {"ph": "X", "name": name, "pid": 3, "tid": tid}
        return {**event, "ts": begin, "dur": duration, "args": args}

    names = {1: "Stream #20(Compute)", 2: "Stream #24(AllToAll)", 5: "XLA Ops"}
    where = {"hlo_module": "jit_step"}
    return [
        {
            "ph": "M",
            "name": "process_name",
            "pid": 3,
            "args": {"name": "/device:GPU:0"},
        },
        *(
            {"ph": "M", "name": "thread_name", "pid": 3, "tid": t, "args": {"name": n}}
            for t, n in names.items()
        ),
        op("fusion_3", 0, 10, 1, hlo_op="fusion.3", **where),
        op("nccl", 5, 10, 2, hlo_op="all-to-all-start.1", **where),
        op("gemm", 20, 5, 1, tf_op="jit(step)/jvp(attn)/dot_general"),
        op("fusion.3", 0, 10, 5, hlo_op="fusion.3"),  # shown once more
        {},
    ]


def test_jax_on_a_gpu(tmp_path):
    path = write_trace(tmp_path, jax_gpu_events())
    scope = "jit(step)/transpose(jvp(mlp))/mul"
    ops = {"fusion.3": Op("fusion", scope), "all-to-all-start.1": Op("async-start", "")}
    write_names(path.parent, {"jit_step": ops})
    report = read_trace(path)
    assert [(s.name, s.stream, s.is_comm, s.phase) for s in report.spans] == [
        ("fusion_3", "Stream #20(Compute)", False, "mlp(B)"),
        ("nccl", "Stream #24(AllToAll)", True, None),
        ("gemm", "Stream #20(Compute)", False, "attn(F)"),
    ]
    assert report.devices[0].name == "GPU 0"


def test_a_damaged_file_of_names_is_refused(tmp_path):
    path = write_trace(tmp_path, [kernel("k", 0, 1)])
    for text in ("{", '{"jit_f": 5}', '{"jit_f": {"dot": 1}}', "[]"):
        (path.parent / "op_names.json").write_text(text)
        with pytest.raises(ValueError, match=r"op_names\.json is damaged .*remove it"):
            read_trace(path)
    # A file in the folder above belongs to another trace.
    inner = path.parent / "inner"
    inner.mkdir()
    assert read_trace(path.rename(inner / "trace.json")).spans
