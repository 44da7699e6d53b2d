"""The house: rooms import one way, nothing in a circle, TensorFlow in one place, every published name where it was."""

import ast
import importlib
import inspect
import json
import re
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
SIGNATURES = ROOT / "tests/reference/published_signatures.json"
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
    published = {f"{name}.py" for name in json.loads(SIGNATURES.read_text())}
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


# --------------------------------------------------------------------------------------- published signatures


def published_signatures() -> dict[str, list[str]]:
    """Return the parameters of every published function, such as `k=1`, in order; a class has those of `__init__`."""
    modules = json.loads(SIGNATURES.read_text())
    return {
        f"{module}.{name}".removesuffix(".__init__"): parameters
        for module, names in modules.items()
        for name, parameters in names.items()
    }


def difference(name: str, published: list[str]) -> str | None:
    """Return in which parameter a function differs from the published one; more of them may follow by keyword."""
    module, *path = name.split(".")
    found = importlib.import_module(module)
    for part in path:
        found = getattr(found, part)
    ours = [parameter for parameter in inspect.signature(found).parameters.values() if parameter.name != "self"]
    taking_others = [parameter for parameter in published if parameter.startswith("**")]
    positional = [p for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD]
    if len(positional) != len(published) - len(taking_others):
        return f"{len(positional)} positional parameters"
    for parameter, wanted in zip(positional, published, strict=False):
        wanted_name, _, default = wanted.partition("=")
        if parameter.name != wanted_name or not same_default(parameter.default, default):
            return f"{parameter} for {wanted}"
    others = [parameter for parameter in ours if parameter not in positional]
    if any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in others):
        return "a keyword that must be given"
    if taking_others and not any(p.kind is p.VAR_KEYWORD for p in others):
        return "no further keywords"
    return None


def same_default(ours, published: str) -> bool:
    """Return whether a default is the published one; None may stand for a dict or list that all calls would share."""
    if not published:
        return ours is inspect.Parameter.empty
    wanted = ast.literal_eval(published)
    if wanted in ([], {}) and ours is None:
        return True
    if isinstance(ours, tuple):
        ours = list(ours)
    return getattr(ours, "__name__", ours) == wanted


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_published_signatures_are_the_same_but_for_the_differences_listed():
    """Positions, names, defaults; what docs/differences.md lists is all that differs, and does differ."""
    signatures = published_signatures()
    assert len(signatures) == 72
    differing = {name: how for name, published in signatures.items() if (how := difference(name, published))}
    section = (ROOT / "docs/differences.md").read_text().partition("\n## Signatures\n")[2].partition("\n## ")[0]
    first_cells = [line.split("|")[1] for line in section.splitlines() if line.startswith("|")]
    listed = set(re.findall(r"`(dm_[\w.]+)`", " ".join(first_cells)))
    assert {name: how for name, how in differing.items() if name not in listed} == {}
    assert listed - set(differing) == set()


def test_the_published_signatures_are_those_of_the_specification(spec):
    def flat(names, outer=""):
        for name, value in names.items():
            yield from flat(value, f"{outer}{name}.") if isinstance(value, dict) else [(f"{outer}{name}", value)]

    specified = json.loads((spec / "api.json").read_text())
    assert {module: dict(flat(names)) for module, names in specified.items()} == json.loads(SIGNATURES.read_text())
