"""Checkpoints of a run, written by orbax while training continues."""

from __future__ import annotations

import contextlib
import re
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath

from dualpipe_jax.processes import distributed
from dualpipe_jax.train.barrier import Barrier
from dualpipe_jax.train.integrity import (
    DamagedError,
    describe,
    examine,
    nonfinite,
    seal,
    unseal,
)

Plan = Callable[[dict[str, Any]], tuple[Any, Callable[[Any], Any]]]


class Checkpoints:
    """The checkpoints of one run's folder; a context manager that waits for writes.

    A checkpoint is a state, and an info: a JSON object that records where the run was
    and how the state is laid out. Both are checksummed. All processes of a run make
    the same calls, and all of them must see the folder.

    Args:
      folder: where they are; created with the first one.
      say: called with a line of text when a save failed or a checkpoint is damaged.
      max_to_keep: older ones are deleted.

    Attributes:
      failure: why the last save that has ended failed, or None.
    """

    def __init__(self, folder: Path, say: Callable[[str], Any], max_to_keep: int = 2):
        self.folder = folder.absolute()
        self.failure: str | None = None
        self._say = say
        self._writing: int | None = None
        self._error: Exception | None = None
        self._max_to_keep = max_to_keep
        self._generation = 0
        self._manager, self._barrier = self._open()

    def _open(self) -> tuple[ocp.CheckpointManager, Barrier]:
        self._delete_half_written()
        distributed.barrier("half-written checkpoints are deleted")
        barrier = Barrier()
        # Some process may still be at an abandoned barrier, so keys are never reused.
        self._generation += 1
        prefix = f"{self.folder.name}-{self._generation}"
        options = ocp.CheckpointManagerOptions(
            max_to_keep=self._max_to_keep,
            create=True,
            # Threads that wait for folders which a failed save never makes would keep
            # the process for twenty minutes.
            async_options=ocp.AsyncOptions(
                barrier_sync_fn=barrier, create_directories_asynchronously=False
            ),
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                barrier_sync_key_prefix=prefix
            ),
        )
        return ocp.CheckpointManager(self.folder, options=options), barrier

    def _delete_half_written(self) -> None:
        """Deletes what a killed run or a failed save has left."""
        if distributed.is_main():
            for path in self.folder.glob("*.orbax-checkpoint-tmp*"):
                shutil.rmtree(path, ignore_errors=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, *_) -> None:
        self.wait()
        self._manager.close()

    @property
    def latest_step(self) -> int | None:
        return self._manager.latest_step()

    def save(self, step: int, state: Any, info: dict[str, Any]) -> None:
        """Starts to write a checkpoint, unless that step is written already.

        A failure, now or later, is reported through `say`, and earlier checkpoints
        stay. The state's buffers may be reused when this returns.

        Raises:
          FloatingPointError: an array of the state is not finite. A run that resumed
            from it could never go on.
        """
        self.wait()
        if step == self.latest_step:
            return
        examined = examine(state)
        if names := nonfinite(examined):
            raise FloatingPointError(
                f"the state after {step=} is not finite ({names}) and is not saved; "
                "lower the learning rate, or resume from the last checkpoint with "
                "other data."
            )
        # Again: a failed save's threads may have continued for a moment.
        self._delete_half_written()
        arrays = describe(state)
        for name, found in examined.items():
            arrays[name]["checksum"] = found.checksum
        sealed = seal({"info": info, "arrays": arrays})
        self._writing, self._error = step, None
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(
                    state=ocp.args.StandardSave(state), info=ocp.args.JsonSave(sealed)
                ),
            )
        except Exception as error:  # whatever it is, training can go on
            self._error = error

    def poll(self) -> None:
        """Reports the started save if it has failed by now, in any process."""
        if self._writing is None:
            return
        error = self._error or self._barrier.error
        if error is not None:
            status = f"failed: {_one_line(error)}"
        else:
            status = "writing" if self._manager.is_saving_in_progress() else "written"
        statuses = distributed.all_texts(status)
        failed = [each for each in statuses if each.startswith("failed: ")]
        if failed:
            self._end(failed[0].removeprefix("failed: "))
        elif "writing" not in statuses:
            try:
                self._manager.wait_until_finished()
            except Exception as raised:  # orbax raises it where it is awaited
                error = raised
            self._end(distributed.first_text(error and _one_line(error)))

    def wait(self) -> None:
        """Waits until the save that was started is written, or has failed."""
        while self._writing is not None:
            self.poll()
            if self._writing is not None:
                time.sleep(0.01)

    def _end(self, failure: str | None) -> None:
        step, self._writing, self._error = self._writing, None, None
        self.failure = failure
        if failure is None:
            return
        self._say(
            f"the checkpoint of step {step} could not be written ({self.failure}); "
            "training continues, and earlier checkpoints stay"
        )
        # A new manager: after a failed save, the old one forgets checkpoints that it
        # meant to delete, and keeps threads and their errors.
        self._barrier.abandon()
        for _ in range(2):
            with contextlib.suppress(Exception):
                self._manager.close()
        self._manager, self._barrier = self._open()

    def restore(
        self, plan: Plan, *, partial: bool = False
    ) -> tuple[int, Any, dict[str, Any]]:
        """Reads the latest checkpoint that is not damaged, and whose arrays are finite.

        Newer, damaged ones are reported, and moved out of the way.

        Args:
          plan: from a checkpoint's info, the shapes and shardings to read into,
            and the function that turns what was read into the run's state.
          partial: whether the plan covers only a part of what was written, as dicts.
            The rest is not read, so damage to it goes unnoticed.

        Returns:
          (step, state, info).

        Raises:
          ValueError: there is no checkpoint, none can be read, or the latest one that
            can be read is of another config.
        """
        steps = sorted(self._manager.all_steps(), reverse=True)
        if not steps:
            raise ValueError(
                f"no checkpoint in {self.folder}; train a run there first."
            )
        damaged: dict[int, str] = {}
        for step in steps:
            try:
                state, info = self._read(step, plan, partial)
            except DamagedError as error:
                damaged[step] = str(error)
                continue
            self._move_aside(damaged, step)
            return step, state, info
        reasons = "; ".join(f"step {step}: {why}" for step, why in damaged.items())
        raise ValueError(
            f"no checkpoint in {self.folder} can be read ({reasons}); start a new run, "
            "or restore a copy."
        )

    def _read(self, step: int, plan: Plan, partial: bool) -> tuple[Any, dict[str, Any]]:
        # The manager's own restore has barriers, at which the other processes would
        # wait for one that finds damage; the handlers have none.
        folder = epath.Path(self.folder / str(step))
        body: dict[str, Any] = {}
        with _damage_is_shared():
            handler = ocp.JsonCheckpointHandler()
            info = handler.restore(folder / "info", args=ocp.args.JsonRestore())
            body = unseal(info)
        abstract, convert = plan(body["info"])
        wanted = describe(abstract)
        written = {
            name: {"shape": array["shape"], "dtype": array["dtype"]}
            for name, array in body["arrays"].items()
            if name in wanted or not partial
        }
        for name in sorted(written.keys() | wanted.keys()):
            if written.get(name) != wanted.get(name):
                raise ValueError(
                    f"the checkpoint of step {step} in {self.folder} is of another "
                    f"model or optimizer (first difference: {name}); resume with the "
                    "config that wrote it."
                )
        state = None
        with _damage_is_shared():
            handler = ocp.PyTreeCheckpointHandler()
            arguments = ocp.args.PyTreeRestore(
                abstract,
                restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
                partial_restore=partial,
            )
            state = handler.restore(folder / "state", args=arguments)
            jax.block_until_ready(state)
        examined = examine(state)
        for name, found in examined.items():
            if found.checksum != body["arrays"][name]["checksum"]:
                raise DamagedError(f"{name} does not have its checksum")
        if names := nonfinite(examined):
            raise DamagedError(f"not finite: {names}")
        return convert(state), body["info"]

    def _move_aside(self, damaged: dict[int, str], step: int) -> None:
        for bad, why in damaged.items():
            number = 1
            while (aside := self.folder / f"damaged-{bad}-{number}").exists():
                number += 1
            distributed.barrier("the name is chosen")
            if distributed.is_main():
                (self.folder / str(bad)).rename(aside)
            self._say(
                f"the checkpoint of step {bad} is damaged ({why}); that of step "
                f"{step} is used, and the damaged one is now {aside}"
            )
            distributed.barrier("it is moved")
        if damaged:
            self._manager.reload()


@contextlib.contextmanager
def _damage_is_shared() -> Iterator[None]:
    """Turns errors of reading into a `DamagedError`, in all processes alike."""
    problem = None
    try:
        yield
    except (MemoryError, PermissionError, jax.errors.JaxRuntimeError):
        raise  # the files may well be whole
    except Exception as error:  # orbax and tensorstore raise many kinds
        problem = _one_line(error)
    problem = distributed.first_text(problem)
    if problem:
        raise DamagedError(problem)


def _one_line(error: BaseException) -> str:
    """An error in one line; tensorstore's take pages."""
    if isinstance(error, DamagedError):
        return str(error)
    line = re.split(r"\n| \[| See full", str(error).strip(), maxsplit=1)[0]
    line = re.sub(r'"/[^"]*/([^"/]+)/?"', r'"\1"', line)  # no folders
    if len(line) > 200:
        line = f"{line[:80]} ... {line[-110:]}"
    return f"{type(error).__name__}: {line}" if line else type(error).__name__
