"""Programs compile side by side, and a line says which are not done yet."""

import io
import re
import threading
import time

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec as P
from rich.console import Console

from dualpipe_jax import gpu_mesh
from dualpipe_jax.train.agreement import digest_of_collectives
from dualpipe_jax.train.compiling import (
    CompileProgress,
    Job,
    compile_together,
    num_operations,
)

TIMEOUT_S = 60


def lowered(size):
    """A program of so many additions."""

    def add(x):
        for _ in range(size):
            x = x + x
        return x

    return jax.jit(add).lower(1.0)


def console(*, terminal=False):
    return Console(file=io.StringIO(), width=120, force_terminal=terminal)


def test_programs_come_in_the_order_of_the_jobs():
    second_is_done = threading.Event()

    def first(_):
        # They compile at the same time, or this would never end.
        assert second_is_done.wait(TIMEOUT_S)
        return "first"

    def second(_):
        second_is_done.set()
        return "second"

    jobs = [
        Job("one", lambda: lowered(1), first),
        Job("two", lambda: lowered(2), second),
    ]
    assert compile_together(jobs) == ["first", "second"]


def test_for_gpus_one_program_compiles_at_a_time():
    running, most = [], []

    def compile_one(name):
        running.append(name)
        most.append(len(running))
        time.sleep(0.01)
        running.remove(name)
        return name

    jobs = [
        Job(str(i), lambda: lowered(1), lambda _, i=i: compile_one(i)) for i in range(3)
    ]
    assert compile_together(jobs, mesh=gpu_mesh("h100", {"x": 2})) == [0, 1, 2]
    assert most == [1, 1, 1]


def test_what_is_pending_is_shown_with_its_size():
    may_end = {"large": threading.Event(), "small": threading.Event()}
    shown = []

    class Recording(CompileProgress):
        """Keeps what is shown after each change; lets the small program end first."""

        def tracing(self, name):
            super().tracing(name)
            shown.append(self.text)

        def compiling(self, name, num_operations):
            super().compiling(name, num_operations)
            shown.append(self.text)
            if name == "small":
                may_end["small"].set()

        def done(self, name):
            super().done(name)
            shown.append(self.text)
            may_end["large"].set()

    def job(name, size):
        return Job(name, lambda: lowered(size), lambda _: may_end[name].wait(TIMEOUT_S))

    assert compile_together([job("large", 9), job("small", 3)], Recording(console()))
    large, small = (
        f"{name} ({num_operations(lowered(size))} operations)"
        for name, size in (("large", 9), ("small", 3))
    )
    assert [re.sub(r": \d+ s$", "", text) for text in shown] == [
        "tracing large",
        f"compiling {large}",
        f"tracing small; compiling {large}",
        f"compiling {large}, {small}",
        f"compiling {large}",
        "starting",
    ]


def test_without_a_terminal_it_is_one_line():
    out = console()
    jobs = [Job("one", lambda: lowered(1), lambda _: None)]
    with CompileProgress(out) as progress:
        compile_together(jobs, progress)
    size = num_operations(lowered(1))
    assert out.file.getvalue() == f"compiling one ({size} operations)\n"


def test_on_a_terminal_a_line_comes_and_goes():
    is_shown = threading.Event()

    class Terminal(io.StringIO):
        def write(self, text):
            if re.search(r"compiling one \(\d+ operations\): \d+ s", text):
                is_shown.set()
            return super().write(text)

    out = Console(file=Terminal(), width=120, force_terminal=True)
    jobs = [Job("one", lambda: lowered(1), lambda _: is_shown.wait(TIMEOUT_S))]
    with CompileProgress(out) as progress:
        assert compile_together(jobs, progress) == [True]
    erase_line = "\x1b[2K"
    assert out.file.getvalue().endswith(erase_line)


def test_a_program_that_does_not_compile_ends_it():
    def fail(_):
        raise RuntimeError("does not fit")

    jobs = [
        Job("bad", lambda: lowered(1), fail),
        Job("good", lambda: lowered(1), lambda _: None),
    ]
    with pytest.raises(RuntimeError, match="does not fit"):
        compile_together(jobs)


def test_operations_inside_of_loops_count():
    def loop(size):
        def body(_, x):
            for _ in range(size):
                x = x + x
            return x

        return jax.jit(lambda x: jax.lax.fori_loop(0, 9, body, x)).lower(1.0)

    assert num_operations(loop(7)) == num_operations(loop(3)) + 4


def test_the_digest_of_a_program_is_of_its_collectives():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Auto,))

    def compiled(axes, scale):
        def local(x):
            for axis in axes:
                x = (jax.lax.all_gather if axis else jax.lax.psum)(scale * x, "x").sum(
                    0
                )
            return x

        function = jax.shard_map(
            local, mesh=mesh, in_specs=P("x"), out_specs=P(), check_vma=False
        )
        return jax.jit(function).lower(jnp.ones((8, 3))).compile().as_text()

    texts = [compiled((0, 1), 2.0), compiled((0, 1), 3.0), compiled((1, 0), 2.0)]
    same, also, other = map(digest_of_collectives, texts)
    assert same == also != other and same.startswith("2 of digest")
