"""Where views lie: folders by which a checkpoint of another form is loaded without a second copy of its weights.

A view holds our config.json, tokenizer and processor, links to the weights, and a tensor map (`tensor_map.py`).
"""

import os
from pathlib import Path

from casa_engine.errors import OutputError


def view_root() -> Path:
    """The folder of all views: in the user's cache, as the XDG specification says.

    Raises:
        OutputError: The user has no home folder.
    """
    try:
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    except RuntimeError as error:
        raise OutputError(
            "there is no home folder for the small files by which a published checkpoint is loaded. Set XDG_CACHE_HOME "
            "to a folder that can be written, or convert the checkpoint."
        ) from error
    return Path(cache) / "casa-engine" / "views"


def is_view(folder: Path) -> bool:
    """Whether a folder is a view that we wrote."""
    try:
        root = os.path.realpath(view_root())
    except OutputError:
        return False
    return folder.is_dir() and os.path.dirname(os.path.realpath(folder)) == root and has_trusted_owner(folder)


def has_trusted_owner(folder: Path) -> bool:
    """Whether it is this user's or root's: in a cache that several share, anybody could have written a view."""
    return folder.stat().st_uid in (os.geteuid(), 0)
