"""Checks the rooms (folders): their imports and file sizes, and that no circles exist.

A room is a folder with an `__init__.py`. Its docstring names the rooms that it imports
in a paragraph `Imports: a, b.`; the test reads this, so no modules are listed here.
"""

import ast
import functools
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGES = ("dualpipe_jax", "eplb_jax")
# Beside `__init__` and `__main__`.
MOST_FILES_AT_A_ROOT = 3
MOST_LINES_OF_A_FILE = 450
MOST_LINES_OF_A_FUNCTION = 90

FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in PACKAGES
    for path in sorted((ROOT / package).rglob("*.py"))
}
ROOMS = {
    name.removesuffix(".__init__"): path
    for name, path in FILES.items()
    if path.name == "__init__.py" and name.count(".") > 1
}
MODULES = {name: path for name, path in FILES.items() if path.name != "__init__.py"}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def names_of(path: Path):
    """Yields (module, name) of what a file imports from the two packages."""
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            pairs = [(alias.name, "") for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the full name."
            pairs = [(node.module, alias.name) for alias in node.names]
        else:
            continue
        yield from (pair for pair in pairs if pair[0].split(".")[0] in PACKAGES)


def room_of(module: str) -> str:
    """Returns the room of a module; a room's name is a module of that room."""
    return module if module in ROOMS else module.rpartition(".")[0]


def rooms_imported(room: str) -> set[str]:
    """Returns the rooms that a room's files import, without modules at the roots."""
    found = set()
    for module, path in MODULES.items():
        if room_of(module) == room:
            found |= {room_of(name) for name, _ in names_of(path)}
    if room_of(room) == room:
        found |= {room_of(name) for name, _ in names_of(ROOMS[room])}
    return found - {room, *PACKAGES, ""}  # "" is the room of a package's root


def rooms_named(room: str) -> set[str]:
    """Returns the rooms that a room's docstring lists as imported."""
    doc = " ".join((ast.get_docstring(tree_of(ROOMS[room])) or "").split())
    match = re.search(r"Imports: ([\w., ]*?)\.(?: |$)", doc)
    assert match, f"The docstring of {room} lacks `Imports: ...`."
    package = room.split(".")[0]
    return {
        name if name.split(".")[0] in PACKAGES else f"{package}.{name}"
        for name in match[1].split(", ")
        if name != "nothing"
    }


@functools.cache
def handed_out_by(room: str) -> set[str]:
    """Returns the names that a room's `__init__` exports, in `__all__` or not."""
    return {what for _, what in names_of(ROOMS[room])}


def circle_in(arrows: dict[str, set[str]]) -> set[str]:
    """Returns what remains after repeatedly removing nodes without dependencies."""
    left = dict(arrows)
    while ready := [name for name, needs in left.items() if not needs & left.keys()]:
        for name in ready:
            del left[name]
    return set(left)


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_imports_what_it_says(room):
    if room.endswith(".commands"):
        # Commands are above everything else.
        assert "Imports: " in tree_of(ROOMS[room]).body[0].value.value
    else:
        assert rooms_imported(room) == rooms_named(room)


def test_rooms_have_no_circle():
    arrows = {}
    for room in ROOMS:
        # A folder inside another is a part of it: the outer room exports the contents
        # of the inner one, which may import the outer room's modules.
        arrows[room] = {
            other
            for other in rooms_imported(room)
            if not room.startswith(f"{other}.") and not other.startswith(f"{room}.")
        }
    assert not circle_in(arrows)


def test_modules_have_no_circle():
    # Imports inside functions and for type checkers count too.
    arrows = {}
    for module, path in MODULES.items():
        needs = set()
        for name, what in names_of(path):
            if f"{name}.{what}" in MODULES:
                needs.add(f"{name}.{what}")
            elif name in MODULES:
                needs.add(name)
            elif name in ROOMS and name != room_of(module):
                needs |= {m for m in MODULES if room_of(m) == name}
        arrows[module] = needs
    assert not circle_in(arrows)


def test_other_rooms_are_entered_by_the_door():
    wrong = []
    for module, path in MODULES.items():
        here = room_of(module)
        for name, what in names_of(path):
            there = room_of(name)
            inside = there == here or here.startswith(f"{there}.")
            if inside or module.endswith("__main__"):
                continue
            if name == here.split(".")[0]:
                # The root exports names to users only; its modules are separate.
                handed_out = f"{name}.{what}" in {*MODULES, *ROOMS}
            elif there in ("", *PACKAGES):
                handed_out = True
            else:
                handed_out = name in ROOMS and what in handed_out_by(name)
            if not handed_out:
                wrong.append(f"{module} imports {what} from {name}")
    assert not wrong, "\n".join(wrong)


def test_the_packages_meet_one_way():
    assert not [
        f"{module} imports {name}"
        for module, path in FILES.items()
        for name, _ in names_of(path)
        if module.startswith("eplb_jax") and name.startswith("dualpipe_jax")
    ]


def test_sizes():
    for package in PACKAGES:
        own = {path.name for path in (ROOT / package).iterdir() if path.is_file()}
        assert len(own - {"__init__.py", "__main__.py"}) <= MOST_FILES_AT_A_ROOT
    wrong = []
    for path in FILES.values():
        lines = len(path.read_text(encoding="utf-8").splitlines())
        if lines > MOST_LINES_OF_A_FILE:
            wrong.append(f"{path.relative_to(ROOT)}: {lines} lines")
        for node in ast.walk(tree_of(path)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                lines = node.end_lineno - node.lineno + 1
                if lines > MOST_LINES_OF_A_FUNCTION:
                    wrong.append(f"{path.relative_to(ROOT)}: {node.name}: {lines}")
    assert not wrong, "\n".join(wrong)


def test_tests_mirror_the_rooms():
    tests = {
        ".".join(path.relative_to(ROOT / "tests").parts[:-1])
        for path in (ROOT / "tests").rglob("test_*.py")
    }
    rooms = {name.removeprefix("dualpipe_jax.") for name in ROOMS}
    rooms = {re.sub("^eplb_jax", "eplb", name) for name in rooms}
    assert tests <= {"", "docs", *rooms}


def run_python(code: str) -> str:
    """Returns what a fresh interpreter prints for `code`."""
    command = [sys.executable, "-W", "error", "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_rooms_that_say_so_import_no_jax():
    rooms = [room for room, path in ROOMS.items() if "Without jax." in path.read_text()]
    assert len(rooms) >= 5
    names = [m for m in MODULES if room_of(m) in rooms]
    imports = "\n".join(f"import {name}" for name in [*names, *PACKAGES])
    code = (
        f"import sys\n{imports}\nimport dualpipe_jax.commands.main\n"
        "heavy = {'jax', 'jaxlib', 'flax', 'matplotlib'} & set(sys.modules)\n"
        "print(sorted(heavy))"
    )
    assert run_python(code) == "[]"


@pytest.mark.parametrize("room", [*PACKAGES, *ROOMS])
def test_no_exported_name_is_also_a_submodule(room):
    # Importing a submodule binds its name in the package, replacing any other value.
    package = importlib.import_module(room)
    submodules = {module.name for module in pkgutil.iter_modules(package.__path__)}
    assert submodules.isdisjoint(getattr(package, "__all__", ()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "before",
    [
        "",
        "import dualpipe_jax.schedules.generators.dualpipe",
        "import dualpipe_jax.schedules.generators.dualpipe as d",
        "from dualpipe_jax.schedules.simulator import simulate",
        "import dualpipe_jax.executor.pipeline, dualpipe_jax.schedules.simulator",
        "import dualpipe_jax; dualpipe_jax.split_vjp; import dualpipe_jax.train",
    ],
)
def test_exported_functions_are_functions_in_every_import_order(before):
    names = "dualpipe, simulate, pipeline_value_and_grad"
    code = f"{before}\nfrom dualpipe_jax import {names}\n"
    code += f"print(*(type(each).__name__ for each in ({names})))"
    assert run_python(code) == "function function function"
