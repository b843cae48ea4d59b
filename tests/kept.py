"""Programs compiled for GPUs without one, kept among the user's compiled programs.

jax keeps what it compiles for CPUs (conftest.py), but it cannot load a program for
compile-only devices (jax 0.10). Tests read the text of such a program and the memory it
takes, so these two are kept, under a hash of all that they depend on.
"""

import hashlib
import json
import os
import re
import tempfile
import types
import zlib
from pathlib import Path

import jax
import jaxlib

from dualpipe_jax.gpu import GPUS, shared_kernels

_KERNELS = "xla_gpu_kernel_cache_file"  # see `shared_kernels`: no program depends on it


class KeptLowered:
    """A lowered program whose compilations are kept.

    Args:
      lowered: of `jax.jit(...).lower(...)`.
      mesh: of `gpu_mesh`, for which it was lowered.
    """

    def __init__(self, lowered, mesh):
        self._lowered, self._mesh = lowered, mesh
        self._program = _without_lines(lowered.as_text(debug_info=True))

    def compile(self, compiler_options=None, *, with_ptx=False):
        """Compiles it; `with_ptx`, and keeps the text of its kernels, too."""
        options = dict(compiler_options or {})
        key = _key(self._program, self._mesh, options)
        path = _path(f"ptx-{key}" if with_ptx else key)
        if path is not None and path.exists():
            kept = json.loads(zlib.decompress(path.read_bytes()))
        else:
            with shared_kernels() as kernels, tempfile.TemporaryDirectory() as folder:
                if with_ptx:
                    # Kernels from XLA's own file would not be written.
                    kernels = {"xla_dump_to": folder}
                compiled = self._lowered.compile({**kernels, **options})
                ptx = [file.read_text() for file in Path(folder).glob("*.ptx")]
            kept = {"text": compiled.as_text(), "memory": _sizes(compiled)}
            kept |= {"ptx": "\n".join(ptx)}
            if path is not None:
                _write(path, zlib.compress(json.dumps(kept).encode()))
        return KeptCompiled(self._mesh, **kept)


class KeptCompiled(jax.stages.Compiled):
    """What tests read of a program that was compiled, now or in an earlier session."""

    def __init__(self, mesh, *, text, memory, ptx=""):
        self._mesh, self._text, self._memory = mesh, text, memory
        self.ptx = ptx

    def as_text(self):
        return self._text

    def memory_analysis(self):
        return types.SimpleNamespace(**self._memory)

    @property
    def input_shardings(self):
        """Only for its devices, which say what it was compiled for."""
        return (jax.NamedSharding(self._mesh, jax.P()),)

    output_shardings = input_shardings


def _sizes(compiled):
    memory = compiled.memory_analysis()
    names = [name for name in dir(memory) if name.endswith("_in_bytes")]
    return {name: getattr(memory, name) for name in names}


def _without_lines(text):
    """The program with the names of its operations, but no lines of files."""
    names = {}
    for number, location in re.findall(r"^#loc(\d*) = loc\((.*)\)$", text, re.M):
        name = re.match(r'"(?:[^"\\]|\\.)*"(?!:)', location)
        names[number] = name[0] if name else ""
    text = re.sub(r"^#loc.*\n", "", text, flags=re.M)
    return re.sub(r"#loc(\d*)", lambda match: names[match[1]], text)


def _key(program, mesh, options):
    devices = [(x.id, x.process_index, x.device_kind) for x in mesh.devices.flat]
    options = {name: value for name, value in options.items() if name != _KERNELS}
    quickly = jax.config.values["jax_disable_most_optimizations"]
    versions = (jax.__version__, jaxlib.__version__)
    flags = os.environ.get("XLA_FLAGS")
    parts = (program, devices, GPUS, sorted(options.items()), quickly, versions, flags)
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()


def _path(key):
    folder = jax.config.values["jax_compilation_cache_dir"]
    # With the ending of jax's own entries: the folder is pruned by it.
    return Path(folder) / f"gpu-{key}-cache" if folder else None


def _write(path, data):
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        file.write(data)
    Path(file.name).replace(path)
