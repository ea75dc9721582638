"""casa-engine's core: the CASA model itself. Importing it registers CASA with transformers' Auto classes."""

from importlib.metadata import version

from casa_engine.configuration import CasaConfig
from casa_engine.registration import register_auto_classes

register_auto_classes()

__all__ = ["CasaConfig"]


def __getattr__(name: str) -> str:
    """Return `__version__`, as in pyproject.toml; looked up on demand, since a bare folder has no metadata."""
    if name == "__version__":
        return version("casa-engine")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
