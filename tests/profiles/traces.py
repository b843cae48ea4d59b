"""Events of profiles, made by hand."""

import json


def kernel(name, begin, duration, stream=7, correlation=None, device=0, **args):
    args |= {"device": device, "stream": stream}
    if correlation is not None:
        args["correlation"] = correlation
    event = {"ph": "X", "cat": "kernel", "name": name, "pid": device, "tid": stream}
    return {**event, "ts": begin, "dur": duration, "args": args}


def launch(correlation, begin, tid=1, pid=9):
    args = {} if correlation is None else {"correlation": correlation}
    event = {"ph": "X", "cat": "cuda_runtime", "name": "cudaLaunchKernel", "pid": pid}
    return {**event, "tid": tid, "ts": begin, "dur": 1, "args": args}


def annotation(name, begin, duration, category="user_annotation", pid=9, tid=1):
    event = {"ph": "X", "cat": category, "name": name, "pid": pid, "tid": tid}
    return {**event, "ts": begin, "dur": duration}


def write_trace(folder, events, name="trace.json"):
    """Writes a Chrome trace of the events, and returns its path."""
    path = folder / name
    path.write_text(json.dumps({"traceEvents": events}))
    return path
