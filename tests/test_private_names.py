"""What is used of others' packages beyond their public interface: documented, and still what it was written for.

docs/architecture.md lists it. A private name that the code uses and the list lacks fails here, one that the list has
and the code does not use too, and so does one whose parameters are others than they were.
"""

import ast
import importlib
import inspect
import json
import re
from pathlib import Path

import pytest
import vllm

ROOT = Path(__file__).parent.parent
FOLDERS = {
    "casa_engine": ROOT,
    "casa_vllm": ROOT / "plugins",
    "casa_serving": ROOT / "serving",
    "casa_export": ROOT / "export",
    "casa_commands": ROOT,
}
# Packages whose classes ours build on.
BASES = ("vllm", "ray", "transformers", "uvicorn", "starlette", "prometheus_client")
# The version for which the parameters below were read; with others only the names are compared.
VLLM = "0.29.0"
ROW = re.compile(r"\| `([\w.]+)` \|")
# Python's own.
STANDARD = {"_exit", "_ArgumentGroup"}
# Parameters of what is overridden or called, by its name in the list.
PARAMETERS = json.loads((Path(__file__).parent / "private_names.json").read_text())


def documented() -> list[str]:
    """Return the list's names, dotted."""
    text = (ROOT / "docs" / "architecture.md").read_text()
    return ROW.findall(text.partition("## Private names")[2].partition("Fields of vLLM's")[0])


def sources() -> dict[str, ast.Module]:
    """Return the syntax trees by module."""
    return {
        ".".join(path.relative_to(folder).with_suffix("").parts): ast.parse(path.read_text())
        for room, folder in FOLDERS.items()
        for path in sorted((folder / room).rglob("*.py"))
    }


def is_private(name: str) -> bool:
    """Return whether a name begins with one underscore."""
    return name.startswith("_") and not name.startswith("__")


def own_names(tree: ast.Module) -> set[str]:
    """Return every private name that a module defines, or assigns to `self`."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_of_self(node):
            names.add(node.attr)
    return {name for name in names if is_private(name)}


def is_of_self(node: ast.Attribute) -> bool:
    """Return whether an attribute is one of the object itself."""
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def overridden_names(modules: list[str]) -> set[str]:
    """Return the private names that a class of ours shares with a base of others: methods in their place."""
    names = set()
    for module in modules:
        for kind in vars(importlib.import_module(module)).values():
            if not (inspect.isclass(kind) and kind.__module__ == module):
                continue
            own = [base for base in kind.__mro__ if base.__module__.startswith("casa_")]
            others = [base for base in kind.__mro__ if base.__module__.startswith(BASES)]
            names |= {
                name
                for name in {name for base in own for name in vars(base)}
                if is_private(name) and any(name in vars(base) for base in others)
            }
    return names - {"_abc_impl", "_is_protocol", "_is_runtime_protocol"}


def used_names(trees: dict[str, ast.Module]) -> set[str]:
    """Return every private name of others that modules use."""
    names = set()
    rooms = {room: set() for room in FOLDERS}
    for name, tree in trees.items():
        rooms[name.partition(".")[0]] |= own_names(tree)
    for name, tree in trees.items():
        module_own = own_names(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and is_private(node.attr):
                is_super = isinstance(node.value, ast.Call) and getattr(node.value.func, "id", "") == "super"
                # A class may be put together from several modules of ours.
                if is_super or node.attr not in (rooms[name.partition(".")[0]] if is_of_self(node) else module_own):
                    names.add(node.attr)
            elif isinstance(node, ast.ImportFrom) and "._" in node.module:
                names |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                names |= {alias.name for alias in node.names if is_private(alias.name)}
    return names - STANDARD


def find(name: str) -> tuple[object, str]:
    """Return what holds a dotted name's last part, and that part."""
    parts = name.split(".")
    for end in range(len(parts) - 1, 0, -1):
        try:
            holder = importlib.import_module(".".join(parts[:end]))
        except ModuleNotFoundError:
            continue
        for part in parts[end:-1]:
            holder = getattr(holder, part)
        return holder, parts[-1]
    raise AssertionError(f"{name}: no such module")


def test_the_list_is_what_the_code_uses():
    names = [name.rpartition(".")[2] for name in documented()]
    assert len(names) == len(set(names))
    trees = sources()
    # Not those that need a GPU's compiler, or build a cluster's application.
    imported = [name for name in trees if not name.endswith(("triton_window_attention", ".embedded"))]
    assert set(names) == used_names(trees) | overridden_names(imported)
    assert PARAMETERS.keys() <= set(documented())


@pytest.mark.parametrize("name", documented())
def test_a_name_is_what_it_was(name):
    holder, last = find(name)
    if hasattr(holder, last):
        found = getattr(holder, last)
        if inspect.isroutine(found) and vllm.__version__.startswith(VLLM):
            assert list(inspect.signature(found).parameters) == PARAMETERS[name]
        return
    # Of objects, not of their class: somebody assigns it there.
    written = "".join(
        inspect.getsource(kind) for kind in holder.__mro__ if kind.__module__ not in ("builtins", "typing")
    )
    assert re.search(rf"self\.{last}\b", written)


ANOTHER = """
from vllm._core import thing
from vllm.core import _function, public

class A(Base):
    def f(self, other):
        self._own = other._of_another
        return self._inherited()

    def _overridden(self):
        return super()._overridden()
"""


def test_another_name_would_be_found():
    tree = ast.parse(ANOTHER)
    assert own_names(tree) == {"_own", "_overridden"}
    found = used_names({"casa_vllm.mine": tree})
    assert found == {"thing", "_function", "_of_another", "_inherited", "_overridden"}
    with pytest.raises(AssertionError, match="no such module"):
        find("no_such_package.Name._x")
