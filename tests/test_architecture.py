"""The house: rooms import one way, nothing in a circle, TensorFlow in one place, every published name where it was."""

import ast
import importlib
import inspect
import json
from collections import defaultdict
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

from tests.helpers import ROOT

COMMANDS, METHOD = "commands", "method"
# What each room may import besides itself. Commands may import everything.
BELOW = {
    "base": set(),
    "images": {"base"},
    "data": {"base", "images"},
    "train": {"base", "images"},
    "maps": {"base", "images", "data", "train"},
    "evaluate": {"base", "images", "data", "train", "maps"},
    "phantom": {"base", "images", "data"},
    METHOD: {"base", "images", "data", "train", "maps"},
}
THIN = {"dm_preprocess.py", "dm_region.py", "dm_inference.py"}
TENSORFLOW = {"mammo/train/backend.py", "mammo/train/devices.py", "dm_multi_gpu.py"}
# Every command has these; the trainers and the sampler are called by them from notebooks.
SAME_IN_COMMANDS = {"make_parser", "run", "main"}


def source_files() -> list[Path]:
    """Return the product's Python files, relative to the root."""
    folders = ("mammo", "ddsm_train", "inbreast", "scripts")
    paths = [*ROOT.glob("dm_*.py"), *(path for folder in folders for path in (ROOT / folder).rglob("*.py"))]
    return sorted(path.relative_to(ROOT) for path in paths)


def room(path: Path) -> str:
    """Return the room that a file is in: one of `BELOW`, or COMMANDS."""
    if path.parts[0] == "mammo" and len(path.parts) > 2 and path.parts[1] in BELOW:
        return path.parts[1]
    return METHOD if len(path.parts) == 1 else COMMANDS


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text())


def imported(path: Path) -> set[str]:
    """Return the dotted names of all that a file imports, within functions too."""
    names = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: import by the full name"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


@cache
def imports() -> dict[Path, set[Path]]:
    """Return the files of the product that each of its files imports."""
    modules = {".".join(path.with_suffix("").parts): path for path in source_files()}
    return {path: {modules[name] for name in imported(path) if name in modules} - {path} for path in modules.values()}


def test_rooms_import_only_what_is_below_them():
    upward = [
        f"{path} imports {other}"
        for path, others in imports().items()
        for other in others
        if room(path) != COMMANDS and room(other) not in BELOW[room(path)] | {room(path)}
    ]
    assert not upward


def test_no_file_imports_itself_through_others():
    try:
        order = list(TopologicalSorter(imports()).static_order())
    except CycleError as error:
        pytest.fail(f"a circle of imports: {' -> '.join(map(str, error.args[1]))}")
    assert set(order) == set(source_files())


def test_rooms_lie_on_seven_levels_at_most():
    below = defaultdict(set)
    for path, others in imports().items():
        below[room(path)] |= {room(other) for other in others} - {room(path)}

    @cache
    def level(name: str) -> int:
        return 1 + max(map(level, below[name]), default=0)

    assert max(map(level, [*BELOW, COMMANDS])) <= 7


def test_folders_are_small_enough_to_read_their_list():
    counts = defaultdict(int)
    for path in ROOT.rglob("*.py"):
        if not any(part.startswith(".") or part in ("build", "venv") for part in path.relative_to(ROOT).parts):
            counts[path.parent.relative_to(ROOT)] += path.name != "__init__.py"
    assert {folder: count for folder, count in counts.items() if count > 14} == {}


def test_tensorflow_is_imported_in_one_place():
    """Repository tools, which compare backends, may import it too."""
    users = {path for path in source_files() if any(name.split(".")[0] == "tensorflow" for name in imported(path))}
    found = {path.as_posix() for path in users if path.parts[0] != "scripts"}
    assert found and found <= TENSORFLOW


def test_only_the_published_modules_lie_in_the_root():
    published = {f"{name}.py" for name in json.loads(NAMES.read_text())}
    assert {path.name for path in ROOT.glob("*.py")} == published | {"setup.py"}
    for name in THIN:
        assert all(isinstance(node, ast.Expr | ast.ImportFrom | ast.Assign) for node in tree(Path(name)).body)


def test_no_public_function_has_a_namesake_in_another_room():
    rooms = defaultdict(set)
    for path in source_files():
        for node in tree(path).body:
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_"):
                in_common = room(path) == COMMANDS and node.name in SAME_IN_COMMANDS
                rooms[node.name] |= set() if in_common else {room(path)}
    assert {name: places for name, places in rooms.items() if len(places) > 1} == {}


# -------------------------------------------------------------------------------------------- published names

NAMES = ROOT / "tests/reference/published_names.json"


@pytest.mark.parametrize("module", json.loads(NAMES.read_text()))
def test_published_names_are_in_their_old_module_with_their_keywords(module):
    names = json.loads(NAMES.read_text())[module]
    assert names
    home = importlib.import_module(module)
    for name, keywords in names.items():
        found = home
        for part in name.split("."):
            found = getattr(found, part)
        parameters = inspect.signature(found).parameters
        passes_on = any(parameter.kind is inspect.Parameter.VAR_KEYWORD for parameter in parameters.values())
        assert passes_on or set(keywords) <= set(parameters), name
