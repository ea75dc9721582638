"""What a stranger reads first is true: README, CONTRIBUTING, SECURITY, the pages of messages, changes and citation."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

from casa_engine.backbones import BACKBONES
from casa_engine.configuration import FUSIONS
from markdown_pages import prose

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
# A path of the repository between backticks, alone: a file, or a folder that ends in a slash.
PATH = re.compile(r"`((?:[\w.-]+/)+[\w.*-]*|[A-Z]+\.(?:md|cff)|Makefile|pyproject\.toml)`")


def test_links_of_the_readme_work_where_nothing_lies_beside_it():
    """A package index shows the page alone; this project has no public address that links could begin with."""
    links = re.findall(r"\]\(([^)]+)\)", prose(ROOT / "README.md")) + re.findall(r"(?:src|href)=\"([^\"]+)\"", README)
    assert len(links) >= 3
    assert [link for link in links if not link.startswith("https://")] == []


# Pages that name files by their paths; links of all pages are followed in tests/serving/test_docs.py.
@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        "CONTRIBUTING.md",
        "CHANGELOG.md",
        "docs/benchmarks.md",
        "docs/cluster.md",
        "docs/deploy.md",
        "docs/live.md",
        "docs/quickstart.md",
    ],
)
def test_every_file_that_is_named_exists(name):
    paths = PATH.findall(prose(ROOT / name))
    assert paths
    for path in paths:
        assert path == "docs/..." or list(ROOT.glob(path)), path


def test_every_page_is_listed():
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    table = (ROOT / "docs" / "README.md").read_text()
    assert set(re.findall(r"^\| \[[^]]+\]\((\w+\.md)\)", table, re.MULTILINE)) == pages


def test_the_matrix_has_every_fusion_over_every_backbone():
    rows = re.findall(r"^\| `(\w+)` \| ([^|]+) \|((?: [^|]+ \|){6})$", README, re.MULTILINE)
    assert {fusion for fusion, _, _ in rows} == set(FUSIONS)
    backbones = {backbone for _, backbone, _ in rows}
    assert len(backbones) == len(BACKBONES)
    assert len({row[:2] for row in rows}) == len(rows) == len(FUSIONS) * len(BACKBONES)
    for fusion, _, cells in rows:
        words = [cell.strip() for cell in cells.split("|")[:-1]]
        assert set(words) <= {"tested", "not tested", "not run", "not run (a)", "built, not run (b)", "no"}
        # casa-export refuses token insertion.
        assert (words[4:] == ["no", "no"]) == (fusion == "insertion")


def test_the_readmes_python_runs():
    (program,) = re.findall(r"^```python run\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    assert len([line for line in program.splitlines() if line]) <= 12
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "0 7 0 9\n"


def test_extras_of_the_readme_are_those_of_the_project():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    table = README.partition("| extra | brings |")[2].partition("\n\n")[0]
    named = re.findall(r"`(\w+)`", " ".join(row.split("|")[1] for row in table.splitlines()[2:]))
    assert sorted(named) == sorted(extras)


def messages():
    """Return every text of the code and the set-up but its docstrings, with ... for what is filled in."""
    found = []
    for folder in ("casa_commands", "casa_engine", "models", "plugins", "export", "serving", "scripts"):
        for path in (ROOT / folder).rglob("*.py"):
            tree = ast.parse(path.read_text())
            docstrings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Expr)}
            for node in ast.walk(tree):
                if isinstance(node, ast.Constant) and isinstance(node.value, str) and node not in docstrings:
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                    found.append("".join(parts))
    return found


def test_the_messages_of_the_troubleshooting_page_are_the_codes():
    page = (ROOT / "docs" / "troubleshooting.md").read_text().partition("## Without a message")[0]
    quoted = re.findall(r"^\| `([^`]+)` \|", page, re.MULTILINE)
    assert len(quoted) >= 25
    known = messages()
    assert [text for text in quoted if not any(text in message for message in known)] == []


def test_the_version_is_cited_and_its_changes_are_told():
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert cited["version"] == VERSION
    assert cited["preferred-citation"]["url"].endswith("2512.19535")
    changes = (ROOT / "CHANGELOG.md").read_text()
    assert re.search(rf"^## \[{re.escape(VERSION)}\] - \d{{4}}-\d\d-\d\d$", changes, re.MULTILINE) or (
        "## [Unreleased]" in changes and f"{VERSION} is the version in the making" in changes
    )
    kinds = re.findall(r"^### (\w+)", changes, re.MULTILINE)
    assert kinds
    assert set(kinds) <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
