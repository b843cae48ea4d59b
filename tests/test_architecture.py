"""Which way imports run, which modules stay free of jax, and whose names are whose."""

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import dualpipe_jax
import dualpipe_jax.train
import eplb_jax

ROOT = Path(__file__).parent.parent

# A room: its modules, and the rooms that they may import.
ROOMS = {
    "bytes": ({"_bytes"}, set()),
    "style": ({"style"}, set()),
    "schedule": ({"schedule", "tasks", "_validate"}, set()),
    "generators": ({"generators"}, {"schedule"}),
    "simulator": ({"simulator"}, {"schedule"}),
    "phases": ({"phases"}, set()),
    "tables": ({"_tables"}, set()),
    "trace": ({"trace"}, {"phases", "tables", "simulator"}),
    "show": (
        {"show", "_chrome", "_phase_layout", "_picture", "_render"},
        {"schedule", "simulator", "style", "trace"},
    ),
    "lowering": ({"lowering", "_slots", "_ticks"}, {"schedule", "simulator"}),
    "figures": (
        {"figures", "_tracks"},
        {"schedule", "generators", "simulator", "show", "lowering", "style", "trace"},
    ),
    "split_backward": (
        {"split_backward", "interleaved", "compat", "flops", "_split"},
        set(),
    ),
    "pipeline": (
        {
            "pipeline",
            "params",
            "_checks",
            "_exchange",
            "_executor",
            "_in_place",
            "_footprint",
            "_model",
            "_work",
        },
        {"schedule", "lowering", "split_backward"},
    ),
    "topology": ({"topology"}, set()),
    "partition": ({"partition", "_balance"}, {"schedule"}),
    "choose": (
        {"choose", "_choose_memory", "_choose_result", "_choose_text"},
        {"bytes", "schedule", "generators", "simulator", "show", "lowering", "style"},
    ),
    "memory": ({"memory", "_memory_cli"}, {"bytes", "pipeline", "topology"}),
    "train": (
        {"train"},
        {
            "schedule",
            "generators",
            "overlap",
            "profiling",
            "topology",
            "simulator",
            "show",
            "style",
            "figures",
            "trace",
            "lowering",
            "pipeline",
            "partition",
        },
    ),
    "deepseek": (
        {"deepseek"},
        {
            "schedule",
            "generators",
            "lowering",
            "pipeline",
            "partition",
            "simulator",
            "show",
            "train",
            "split_backward",
            "overlap",
            "profiling",
        },
    ),
    "profiling": ({"profiling"}, {"overlap", "phases", "trace"}),
    # Its command compiles the training job's step.
    "overlap": ({"overlap"}, {"figures", "phases", "tables", "topology", "trace"}),
    "cli": (
        {"cli", "__main__", "_choose_cli", "_bubbles_cli", "_trace_cli"},
        {
            "bytes",
            "schedule",
            "generators",
            "simulator",
            "show",
            "lowering",
            "choose",
            "figures",
            "train",
            "deepseek",
            "trace",
        },
    ),
}
# Inside a function only: objects that show themselves in Jupyter.
# The command compiles a config's step.
LATE = {
    ("schedule", "show"),
    ("simulator", "show"),
    ("overlap", "train"),
    ("memory", "train"),
}
JAX_FREE = (
    "bytes",
    "style",
    "schedule",
    "generators",
    "simulator",
    "phases",
    "tables",
    "trace",
    "show",
    "lowering",
    "figures",
    "partition",
    "choose",
)


def room_of(module: str) -> str:
    """The room of a module, given by its name below dualpipe_jax."""
    first = module.partition(".")[0]
    for room, (modules, _) in ROOMS.items():
        if first in modules:
            return room
    raise LookupError(f"dualpipe_jax.{module} is in no room; add it to ROOMS.")


def modules_of(package: str) -> dict[str, Path]:
    """Modules of a package, by their name below it, without its root."""
    return {
        ".".join(path.relative_to(ROOT / package).with_suffix("").parts): path
        for path in sorted((ROOT / package).rglob("*.py"))
        if path != ROOT / package / "__init__.py"
    }


def imports_of(path: Path):
    """Yields (imported name, whether the import stands at the module's top)."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively; write the whole name."
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in names:
            yield name, node in tree.body


def run_python(code: str) -> str:
    """What a fresh interpreter prints for `code`."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_imports_follow_the_arrows():
    wrong = []
    for module, path in modules_of("dualpipe_jax").items():
        here = room_of(module)
        for name, at_top in imports_of(path):
            package, _, rest = name.partition(".")
            if package != "dualpipe_jax":
                continue
            there = room_of(rest)
            allowed = there == here or there in ROOMS[here][1]
            if not allowed and (at_top or (here, there) not in LATE):
                wrong.append(f"{module} ({here}) imports {rest} ({there})")
    assert not wrong, "\n".join(wrong)


def test_the_arrows_have_no_cycle():
    done: set[str] = set()
    while len(done) < len(ROOMS):
        ready = {
            r for r, (_, needs) in ROOMS.items() if r not in done and needs <= done
        }
        assert ready, f"rooms in a cycle: {ROOMS.keys() - done}"
        done |= ready


def test_the_packages_meet_in_one_place_only():
    for module, path in modules_of("eplb_jax").items():
        for name, _ in imports_of(path):
            # What pictures look like is one thing for both.
            allowed = (
                name == "dualpipe_jax.style" or name.split(".")[0] != "dualpipe_jax"
            )
            assert allowed, f"eplb_jax.{module} imports {name}"
    for module, path in modules_of("dualpipe_jax").items():
        for name, _ in imports_of(path):
            if module.partition(".")[0] != "deepseek":
                assert name.partition(".")[0] != "eplb_jax", f"dualpipe_jax.{module}"


def test_no_jax_up_to_lowering():
    modules = [m for m in modules_of("dualpipe_jax") if _room_if_any(m) in JAX_FREE]
    assert len(modules) > 10
    imports = "".join(f"import dualpipe_jax.{m}\n" for m in ["cli", *modules])
    code = (
        f"import sys, dualpipe_jax\n{imports}"
        "heavy = {'jax', 'jaxlib', 'flax', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("package", [dualpipe_jax, dualpipe_jax.train, eplb_jax])
def test_no_exported_name_is_also_a_submodule(package):
    # Importing a submodule binds its name in the package, over whatever was there.
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert submodules.isdisjoint(getattr(package, "__all__", ()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "",
        "import dualpipe_jax.generators.dualpipe",
        "import dualpipe_jax.generators.dualpipe as d, dualpipe_jax.simulator",
        "from dualpipe_jax.simulator import simulate",
        "import dualpipe_jax.pipeline, dualpipe_jax.generators.dualpipev",
        "import dualpipe_jax; dualpipe_jax.split_vjp; import dualpipe_jax.train",
    ],
)
def test_exported_functions_are_functions_in_every_import_order(before):
    names = "dualpipe, simulate, pipeline_value_and_grad"
    code = f"{before}\nfrom dualpipe_jax import {names}\n"
    code += f"print(*(type(each).__name__ for each in ({names})))"
    assert run_python(code) == "function function function"


def _room_if_any(module: str) -> str | None:
    try:
        return room_of(module)
    except LookupError:
        return None
