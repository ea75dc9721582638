"""The table of docs/transformers.md: every row names a test, and every use that is tested has a row."""

import ast
import re
from pathlib import Path

import pytest

pytestmark = pytest.mark.unit

HERE = Path(__file__).parent
PAGE = HERE.parent.parent / "docs" / "transformers.md"
ROW = re.compile(r"^\| .* \| (?:works|refused)\b.*\| `(test_\w+)` \|$", re.MULTILINE)


def names_of_tests(path: Path) -> set[str]:
    """Return the names of a file's tests."""
    tree = ast.parse(path.read_text())
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


def test_rows_and_tests() -> None:
    rows = ROW.findall(PAGE.read_text())
    assert len(rows) == len(set(rows)) == PAGE.read_text().count("` |\n") > 20
    assert not set(rows) - {name for path in HERE.glob("test_*.py") for name in names_of_tests(path)}
    # The refusals of a call that works otherwise belong to its row.
    uses = names_of_tests(HERE / "test_transformers_uses.py") | names_of_tests(HERE / "test_training.py")
    assert uses - set(rows) == {"test_inputs_embeds_are_refused_where_they_mean_nothing"}
