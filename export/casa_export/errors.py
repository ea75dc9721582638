"""Errors of the export, below `casa_engine`'s tree."""

from casa_engine.errors import CasaError


class ExportError(CasaError, RuntimeError):
    """A model that cannot be exported, or whose exported graphs differ from the eager model."""


class ManifestError(CasaError, ValueError):
    """A folder of exported graphs that is incomplete, damaged or of another version."""


class RunnerError(CasaError, RuntimeError):
    """Exported graphs or engines that cannot run on this machine."""
