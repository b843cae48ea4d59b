"""Files as other programs write them, made without those programs."""

import io
import json
import math
import pickle
import struct
import zipfile

import numpy as np


def npy(value):
    file = io.BytesIO()
    np.save(file, value, allow_pickle=True)
    return file.getvalue()


def npy_pickle(content):
    """An .npy file with a pickle in it, of whatever content."""
    file = io.BytesIO()
    described = {"descr": "|O", "fortran_order": False, "shape": ()}
    np.lib.format.write_array_header_1_0(file, described)
    return file.getvalue() + content


def zipped(members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def safetensors(arrays, **changes):
    """A .safetensors file; `changes` of the header's entries."""
    names = {"int64": "I64", "int32": "I32", "float32": "F32"}
    header, content = {"__metadata__": {"format": "pt"}}, b""
    for name, array in arrays.items():
        end = len(content) + array.nbytes
        entry = {"dtype": names[array.dtype.name], "shape": array.shape}
        header[name] = entry | {"data_offsets": [len(content), end]} | changes
        content += array.tobytes()
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content


def opcodes(*parts):
    """A pickle of protocol 2: bytes are operations, other values are pushed."""
    pushed = [p if isinstance(p, bytes) else pickle.dumps(p, 2)[2:-1] for p in parts]
    return b"\x80\x02" + b"".join(pushed) + b"."


def torch_tensor(shape, strides, numel, storage="LongStorage", start=0):
    """The operations by which torch's files hold a tensor, in storage 0."""
    return (
        *(b"ctorch._utils\n_rebuild_tensor_v2\n", b"("),
        *(b"(", "storage", f"ctorch\n{storage}\n".encode(), "0", "cuda:0", numel),
        *(b"t", b"Q", start, shape, strides, False),
        *(b"ccollections\nOrderedDict\n", b")", b"R", b"t", b"R"),
    )


def torch_file(pickled, storage=b""):
    return zipped({"loads/data.pkl": pickled, "loads/data/0": storage})


def sglang_pt(counts, **changes):
    """What SGLang's recorder saves: counts among other things."""
    strides = tuple(math.prod(counts.shape[i + 1 :]) for i in range(counts.ndim))
    sizes = {"shape": counts.shape, "strides": strides, "numel": counts.size}
    pickled = opcodes(
        *(b"}", "rank", 0, b"s", "logical_count"),
        *(*torch_tensor(**sizes | changes), b"s"),
        *("average_utilization_rate_over_window", None, b"s"),
    )
    return torch_file(pickled, counts.astype("<i8").tobytes())
