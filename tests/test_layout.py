"""The rooms of the repository: what may be imported, and who may import whom."""

import ast
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = {
    "casa_engine": ROOT / "casa_engine",
    "casa_digits": ROOT / "models" / "casa_digits",
    "casa_vllm": ROOT / "plugins" / "casa_vllm",
    "casa_export": ROOT / "export" / "casa_export",
    "casa_serving": ROOT / "serving" / "casa_serving",
    # The roof: console scripts. It may import every room, and no room imports it.
    "casa_commands": ROOT / "casa_commands",
}
EXISTING = sorted(name for name, folder in ROOMS.items() if folder.is_dir())


def imported_names(path: Path) -> set[str]:
    """Returns the top-level packages that a file imports, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add((node.module or "").partition(".")[0])
    return names


@pytest.mark.parametrize("room", EXISTING)
def test_imports_point_one_way(room):
    allowed = set(ROOMS) if room == "casa_commands" else {room, "casa_engine"}
    wrong = {
        str(path.relative_to(ROOT)): sorted(used)
        for path in ROOMS[room].rglob("*.py")
        if (used := (imported_names(path) & ROOMS.keys()) - allowed)
    }
    assert not wrong


def test_the_check_of_imports_sees_what_it_should(tmp_path):
    source = tmp_path / "module.py"
    source.write_text("import os\ndef f():\n    from casa_vllm.ops import x\n    import casa_engine.rope\n")
    assert imported_names(source) == {"os", "casa_vllm", "casa_engine"}


@pytest.mark.parametrize("name", ["plugins", "serving", "export"])
def test_bare_names_cannot_be_imported(name):
    code = f"import {name}"
    run = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True)
    assert "ModuleNotFoundError" in run.stderr
    assert name not in sys.modules
    with pytest.raises(ModuleNotFoundError):
        __import__(name)


@pytest.mark.parametrize("room", EXISTING)
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
        module = target.partition(":")[0].split(".")
        base = ROOMS[module[0]].parent.joinpath(*module)
        assert base.with_suffix(".py").is_file() or (base / "__init__.py").is_file(), target
