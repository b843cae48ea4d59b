"""What HTTP and the host cost a decode step.

Run: python benchmarks/serve_http.py

16 streams, as many as `configs/tiny_server.py` has request slots, on eight virtual CPU
devices. Rounds of the engine alone (`Engine.run`) and of HTTP take turns, so that other
work on the machine affects both. A round's step is the median time from the start of a
decode step to the start of the next, without the first and last steps, in which not all
streams decode; the ratio is the median over the pairs of rounds. The client is another
process, which only reads.

The host's time between two steps is that from a program's start to the next one's,
without the time in which the programs themselves run or are waited for.
"""

import asyncio
import dataclasses
import itertools
import json
import os
import statistics
import subprocess
import sys
import threading
import time

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["XLA_FLAGS"] = (
    os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
)

ROUNDS, STREAMS, PROMPT, TOKENS, ENDS = 9, 16, 16, 200, 20
MODEL = "tiny"


def prompt_of(number):
    return [(7 * number + i) % 256 for i in range(PROMPT)]


async def one_stream(port, number):
    """Asks for one completion; returns how many events came."""
    fields = {"model": MODEL, "prompt": prompt_of(number), "max_tokens": TOKENS}
    body = json.dumps(fields | {"stream": True, "temperature": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    count = 0
    while content := await reader.read(2**16):
        count += content.count(b"data: {")
    writer.close()
    return count


def client(port):
    """Reads a line, asks for all streams, prints how many events came; and so on."""

    async def ask():
        return sum(await asyncio.gather(*(one_stream(port, i) for i in range(STREAMS))))

    for _ in sys.stdin:
        print(asyncio.run(ask()), flush=True)


class Clock:
    """Notes when an engine's decode steps start and return."""

    def __init__(self, engine):
        self.steps = []
        decode = engine.programs.decode

        def noted(*args):
            started = time.perf_counter()
            result = decode(*args)
            self.steps.append((started, time.perf_counter()))
            return result

        engine.programs = dataclasses.replace(engine.programs, decode=noted)

    def step_seconds(self, run):
        """Returns the median time between the starts of two steps."""
        self.steps = []
        run()
        starts = [start for start, _ in self.steps[ENDS:-ENDS]]
        return statistics.median(
            after - before for before, after in itertools.pairwise(starts)
        )


def submit_all(engine):
    for number in range(STREAMS):
        engine.submit(prompt_of(number), max_tokens=TOKENS)


def alone(engine):
    submit_all(engine)
    assert sum(1 for _ in engine.run()) == STREAMS * TOKENS


def host_seconds(engine, clock, jax):
    """Returns the host's median time between two decode steps."""
    submit_all(engine)
    clock.steps, waits = [], []
    while True:
        # What the next `step` reads: waited for first, so that it can be left out.
        started = time.perf_counter()
        if engine._in_flight:
            jax.block_until_ready(engine._in_flight[0].chosen)
        waits.append(time.perf_counter() - started)
        if not engine.step():
            break
    pairs = list(itertools.pairwise(clock.steps))[ENDS:-ENDS]
    gaps = [after[0] - before[1] for before, after in pairs]
    return statistics.median(gaps) - statistics.median(waits)


def loop_seconds(server):
    """Returns the CPU time of the event loop's thread so far."""

    async def read():
        return time.thread_time()

    return asyncio.run_coroutine_threadsafe(read(), server.loop).result()


def main():
    import jax

    from dualpipe_jax.api import Api, Server, bind
    from dualpipe_jax.configs import tiny_server
    from dualpipe_jax.deepseek.serve import Engine, initial_params
    from dualpipe_jax.tokens import ByteTokenizer

    config = tiny_server.config()
    engine = Engine(config, initial_params(config))
    engine.compile()
    clock = Clock(engine)
    api = Api(lambda: engine, ByteTokenizer(), MODEL)
    bound = bind("127.0.0.1", 0)
    server = Server(api)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    thread.start()
    while api.worker.engine is None:
        time.sleep(0.01)
    port = str(bound.getsockname()[1])
    with subprocess.Popen(
        [sys.executable, __file__, port],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def over_http():
            process.stdin.write("go\n")
            process.stdin.flush()
            # Fewer events than tokens: bytes of a character come together.
            assert int(process.stdout.readline()) > STREAMS

        over_http()
        pairs, loop_s = [], loop_seconds(server)
        for _ in range(ROUNDS):
            own = clock.step_seconds(lambda: alone(engine))
            pairs.append((own, clock.step_seconds(over_http)))
        loop_s = (loop_seconds(server) - loop_s) / (ROUNDS * TOKENS)
        process.stdin.close()
    own, http = (statistics.median(column) for column in zip(*pairs, strict=True))
    ratios = sorted(own / http for own, http in pairs)
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {config.name}")
    print(f"decode step of {STREAMS} streams, engine alone {1e3 * own:6.2f} ms")
    print(
        f"over HTTP {1e3 * http:6.2f} ms, so {statistics.median(ratios):.3f} of the "
        f"tokens/s ({ratios[0]:.3f} to {ratios[-1]:.3f})"
    )
    print(f"CPU time of the event loop {1e3 * loop_s:.2f} ms a step")
    api.worker.close()
    server.should_exit = True
    thread.join()
    seconds = host_seconds(engine, clock, jax)
    print(f"host between two decode steps {1e3 * seconds:.2f} ms")


if __name__ == "__main__":
    client(int(sys.argv[1])) if len(sys.argv) > 1 else main()
