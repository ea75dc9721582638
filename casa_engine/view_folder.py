"""Where views lie: folders by which a checkpoint of another form is loaded without a second copy of its weights.

A view holds our config.json, tokenizer and processor, links to the weights, and a tensor map (`tensor_map.py`).
"""

import os
from pathlib import Path


def view_root() -> Path:
    """The folder of all views: in the user's cache, as the XDG specification says."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "casa-engine" / "views"


def is_view(folder: Path) -> bool:
    """Whether a folder is a view; only we write there."""
    return Path(os.path.realpath(folder)).parent == Path(os.path.realpath(view_root()))
