"""Kills training runs, in chains, and compares what is left with a run that was not.

    python benchmarks/faults.py                45 kills, about half an hour
    python benchmarks/faults.py --kills 9      three of each kind

Three kinds of chains: a process that trains alone, one of two processes under `launch`,
and `launch` itself. Kills (SIGKILL) fall while the run compiles, into a step, into the
writing of a checkpoint, into an evaluation, and into the writing of the report. What
is killed is started again with --resume, by `launch` or, where nobody is left to do
so, by this script. In the end metrics.jsonl must hold each step once, with the loss,
gradient norm and held-out loss of the run that was left alone, to the last bit.

Needs `ps`, as Linux and macOS have it.
"""

import argparse
import collections
import itertools
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.progress import Progress

STEPS, EVERY = 120, 5
CONFIG = f"""
import dataclasses
from dualpipe_jax.configs import tiny
from dualpipe_jax.deepseek import DeepSeek, EplbConfig

def config():
    sizes = dataclasses.replace(
        tiny.architecture(), hidden_size=32, num_hidden_layers=2, intermediate_size=64,
        moe_intermediate_size=32, num_attention_heads=2, kv_lora_rank=16,
    )
    eplb = EplbConfig(every={EVERY}, num_redundant=2)
    return dataclasses.replace(
        tiny.config(), model=DeepSeek(architecture=sizes, eplb=eplb),
        mesh={{"pp": 2, "ep": 2}}, num_microbatches=8, sequence_length=64,
        num_steps={STEPS}, eval_every={EVERY}, checkpoint_every={EVERY},
        sample_tokens=0,
    )
"""
PHASES = ("compiling", "step", "checkpoint", "evaluation", "report")
KINDS = ("process", "one of two", "launcher")
VALUES = ("step", "loss", "grad_norm", "held_out_loss", "balancedness")
PATIENCE_S = 600


class Run:
    """A run in a folder, started as its kind says, and started again."""

    def __init__(self, kind, config, folder, text):
        self.kind, self.folder = kind, folder
        self.log = folder.with_suffix(".log")
        train = ["train", str(config), "--data", str(text), "--out", str(folder)]
        if kind != "process":
            options = ["--processes", "2", "--restarts", "5"]
            train = ["launch", *options, "--", *train]
        self.command = [sys.executable, "-m", "dualpipe_jax", *train, "--resume"]
        self.process = None

    def start(self):
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                self.command, stdout=log, stderr=log, start_new_session=True
            )

    @property
    def has_ended(self):
        return self.process.poll() is not None

    def trainers(self):
        """Process numbers of the processes that train."""
        if self.kind == "process":
            return [self.process.pid]
        listed = subprocess.run(
            ["ps", "-Ao", "pid=,args="], capture_output=True, text=True
        ).stdout
        found = []
        for line in listed.splitlines():
            pid, _, args = line.strip().partition(" ")
            if str(self.folder) in args and " --process-id " in args:
                found.append((args.rpartition(" ")[2], int(pid)))
        return [pid for _, pid in sorted(found)]

    def num_records(self):
        path = self.folder / "metrics.jsonl"
        return path.read_bytes().count(b"\n") if path.exists() else 0

    def is_in(self, phase):
        """Whether the run is there, as far as its files tell."""
        done = self.num_records()
        if phase == "compiling":
            text = self.log.read_text(errors="replace")
            return text.rfind("compiling") > text.rfind("compiled in")
        if phase == "checkpoint":
            names = [p.name for p in (self.folder / "checkpoints").glob("*")]
            return any(not name.isdecimal() for name in names)
        if phase == "evaluation":
            return done % EVERY == EVERY - 1
        if phase == "report":
            return any(self.folder.glob("*.new"))
        return True

    def kill(self, rng):
        """Kills what the kind says; whether something was there to be killed."""
        pid = self.process.pid
        if self.kind == "one of two":
            pids = self.trainers()
            if len(pids) < 2:
                return False
            pid = rng.choice(pids)
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            return False
        return True


def wait_until(condition, what):
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"not within {PATIENCE_S} s: {what}")
        time.sleep(0.002)


def kill_once(run, phase, rng):
    """One kill; returns the seconds until the next record, or None: it had ended."""
    # A checkpoint after the last start, so that a chain gets on.
    wanted = run.num_records() + EVERY + rng.randrange(EVERY)
    if phase != "compiling":
        wait_until(lambda: run.has_ended or run.num_records() > wanted, "steps")
    wait_until(lambda: run.has_ended or run.is_in(phase), phase)
    time.sleep(
        rng.random() * {"compiling": 2, "step": 0.3, "evaluation": 0.3}.get(phase, 0)
    )
    if run.has_ended or not run.kill(rng):
        return None
    killed, before = time.monotonic(), run.num_records()
    if run.kind != "one of two":
        run.process.wait()
        # Those of a launcher notice within a second, and give the folder back.
        wait_until(lambda: run.kind == "process" or not run.trainers(), "their end")
        run.start()
    wait_until(lambda: run.has_ended or run.num_records() != before, "a new start")
    return time.monotonic() - killed


def values(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return [{n: json.loads(line).get(n) for n in VALUES} for line in lines]


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=45)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rng = random.Random(args.seed)
    kills, seconds = collections.Counter(), collections.defaultdict(list)
    lost = differing = 0
    with tempfile.TemporaryDirectory() as name:
        room = Path(name)
        config, text = room / "config.py", room / "text.txt"
        config.write_text(CONFIG)
        text.write_bytes(Path(argparse.__file__).read_bytes())
        expected = {}
        for kind in ("process", "one of two"):
            run = Run(kind, config, room / f"alone-{kind.replace(' ', '-')}", text)
            run.start()
            if run.process.wait():
                sys.exit(run.log.read_text())
            expected[kind] = values(run.folder)
        expected["launcher"] = expected["one of two"]
        phases = itertools.cycle(PHASES)
        wanted = {
            kind: (args.kills + at) // len(KINDS) for at, kind in enumerate(KINDS)
        }
        with Progress() as progress:
            task = progress.add_task("kills", total=args.kills)
            for kind in KINDS:
                chain = itertools.count()
                while len(seconds[kind]) < wanted[kind]:
                    folder = room / f"{kind.replace(' ', '-')}-{next(chain)}"
                    run = Run(kind, config, folder, text)
                    run.start()
                    while not run.has_ended and len(seconds[kind]) < wanted[kind]:
                        phase = next(phases)
                        took = kill_once(run, phase, rng)
                        if took is not None:
                            kills[kind, phase] += 1
                            seconds[kind].append(took)
                            progress.advance(task)
                    if status := run.process.wait(timeout=PATIENCE_S):
                        end = run.log.read_text()[-3000:]
                        sys.exit(f"{kind}: status {status}\n{end}")
                    found = values(run.folder)
                    steps = [record["step"] for record in found]
                    lost += steps != list(range(1, STEPS + 1))
                    pairs = zip(found, expected[kind], strict=False)
                    differing += sum(one != other for one, other in pairs)
    print("| kills | " + " | ".join(PHASES) + " | training again, s: median, largest |")
    print("|---|" + "---|" * (len(PHASES) + 1))
    for kind in KINDS:
        cells = [str(kills[kind, phase]) for phase in PHASES]
        again = seconds[kind] or [float("nan")]
        cells.append(f"{statistics.median(again):.1f}, {max(again):.1f}")
        print(f"| {kind} | " + " | ".join(cells) + " |")
    print(
        f"\n{sum(kills.values())} kills: {lost} runs with steps lost or doubled, "
        f"{differing} records that differ."
    )
    return bool(lost or differing)


if __name__ == "__main__":
    sys.exit(main())
