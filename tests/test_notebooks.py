"""The notebooks run, are committed as run, and have no traces of the machine."""

import importlib.util
import json
import re
import socket
from pathlib import Path

import nbformat
import numpy as np
import pytest
from IPython.core.inputtransformer2 import TransformerManager

from notebooks import execute

ROOT = Path(__file__).parent.parent
FOLDER = ROOT / "notebooks"
PATHS = sorted(FOLDER.glob("*.ipynb"))
each = pytest.mark.parametrize("path", PATHS, ids=lambda path: path.stem)


def cells(path, kind):
    notebook = nbformat.read(path, as_version=4)
    return [cell for cell in notebook.cells if cell.cell_type == kind]


def outputs(notebook):
    return [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
    ]


def streams(notebook, name):
    return [o.text for o in outputs(notebook) if o.get("name") == name]


@pytest.mark.slow
@each
def test_runs_without_a_warning(path):
    committed, notebook = nbformat.read(path, as_version=4), execute.run(path)
    assert not streams(notebook, "stderr")
    shown = [output.output_type for output in outputs(notebook)]
    assert shown == [output.output_type for output in outputs(committed)]
    if path.stem[:2] in ("01", "06"):  # without jax, so the same everywhere
        assert streams(notebook, "stdout") == streams(committed, "stdout")


@each
def test_committed_as_it_ran(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    code = cells(path, "code")
    assert [c.execution_count for c in code] == list(range(1, len(code) + 1))
    assert not any(cell.metadata for cell in notebook.cells)
    kinds = {output.output_type for output in outputs(notebook)}
    assert kinds <= {"stream", "display_data", "execute_result"}
    assert not streams(notebook, "stderr")
    # Cleaning it again would change only the pictures' bytes.
    for output in outputs(notebook):
        assert execute.WIDGET not in output.get("data", {})
        assert not output.get("metadata")


@each
def test_outputs_are_small_and_without_traces_of_the_machine(path):
    found = outputs(nbformat.read(path, as_version=4))
    assert sum(len(json.dumps(output)) for output in found) < 150_000
    texts = [output.get("text", "") for output in found]
    for output in found:
        data = output.get("data", {})
        texts += [text for kind, text in data.items() if kind.startswith("text/")]
    words = ["/home/", "/root/", "/tmp/", "/Users/", "site-packages", str(ROOT)]
    words += [socket.gethostname(), r"\d{4}-\d\d-\d\dT"]
    for word in words:
        assert not re.search(word, "\n".join(texts)), word


@each
def test_claims_are_asserted_and_links_lead_somewhere(path):
    text = "\n".join(cell.source for cell in cells(path, "markdown"))
    links = re.findall(r"\]\(([^)#]+)\)", text)
    local = [link for link in links if "://" not in link]
    assert not [link for link in local if not (FOLDER / link).exists()]
    assert text.startswith("# ") and "\n## Try it\n" in text
    code = "\n".join(cell.source for cell in cells(path, "code"))
    assert len(re.findall(r"^ *assert ", code, re.M)) >= 5
    assert not re.search(r"\b(import|from) \S*\._|\bdualpipe_jax\._", code)


def first_cell(path, folder, monkeypatch, *, is_missing):
    """Returns what the first code cell, run in a folder, passes to pip."""
    monkeypatch.chdir(folder)
    found = (lambda name: None) if is_missing else (lambda name: name)
    monkeypatch.setattr(importlib.util, "find_spec", found)
    asked = []

    class Shell:
        def run_line_magic(self, magic, line):
            asked.append((magic, line.format_map(names)))

    names = {"get_ipython": Shell}
    source = TransformerManager().transform_cell(cells(path, "code")[0].source)
    exec(compile(source, path.name, "exec"), names)
    return asked


@each
def test_first_cell_installs_what_is_missing(path, tmp_path, monkeypatch):
    extras = "viz,gpu-aot" if path.stem.startswith("07") else "viz"
    for folder, package in ((FOLDER, str(ROOT)), (tmp_path, "dualpipe-jax")):
        asked = first_cell(path, folder, monkeypatch, is_missing=True)
        assert asked == [("pip", f'install --quiet "{package}[{extras}]"')]
        assert not first_cell(path, folder, monkeypatch, is_missing=False)


@each
def test_flags_are_set_before_jax_is_imported(path):
    code = "\n".join(cell.source for cell in cells(path, "code"))
    flags = [match.start() for match in re.finditer(r"os\.environ\[", code)]
    imports = re.search(r"^(import jax|from (jax|flax|eplb_jax))", code, re.M)
    assert not flags or (imports and max(flags) < imports.start())


def test_the_index_lists_every_notebook():
    text = (FOLDER / "README.md").read_text()
    rows = re.findall(r"^\| \[(\w+)\]\((\w+)\.ipynb\) \| .+ \| (\d+) \|$", text, re.M)
    assert [name for name, _, _ in rows] == [path.stem for path in PATHS]
    assert all(name == link and 0 < int(seconds) < 180 for name, link, seconds in rows)


def test_the_excerpt_of_loads_is_the_recording():
    with (
        np.load(ROOT / "tests/data/eplb_loads_deepseek_v3.npz") as recorded,
        np.load(ROOT / "eplb_jax/data/deepseek_v3_loads.npz") as excerpt,
    ):
        assert set(excerpt) == set(recorded)
        for name in excerpt:
            np.testing.assert_array_equal(excerpt[name], recorded[name][6:61:7])


def test_streams_are_joined_and_the_plugins_notice_is_dropped():
    notice = (
        "WARNING: All log messages before absl::InitializeLog() is called are ...\n"
        "I0000 00:00:17.5 17674 cudart_stub.cc:31] Could not find cuda drivers on ...\n"
    )
    said = [("stdout", "a\n"), ("stderr", notice), ("stdout", "b\n"), ("stderr", "c\n")]
    cell = nbformat.v4.new_code_cell(
        metadata={"execution": {"iopub.execute_input": "2026-01-01T00:00:00Z"}},
        outputs=[
            nbformat.v4.new_output("stream", name=name, text=text)
            for name, text in said
        ],
    )
    notebook = execute.clean(nbformat.v4.new_notebook(cells=[cell]))
    assert [(o.name, o.text) for o in outputs(notebook)] == [
        ("stdout", "a\nb\n"),
        ("stderr", "c\n"),
    ]
    assert not notebook.cells[0].metadata
