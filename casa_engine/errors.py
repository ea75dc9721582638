"""The error tree. Every message says what is wrong, what was got, what was expected and how to fix it."""


class CasaError(Exception):
    """Base class of all errors that casa-engine raises on purpose."""


class ConfigError(CasaError, ValueError):
    """A model configuration that cannot be built."""


class CheckpointError(CasaError, ValueError):
    """A checkpoint folder that does not contain the model it describes."""


class InputError(CasaError, ValueError):
    """A prompt, message or image that the model cannot take."""


class OutputError(CasaError, RuntimeError):
    """A folder or file that cannot be written; what was there is as before."""
