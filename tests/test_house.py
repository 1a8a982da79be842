"""The layout of the package holds: no import circle, arrows point down, and no module stands outside a room."""

from __future__ import annotations

import ast
import itertools
from pathlib import Path

import gptqmodel_eora_ext

ROOT = Path(gptqmodel_eora_ext.__file__).parent
PACKAGE = ROOT.name
# From the ground up; a room imports from those below it, and from others on its own floor but not the other way round.
FLOORS = (
    ("system",),
    ("formats",),
    ("solve", "capture", "calibration"),
    ("kernels",),
    ("adapter",),
    ("plan",),
    ("loop", "refine"),
    ("hosts",),
    ("evaluate",),
    ("cli",),
)
FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
# What stands at the package's top, outside any room.
TOP = {"__init__", "_version", "autoload"}
HOSTS = {"gptqmodel", "auto_round", "vllm"}
# Their rooms.
FOLDERS = ("gptqmodel", "autoround", "llamacpp", "vllm")
# Rooms of tensors, which know no model: what they may not import besides.
WITHOUT_LIBRARIES = ("system", "formats", "capture", "solve", "kernels")
LIBRARIES = {*HOSTS, "transformers", "peft", "datasets"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {module_name(path): path for path in sorted(ROOT.rglob("*.py"))}


def imports(name: str) -> set[str]:
    """Modules that a module imports anywhere in it, for types alone left out; a package where it is asked for names."""
    path = FILES[name]
    package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for_types = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)
        for inner in ast.walk(node)
    }
    found: set[str] = set()
    for node in ast.walk(tree):
        if id(node) in for_types:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*base, *([node.module] if node.module else [])])
            found |= {full if (full := f"{source}.{alias.name}") in FILES else source for alias in node.names}
    return found - {name}


GRAPH = {name: imports(name) for name in FILES}


def room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


def test_no_import_circle() -> None:
    """Imports inside functions count; a package's face that gathers its own modules counts as well."""

    def reached(start: str) -> set[str]:
        seen: set[str] = set()
        ahead = [start]
        while ahead:
            for following in GRAPH[ahead.pop()] & set(FILES):
                if following not in seen:
                    seen.add(following)
                    ahead.append(following)
        return seen

    assert sorted(name for name in FILES if name in reached(name)) == []


def test_every_module_has_a_room() -> None:
    assert {path.stem for path in ROOT.glob("*.py")} == TOP
    assert {room(name) for name in FILES if "." in name} - TOP == set(FLOOR_OF)


def test_arrows_point_down() -> None:
    upwards = [
        f"{name} → {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if room(name) in FLOOR_OF and room(imported) in FLOOR_OF and imported.startswith(f"{PACKAGE}.")
        and FLOOR_OF[room(imported)] > FLOOR_OF[room(name)]
    ]  # fmt: skip
    assert upwards == []


def test_rooms_of_one_floor_meet_at_their_faces() -> None:
    inside = [
        f"{name} → {imported}"
        for name, found in GRAPH.items()
        for imported in found & set(FILES)
        if room(name) in FLOOR_OF and room(imported) in FLOOR_OF and room(name) != room(imported)
        and FLOOR_OF[room(name)] == FLOOR_OF[room(imported)] and imported.count(".") > 1
    ]  # fmt: skip
    assert inside == []


def test_hosts_are_imported_in_their_room_alone() -> None:
    strangers = [
        f"{name} → {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if imported.split(".")[0] in HOSTS and room(name) != "hosts"
    ]
    assert strangers == []


def test_commands_and_evaluation_name_no_host() -> None:
    named = [
        f"{name} → {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if room(name) in ("cli", "evaluate")
        and imported.startswith(tuple(f"{PACKAGE}.hosts.{host}" for host in FOLDERS))
    ]  # fmt: skip
    assert named == []


def test_hosts_do_not_import_each_other() -> None:
    crossed = [
        f"{name} → {imported}"
        for name, found in GRAPH.items()
        for imported in found
        for one, other in itertools.permutations(FOLDERS, 2)
        if name.startswith(f"{PACKAGE}.hosts.{one}") and imported.startswith(f"{PACKAGE}.hosts.{other}")
    ]
    assert crossed == []


def test_rooms_of_tensors_know_no_model() -> None:
    strangers = [
        f"{name} → {imported}"
        for name, found in GRAPH.items()
        for imported in found
        if room(name) in WITHOUT_LIBRARIES and imported.split(".")[0] in LIBRARIES
    ]
    assert strangers == []
