"""What HTTP and the host cost: tokens/s over HTTP beside those of the engine alone.

Run: python benchmarks/serve_http.py

16 streams, as many as `configs/tiny_server.py` has request slots, on eight virtual CPU
devices. Rounds of the engine alone (`Engine.run`) and of HTTP take turns, so that other
work on the machine affects both; the ratio is the median over the pairs of rounds. The
client is another process, which only counts events. The host's time between two steps
is that from a program's start to the next one's, without the time in which the programs
themselves run or are waited for.

On a machine that is busy with other work, rounds vary by much more than HTTP costs; the
CPU time of the event loop's thread for each decode step does not.
"""

import asyncio
import dataclasses
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

ROUNDS, STREAMS, PROMPT, TOKENS = 7, 16, 16, 200
MODEL = "tiny"


async def one_stream(port, number):
    """Asks for one completion; returns how many events came."""
    prompt = [(7 * number + i) % 256 for i in range(PROMPT)]
    fields = {"model": MODEL, "prompt": prompt, "max_tokens": TOKENS, "stream": True}
    body = json.dumps(fields | {"temperature": 0}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(
        b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n"
        b"content-length: %d\r\n\r\n%s" % (len(body), body)
    )
    content = await reader.read()
    writer.close()
    return content.count(b"data: {")


def client(port):
    """Reads a line, asks for all streams, and prints how long that took; and so on."""

    async def ask():
        started = time.perf_counter()
        counts = await asyncio.gather(*(one_stream(port, i) for i in range(STREAMS)))
        return time.perf_counter() - started, sum(counts)

    for _ in sys.stdin:
        print(*asyncio.run(ask()), flush=True)


def alone(engine):
    """Returns the seconds of the same requests without HTTP, and their tokens."""
    started = time.perf_counter()
    for number in range(STREAMS):
        prompt = [(7 * number + i) % 256 for i in range(PROMPT)]
        engine.submit(prompt, max_tokens=TOKENS)
    count = sum(1 for _ in engine.run())
    return time.perf_counter() - started, count


def loop_seconds(server):
    """Returns the CPU time of the event loop's thread so far."""

    async def read():
        return time.thread_time()

    return asyncio.run_coroutine_threadsafe(read(), server.loop).result()


def host_seconds(engine, jax):
    """Returns the host's time between two decode steps."""
    programs, gaps, left = engine.programs, [], []

    def decode(*args):
        started = time.perf_counter()
        if left:
            gaps.append(started - left.pop() - waited.pop())
        result = programs.decode(*args)
        left.append(time.perf_counter())
        return result

    engine.programs = dataclasses.replace(programs, decode=decode)
    waited = [0.0]
    for number in range(STREAMS):
        engine.submit([number] * PROMPT, max_tokens=TOKENS)
    while True:
        # What the next `step` reads: wait for it first, so that it can be left out.
        started = time.perf_counter()
        if engine._in_flight:
            jax.block_until_ready(engine._in_flight[0].chosen)
        waited.append(time.perf_counter() - started)
        if not engine.step():
            break
    engine.programs = programs
    return statistics.median(gaps[10:])


def main():
    import jax

    from dualpipe_jax.api import Api, Server, bind
    from dualpipe_jax.configs import tiny_server
    from dualpipe_jax.deepseek.serve import Engine, initial_params
    from dualpipe_jax.tokens import ByteTokenizer

    config = tiny_server.config()
    engine = Engine(config, initial_params(config))
    engine.compile()
    alone(engine)
    api = Api(lambda: engine, ByteTokenizer(), MODEL)
    bound = bind("127.0.0.1", 0)
    server = Server(api)
    thread = threading.Thread(target=lambda: server.run(sockets=[bound]), daemon=True)
    thread.start()
    while api.worker.engine is None:
        time.sleep(0.01)
    port = str(bound.getsockname()[1])
    pairs = []
    with subprocess.Popen(
        [sys.executable, __file__, port],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:

        def over_http():
            process.stdin.write("go\n")
            process.stdin.flush()
            seconds, count = process.stdout.readline().split()
            return float(seconds), int(count)

        over_http()
        for _ in range(ROUNDS):
            pairs.append((alone(engine), over_http()))
        loop_s, steps = loop_seconds(server), engine.num_decode_steps
        over_http()
        loop_s = loop_seconds(server) - loop_s
        steps = engine.num_decode_steps - steps
        process.stdin.close()
    rates = [[count / seconds for seconds, count in pair] for pair in pairs]
    own, http = (statistics.median(column) for column in zip(*rates, strict=True))
    ratio = statistics.median(one[1] / one[0] for one in rates)
    print(f"jax {jax.__version__}, {os.cpu_count()} cores, {config.name}")
    print(f"engine alone {own:7.0f} tokens/s, {STREAMS} requests of {TOKENS} tokens")
    print(f"over HTTP    {http:7.0f} tokens/s, {ratio:.3f} of it")
    print(f"event loop   {1e3 * loop_s / steps:7.2f} ms of CPU time per decode step")
    api.worker.close()
    server.should_exit = True
    thread.join()
    print(f"host between two decode steps {1e3 * host_seconds(engine, jax):.2f} ms")


if __name__ == "__main__":
    client(int(sys.argv[1])) if len(sys.argv) > 1 else main()
