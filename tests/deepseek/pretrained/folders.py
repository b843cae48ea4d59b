"""Two small published folders, and what transformers computed with them.

`tests/data/deepseek_v2_lite` and `deepseek_v3_fp8` have random weights. The first was
written by transformers, the second in the layout of DeepSeek's float8 weights, whose
products with their scales transformers was given. `expected.npz` has what
transformers 5.24.0 (torch 2.13.0, float32) computed: logits, loss and gradient norm of
`input_ids`, labels shifted by one, and the tokens that follow `greedy_prompt`.
"""

import json
import struct
from pathlib import Path

import numpy as np

DATA = Path(__file__).parents[2] / "data"
V2 = DATA / "deepseek_v2_lite"
V3 = DATA / "deepseek_v3_fp8"


def expected(folder):
    with np.load(folder / "expected.npz") as file:
        return dict(file)


def raw(folder):
    """For each tensor its dtype, shape and bytes."""
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        data = path.read_bytes()
        (length,) = struct.unpack("<Q", data[:8])
        header = json.loads(data[8 : 8 + length])
        header.pop("__metadata__", None)
        for name, info in header.items():
            start, stop = (8 + length + at for at in info["data_offsets"])
            found[name] = info["dtype"], info["shape"], data[start:stop]
    return found


def write(folder, tensors, config):
    """Writes a folder with one file; `tensors` as `raw` returns them."""
    header, data = {}, b""
    for name, (dtype, shape, own) in tensors.items():
        offsets = [len(data), len(data) + len(own)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        data += own
    text = json.dumps(header).encode()
    folder.mkdir(exist_ok=True)
    (folder / "model.safetensors").write_bytes(
        struct.pack("<Q", len(text)) + text + data
    )
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def config_of(folder):
    return json.loads((folder / "config.json").read_text())
