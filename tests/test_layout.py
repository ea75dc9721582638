"""The rooms of the repository: what may be imported, and who may import whom."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

ROOT = Path(__file__).parent.parent
ROOMS = {
    "casa_engine": ROOT / "casa_engine",
    "casa_digits": ROOT / "models" / "casa_digits",
    "casa_vllm": ROOT / "plugins" / "casa_vllm",
    "casa_export": ROOT / "export" / "casa_export",
    "casa_serving": ROOT / "serving" / "casa_serving",
    "casa_bench": ROOT / "benchmarks" / "casa_bench",
    "casa_eval": ROOT / "benchmarks" / "casa_eval",
    # The roof: console scripts. It may import every room, and no room imports it.
    "casa_commands": ROOT / "casa_commands",
}
# What a room may use beside itself: rooms, or one module of a room.
ALLOWED = {
    "casa_engine": set(),
    "casa_digits": {"casa_engine"},
    "casa_vllm": {"casa_engine"},
    "casa_export": {"casa_engine"},
    "casa_serving": {"casa_engine", "casa_vllm.api"},
    "casa_bench": {"casa_engine", "casa_serving"},
    "casa_eval": {"casa_engine", "casa_serving", "casa_bench"},
    "casa_commands": set(ROOMS),
}
# Inside serving, from the ground up: each part and the parts that it may use.
GROUND = {"engine_defaults", "engine_environment", "errors", "exit_status", "options"}
SERVING = {
    "engine_environment": set(),
    "engine_defaults": {"engine_environment"},
    "errors": set(),
    "exit_status": set(),
    "options": set(),
    "drain": GROUND,
    "endpoint": GROUND | {"drain"},
    "live": GROUND | {"drain", "endpoint"},
    "caption": GROUND | {"endpoint", "live"},
    "cluster": GROUND | {"drain", "endpoint", "live"},
    "early_engine": {"engine_environment"},
    "cli": GROUND | {"drain", "early_engine", "endpoint", "live", "cluster"},
    "serve": {"early_engine", "exit_status", "cli"},
}
# What plain `pip install casa-engine` brings, as imported; the rest is Python's own.
CORE_PACKAGES = {"torch", "transformers", "tokenizers", "safetensors", "numpy", "PIL", "jinja2"}


def module_name(path: Path, room: str) -> str:
    """Return the dotted name of a file of a room."""
    parts = path.relative_to(ROOMS[room].parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def modules() -> dict[str, Path]:
    """Return every module of every room by its dotted name."""
    return {module_name(path, room): path for room in ROOMS for path in sorted(ROOMS[room].rglob("*.py"))}


def imported_names(path: Path) -> set[str]:
    """Return what a file imports, also inside functions, and what its strings name: "package.module:Class"."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and " " not in node.value.strip():
            names.add(node.value.strip().replace(":", "."))
    return names


def used_modules(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of ours that a file uses; a name inside a module or an `__init__` stands for it."""
    used = set()
    for name in imported_names(path):
        while name and name not in known:
            name = name.rpartition(".")[0]
        used.add(name)
    return used - {""}


KNOWN = modules()
USED = {name: used_modules(path, KNOWN) - {name} for name, path in KNOWN.items()}


def is_part_of(name: str, whole: str) -> bool:
    """Return whether a module is a package, or inside it."""
    return name == whole or name.startswith(f"{whole}.")


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_exist_and_import_only_what_is_below_them(room):
    own = {name: used for name, used in USED.items() if is_part_of(name, room)}
    assert len(own) > 1, f"{ROOMS[room]} is missing"
    allowed = ALLOWED[room] | {room}
    wrong = {
        name: sorted(bad)
        for name, used in own.items()
        if (bad := {other for other in used if not any(is_part_of(other, each) for each in allowed)})
    }
    assert not wrong


def part_of_serving(name: str) -> str:
    """Return the part of serving that a module belongs to, "" where it is none of serving's or the package itself."""
    return name.partition("casa_serving.")[2].partition(".")[0]


def test_parts_of_serving_import_only_what_is_below_them():
    own = {name: part for name in KNOWN if (part := part_of_serving(name))}
    assert set(own.values()) == set(SERVING)
    wrong = {
        name: sorted(bad)
        for name, part in own.items()
        if (bad := {other for other in USED[name] if part_of_serving(other) not in SERVING[part] | {part, ""}})
    }
    assert not wrong


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Return the groups of modules that import one another, directly or not."""
    reachable: dict[str, set[str]] = {}
    for start in graph:
        seen: set[str] = set()
        open_names = [start]
        while open_names:
            for other in graph.get(open_names.pop(), set()) - seen:
                seen.add(other)
                open_names.append(other)
        reachable[start] = seen
    groups = {
        tuple(sorted(other for other in seen if name in reachable.get(other, set())))
        for name, seen in reachable.items()
        if name in seen
    }
    return [list(group) for group in sorted(groups)]


def test_no_circle_of_imports():
    assert circles(USED) == []


def test_versions_of_vllm_are_compared_in_one_file():
    rooms = {name: path for name, path in KNOWN.items() if name.startswith(("casa_vllm.", "casa_serving."))}
    comparing = {
        name
        for name, path in rooms.items()
        if "packaging.version.Version" in imported_names(path) or "vllm.__version__" in path.read_text()
    }
    assert comparing == {"casa_vllm.compat"}


def test_the_checks_see_what_they_should(tmp_path):
    source = tmp_path / "module.py"
    source.write_text(
        "import os\ndef f():\n    from casa_vllm.ops import window_attention\n    import casa_engine.rope\n"
        'PROCESSOR = "casa_vllm.caption_processor:CaptionLogitsProcessor"\nTEXT = "see casa_vllm.model for more"\n'
    )
    assert used_modules(source, KNOWN) == {
        "casa_vllm.ops.window_attention",
        "casa_engine.rope",
        "casa_vllm.caption_processor",
    }
    # A name out of a package's `__init__` beside one of its modules.
    lines = ("from casa_serving.cluster import build_app, tenancy", "from casa_serving.cluster.live import proxy")
    source.write_text("\n".join(lines))
    assert used_modules(source, KNOWN) == {
        "casa_serving.cluster",
        "casa_serving.cluster.tenancy",
        "casa_serving.cluster.live.proxy",
    }
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]


def test_the_core_needs_only_its_own_packages():
    own = sys.stdlib_module_names | CORE_PACKAGES | {"casa_engine"}
    wrong = {}
    for name, path in KNOWN.items():
        if is_part_of(name, "casa_engine"):
            imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Import)]
            from_imports = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.ImportFrom)]
            names = {alias.name for node in imports for alias in node.names} | {node.module for node in from_imports}
            if bad := {each.partition(".")[0] for each in names} - own:
                wrong[name] = sorted(bad)
    assert not wrong


@pytest.mark.parametrize("name", ["models", "plugins", "serving", "export", "benchmarks"])
def test_bare_names_cannot_be_imported(name):
    code = f"import {name}"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError" in run.stderr
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        __import__(name)


@pytest.mark.parametrize("room", ROOMS)
def test_rooms_are_imported_from_the_checkout(room):
    code = f"import {room}; print({room}.__file__)"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    assert Path(run.stdout.strip()).is_relative_to(ROOT)


def test_every_script_and_entry_point_names_a_file():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    targets = [*project["scripts"].values()]
    for group in project["entry-points"].values():
        targets += group.values()
    for target in targets:
        assert target.partition(":")[0] in KNOWN, target
