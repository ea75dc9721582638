"""casa-engine's core: the CASA model itself. Importing it registers CASA with transformers' Auto classes."""

import logging
from importlib.metadata import version

from casa_engine.configuration import CasaConfig
from casa_engine.registration import register_auto_classes

register_auto_classes()

# A level of its own: what vLLM's server imports raises the root's to ERROR, and users must read what was chosen.
logging.getLogger(__name__).setLevel(logging.WARNING)

__all__ = ["CasaConfig"]


def __getattr__(name: str) -> str:
    """Return `__version__`, as in pyproject.toml; looked up on demand, since a bare folder has no metadata."""
    if name == "__version__":
        return version("casa-engine")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
