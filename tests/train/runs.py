"""Folders of runs, as training writes them, for the tests of their page."""

import json
from pathlib import Path

import numpy as np

PUBLISHED = Path(__file__).parents[1] / "data" / "deepseek_v3_train_trace.json.gz"
RELOAD = '<meta http-equiv="refresh"'
CONFIG = {
    "name": "tiny",
    "model": {"architecture": {"num_hidden_layers": 5, "first_k_dense_replace": 2}},
    "mesh": {"pp": 4, "ep": 2},
    "schedule": "dualpipe",
    "num_steps": 40,
    "num_microbatches": 8,
    "microbatch_size": 4,
    "sequence_length": 128,
}


def make_records(num_steps=40, layers=True):
    rng = np.random.default_rng(0)
    records = []
    for step in range(1, num_steps + 1):
        by_layer = (0.5 + 0.5 * rng.random(4)).round(4).tolist()
        record = {
            "step": step,
            "loss": 2 + 4 / step,
            "tokens_per_s": 1000.0 + step,
            "balancedness": sum(by_layer) / 4,
            "balancedness_unplaced": 0.25,
            "pipeline_bubble_ratio": 1 / 13,
        }
        if layers:
            record["balancedness_layers"] = by_layer
        if step % 20 == 0:
            record["held_out_loss"] = 2.5 + 1 / step
        records.append(record)
    return records


def make_run(folder, records=None, *, config=CONFIG, state="done"):
    folder.mkdir(exist_ok=True)
    records = make_records() if records is None else records
    (folder / "config.json").write_text(json.dumps(config))
    lines = "".join(json.dumps(record) + "\n" for record in records)
    (folder / "metrics.jsonl").write_text(lines)
    if state:
        facts = {"state": state, "compile_s": 61.25, "devices": "8 x cpu"}
        (folder / "run.json").write_text(json.dumps(facts))
    return folder
