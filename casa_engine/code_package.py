"""Packages: checkpoints with the model's code, for transformers where casa-engine is not installed.

    checkpoint --> package:  weights, tokenizer, ...   as they are
                             config.json, processor_config.json   with `auto_map`, which names the code
                             *.py   the modules of this engine that model and processor need, importing one another

The code is this installation's own, written anew with each package: there is no second copy of it that could differ.
Loading a package runs that code, which its user allows with `trust_remote_code=True`; this engine itself never does
(`untrusted_folder.py`), and serves the checkpoint.
"""

import ast
import json
import re
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from transformers.utils import CONFIG_NAME, PROCESSOR_NAME

from casa_engine.checkpoint_folder import LIST_FILE, list_files, stage_checkpoint
from casa_engine.checkpoints import check_tensors, read_config
from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_object
from casa_engine.staged_folder import check_apart
from casa_engine.tensor_map import MAP_FILE
from casa_engine.untrusted_folder import check_link

SOURCES = Path(__file__).parent
MODEL = "modeling_casa.CasaForConditionalGeneration"
AUTO_MAPS = {
    CONFIG_NAME: {
        "AutoConfig": "configuration.CasaConfig",
        "AutoModel": MODEL,
        "AutoModelForCausalLM": MODEL,
        "AutoModelForImageTextToText": MODEL,
    },
    PROCESSOR_NAME: {"AutoProcessor": "processing_casa.CasaProcessor"},
}
OWN_IMPORT = re.compile(r"^(\s*)from casa_engine\.(\w+) import ", re.MULTILINE)
# In the place of `guarded_loading.py`, which refuses folders with code.
PLAIN_LOADING = '''"""transformers' own loading: whoever loads this folder has allowed its code."""


class GuardedConfig:
    """A configuration that is read as transformers does."""


class GuardedModel:
    """A model that is read as transformers does."""
'''
COPIED = (".safetensors", ".json", ".jinja", ".txt", ".model", ".md")
LEGAL = ("LICENSE", "NOTICE")
CARD = """\
---
library_name: transformers
pipeline_tag: image-text-to-text
---

# A CASA vision-language model

Images reach the text through cross-attention (arXiv 2512.19535). The code in this folder is that of {engine}; it needs
transformers 5.10 or newer, torch and Pillow.

```python
from transformers import AutoModelForImageTextToText, AutoProcessor

model = AutoModelForImageTextToText.from_pretrained("THIS FOLDER", trust_remote_code=True)
processor = AutoProcessor.from_pretrained("THIS FOLDER", trust_remote_code=True)
```
"""


def write_package(checkpoint: str | Path, output: str | Path) -> None:
    """Write a checkpoint with the model's code, as one transaction.

    Args:
        checkpoint: A folder in this engine's own form.
        output: The package, a folder of its own.

    Raises:
        CheckpointError: The checkpoint is not complete, is an original that is read in place, or has a link out of its
            folder in the place of a file.
        OutputError: The package cannot be written, its folder holds such files of others, or is the checkpoint's or
            within it; it is as before.
    """
    checkpoint = Path(checkpoint)
    check_apart(checkpoint, Path(output))
    check_tensors(checkpoint, read_config(checkpoint))
    if (checkpoint / MAP_FILE).exists():
        raise CheckpointError(f"{checkpoint} has weights of other names, by {MAP_FILE}; convert it first.")
    if not (checkpoint / PROCESSOR_NAME).is_file():
        raise CheckpointError(f"{checkpoint} has no {PROCESSOR_NAME}; expected model and processor in one folder.")
    files = [path for path in sorted(checkpoint.iterdir()) if _is_copied(path)]
    for path in files:
        check_link(checkpoint, path)
    with stage_checkpoint(output, sum(path.stat().st_size for path in files)) as staged:
        for path in files:
            shutil.copyfile(path, staged.path / path.name)
        for name, auto_map in AUTO_MAPS.items():
            content = read_object(checkpoint / name) | {"auto_map": auto_map}
            (staged.path / name).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        for name, source in package_sources().items():
            (staged.path / name).write_text(source)
        if not (checkpoint / "README.md").exists():
            (staged.path / "README.md").write_text(CARD.format(engine=_engine()))
        list_files(staged.path)
        staged.commit()


def package_sources() -> dict[str, str]:
    """Return the modules of model and processor by file name, each importing the others from beside it."""
    sources: dict[str, str] = {}
    pending = sorted({target.partition(".")[0] for auto_map in AUTO_MAPS.values() for target in auto_map.values()})
    while pending:
        name = pending.pop()
        if f"{name}.py" not in sources:
            source = PLAIN_LOADING if name == "guarded_loading" else (SOURCES / f"{name}.py").read_text()
            pending += _own_modules(source)
            header = f"# Of {_engine()}, written by casa-checkpoint package. SPDX-License-Identifier: Apache-2.0\n"
            sources[f"{name}.py"] = header + OWN_IMPORT.sub(r"\1from .\2 import ", source)
    return sources


def _is_copied(path: Path) -> bool:
    """Return whether a checkpoint's file goes into its package as it is."""
    return (path.suffix in COPIED or path.name in LEGAL) and path.name != LIST_FILE


def _own_modules(source: str) -> list[str]:
    """Return the modules of this engine that a module imports."""
    imports = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return [module.removeprefix("casa_engine.") for module in imports if module.startswith("casa_engine.")]


def _engine() -> str:
    """Return name and version of this installation; a bare folder of sources has no version."""
    try:
        return f"casa-engine {version('casa-engine')}"
    except PackageNotFoundError:
        return "casa-engine"
