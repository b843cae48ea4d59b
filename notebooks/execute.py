"""Executes the notebooks in place and removes traces of when and where they ran.

Command: `make notebooks`, or `python notebooks/execute.py [NAME ...]` for some of them.

A notebook is committed as a reader should see it: executed in order in a fresh kernel,
with its pictures, and without traces of the machine that ran it.
"""

from __future__ import annotations

import base64
import io
import os
import re
import resource
import sys
import time
from pathlib import Path

import nbclient
import nbformat

FOLDER = Path(__file__).parent
KERNEL = {"display_name": "Python 3", "language": "python", "name": "python3"}
WIDGET = "application/vnd.jupyter.widget-view+json"
# Printed by jax's CUDA plugin, where it is installed, on machines without a GPU.
PLUGIN_NOTICE = re.compile(
    r"^(WARNING: All log messages before absl::InitializeLog\(\).*"
    r"|.*cudart_stub\.cc.*Could not find cuda drivers.*)\n",
    re.M,
)


def run(path: Path) -> nbformat.NotebookNode:
    """Executes a notebook in a fresh kernel, in its own folder.

    Args:
      path: the notebook; it is not written.

    Returns:
      The notebook with its outputs, cleaned.

    Raises:
      nbclient.exceptions.CellExecutionError: a cell raised an exception.
    """
    notebook = nbformat.read(path, as_version=4)
    # A reader's kernel: none of our flags but where compiled programs are kept, and the
    # library of this checkout; on the CPU, since jax complains if its CUDA plugin finds
    # no GPU.
    ours = ("JAX_", "XLA_", "MPLBACKEND", "PYTEST_")
    cache = ("JAX_COMPILATION_CACHE_DIR", "JAX_PERSISTENT_CACHE_MIN_")
    env = {
        name: value
        for name, value in os.environ.items()
        if name.startswith(cache) or not name.startswith(ours)
    }
    path_of_modules = [str(FOLDER.parent), env.get("PYTHONPATH", "")]
    env |= {
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": os.pathsep.join(filter(None, path_of_modules)),
    }
    if any("gpu_mesh" in cell.source for cell in notebook.cells):
        # jax would keep programs for compile-only devices, and warn that it cannot
        # load them.
        env.pop("JAX_COMPILATION_CACHE_DIR", None)
    nbclient.NotebookClient(
        notebook,
        timeout=300,  # seconds per cell
        kernel_name="python3",
        resources={"metadata": {"path": str(path.parent)}},
    ).execute(env=env)
    return clean(notebook)


def clean(notebook: nbformat.NotebookNode) -> nbformat.NotebookNode:
    """Removes timings, widgets' state and machine-specific text; shrinks pictures."""
    notebook.metadata = {"kernelspec": KERNEL, "language_info": {"name": "python"}}
    for cell in notebook.cells:
        cell.metadata = {}
        if cell.cell_type == "code":
            cleaned = [_clean_output(each) for each in cell.outputs]
            cell.outputs = _joined([each for each in cleaned if each])
    return notebook


def _joined(outputs: list[nbformat.NotebookNode]) -> list[nbformat.NotebookNode]:
    """Joins streams that were flushed in parts."""
    joined: list[nbformat.NotebookNode] = []
    for output in outputs:
        last = joined[-1] if joined else {}
        if output.output_type == "stream" and last.get("name") == output.name:
            last["text"] += output.text
        else:
            joined.append(output)
    return joined


def _clean_output(output: nbformat.NotebookNode) -> nbformat.NotebookNode | None:
    if output.output_type == "stream":
        output.text = PLUGIN_NOTICE.sub("", output.text)
        return output if output.text else None
    data = output.get("data", {})
    if WIDGET in data:  # only a live notebook can draw it
        return None
    if "image/png" in data:
        data["image/png"] = _smaller(data["image/png"])
    output.metadata = {}
    return output


def _smaller(png: str) -> str:
    """Reduces a picture to 48 colours, which is enough for drawings."""
    from PIL import Image

    image = Image.open(io.BytesIO(base64.b64decode(png))).convert("RGB")
    written = io.BytesIO()
    image.quantize(48, dither=Image.Dither.NONE).save(written, "PNG", optimize=True)
    return base64.b64encode(written.getvalue()).decode()


def main(names: list[str]) -> None:
    """Executes the notebooks named, or all of them, and prints how long each took."""
    paths = [FOLDER / Path(name).name for name in names]
    for path in paths or sorted(FOLDER.glob("*.ipynb")):
        begin, busy = time.perf_counter(), _cpu_seconds()
        notebook = run(path)
        seconds, busy = time.perf_counter() - begin, _cpu_seconds() - busy
        path.write_text(nbformat.writes(notebook, indent=1) + "\n", encoding="utf-8")
        size = path.stat().st_size / 1000
        took = f"{seconds:.0f} s ({busy:.0f} s of CPU)"
        print(f"{path.name}: {took}, {size:.0f} kB", flush=True)


def _cpu_seconds() -> float:
    """Returns the CPU time of all kernels that have ended."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main(sys.argv[1:])
