"""The two TensorRT packages behind one name: `tensorrt` (data centre) and `tensorrt_rtx` (TensorRT for RTX).

Their Python interfaces agree in all that is used here. What differs: `tensorrt` builds for the GPU of this machine;
`tensorrt_rtx` also builds without a GPU, for the compute capabilities given to it.
"""

import importlib
from types import ModuleType

from casa_export.errors import RunnerError

PACKAGES = ("tensorrt", "tensorrt_rtx")
INSTALL = {
    "tensorrt": "pip install tensorrt (NVIDIA's own index has its libraries)",
    "tensorrt_rtx": "pip install 'casa-engine[trt]'",
}


def load_tensorrt(package: str) -> ModuleType:
    """Import a TensorRT package.

    Args:
        package: One of `PACKAGES`, or `auto` for the first that is installed.

    Raises:
        RunnerError: It is not installed.
    """
    if package != "auto" and package not in PACKAGES:
        raise RunnerError(f"TensorRT package is {package!r}; expected auto or one of {', '.join(PACKAGES)}.")
    names = PACKAGES if package == "auto" else (package,)
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            missing = error
    ways = " or ".join(INSTALL[name] for name in names)
    raise RunnerError(f"no TensorRT: {' and '.join(names)} not installed. Install it: {ways}.") from missing


class CollectingLogger:
    """TensorRT's logger: keeps error messages, for the exception that follows them, and drops the rest."""

    def __new__(cls, trt: ModuleType):
        """Return an instance of the package's own logger class."""

        class Logger(trt.ILogger):
            def __init__(self) -> None:
                trt.ILogger.__init__(self)
                self.errors: list[str] = []

            def log(self, severity, message: str) -> None:
                if severity <= trt.ILogger.Severity.ERROR:
                    self.errors.append(message)

        return Logger()
