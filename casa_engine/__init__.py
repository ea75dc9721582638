"""casa-engine's core: the CASA model itself. Importing it makes transformers' Auto classes know CASA."""

from casa_engine.configuration import CasaConfig
from casa_engine.registration import register_auto_classes

register_auto_classes()

__all__ = ["CasaConfig"]
