"""The engine's counters, from its process to the servers', in memory-mapped files of prometheus_client's format.

vLLM sends `SchedulerStats` after every step, without a field for plugins. The scheduler writes its counters into two
files instead, one of counters and one of gauges:

    one API server    in a folder of the engine's own, named by its instance, from which the server maps them
    several           in PROMETHEUS_MULTIPROC_DIR, from which any of them answers for all processes

The server removes the folder as soon as it has the files, so that nothing is left of processes that are killed. An
engine without one removes its folder at its end; that of an engine that was killed while it started is removed by the
next one: an engine locks its folder, and the kernel unlocks it however the engine ends.
"""

import fcntl
import os
import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from prometheus_client.mmap_dict import MmapedDict, mmap_key
from vllm import envs

from casa_engine.errors import ConfigError
from casa_vllm.metric_names import COUNTERS, GAUGES, LABELS, PREFIX, metric_labels

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# The kinds of files in prometheus_client's multi-process mode, and their metrics.
KINDS = {"counter": COUNTERS, "gauge_mostrecent": GAUGES}
# For so long a folder without its name may not be locked yet.
UNLOCKED_S = 60
# Several times what the keys need.
FILE_BYTES = 16_384


class EngineCounters:
    """Writes the counters of one engine; all are 0 at first.

    Args:
        vllm_config: The engine's.

    Raises:
        ConfigError: Something else has the name of the engine's folder, or there is no space.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        self._keys = metric_keys(vllm_config)
        self._remove: Callable[[], object] | None = None
        shared = shared_folder()
        if shared is not None:
            try:
                self._files = create_files(shared, vllm_config)
            except OSError as error:
                raise ConfigError(
                    f"The engine's counters need new files in PROMETHEUS_MULTIPROC_DIR, {str(shared)!r}, got: "
                    f"{error.strerror}. Let it be an empty folder of this user's with free space."
                ) from error
        else:
            self._files, lock = create_folder(vllm_config)
            self._remove = weakref.finalize(self, remove_folder, engine_folder(vllm_config), lock, os.getpid())
        self.write(dict.fromkeys([*COUNTERS, *GAUGES], 0))

    def write(self, values: Mapping[str, int]) -> None:
        """Write the current values by name."""
        now = time.time()
        for kind, keys in self._keys.items():
            for name, key in keys.items():
                self._files[kind].write_value(key, values[name], now)

    def close(self) -> None:
        """Remove the engine's own folder; files in PROMETHEUS_MULTIPROC_DIR stay, as all there do. Idempotent."""
        if self._remove is not None:
            self._remove()


class EngineCountersReader:
    """Reads what `EngineCounters` writes into its own folder, which is removed; the engine has started.

    Args:
        vllm_config: The engine's, which it was started with.

    Raises:
        FileNotFoundError: No such engine runs on this machine, or it has a reader.
    """

    def __init__(self, vllm_config: "VllmConfig") -> None:
        folder = engine_folder(vllm_config)
        self._files = [MmapedDict(file_path(folder, kind, vllm_config), read_mode=True) for kind in KINDS]
        shutil.rmtree(folder)
        self._names = {key: name for keys in metric_keys(vllm_config).values() for name, key in keys.items()}

    def read(self) -> dict[str, int]:
        """Return the current values by name."""
        return {self._names[key]: int(value) for file in self._files for key, value, _ in file.read_all_values()}


def metric_keys(vllm_config: "VllmConfig") -> dict[str, dict[str, str]]:
    """Return the keys in the files, by kind and name."""
    labels = metric_labels(vllm_config)
    suffix = {"counter": "_total", "gauge_mostrecent": ""}
    return {
        kind: {
            name: mmap_key(PREFIX + name, PREFIX + name + suffix[kind], LABELS, labels, text)
            for name, text in names.items()
        }
        for kind, names in KINDS.items()
    }


def shared_folder() -> Path | None:
    """Return prometheus_client's folder for several processes, or None."""
    folder = os.environ.get("PROMETHEUS_MULTIPROC_DIR")
    return Path(folder) if folder else None


def folder_prefix() -> str:
    """Return what the names of this user's engines' folders begin with."""
    return f"casa-engine-counters-{os.geteuid()}-"


def engine_folder(vllm_config: "VllmConfig") -> Path:
    """Return the folder of an engine, beside the sockets of vLLM's processes."""
    return Path(envs.VLLM_RPC_BASE_PATH) / f"{folder_prefix()}{vllm_config.instance_id}"


def file_path(folder: Path, kind: str, vllm_config: "VllmConfig") -> Path:
    """Return one of an engine's files."""
    return folder / f"{kind}_{vllm_config.instance_id}.db"


def create_folder(vllm_config: "VllmConfig") -> tuple[dict[str, MmapedDict], int]:
    """Create an engine's folder and its files; return them by kind, and the descriptor that locks the folder."""
    folder = engine_folder(vllm_config)
    remove_stale_folders(folder.parent)
    unnamed = None
    try:
        # It gets its name when it is locked, so that no engine takes it for a stale one.
        unnamed = Path(tempfile.mkdtemp(prefix=f".{folder_prefix()}", dir=folder.parent))
        lock = os.open(unnamed, os.O_RDONLY | os.O_DIRECTORY)
        fcntl.flock(lock, fcntl.LOCK_EX)
        files = create_files(unnamed, vllm_config)
        unnamed.rename(folder)
    except OSError as error:
        if unnamed is not None:
            shutil.rmtree(unnamed, ignore_errors=True)
        raise ConfigError(
            f"The engine's counters need a new folder {str(folder)!r}, got: {error.strerror}. Remove what is there, "
            "free some space, or set VLLM_RPC_BASE_PATH to another folder."
        ) from error
    return files, lock


def create_files(folder: Path, vllm_config: "VllmConfig") -> dict[str, MmapedDict]:
    """Create an engine's files, which this user alone can read; return them by kind."""
    files = {}
    for kind in KINDS:
        path = file_path(folder, kind, vllm_config)
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            # A mapped page without space on the disk would kill the engine when it is written.
            os.posix_fallocate(file, 0, FILE_BYTES)
        finally:
            os.close(file)
        files[kind] = MmapedDict(path)
    return files


def remove_folder(folder: Path, lock: int, owner: int) -> None:
    """Remove an engine's folder and unlock it, unless this is a forked child of the `owner`."""
    if os.getpid() == owner:
        shutil.rmtree(folder, ignore_errors=True)
        os.close(lock)


def remove_stale_folders(parent: Path) -> None:
    """Remove the folders of this user's engines that were killed."""
    unnamed = parent.glob(f".{folder_prefix()}*")
    for folder in [*parent.glob(f"{folder_prefix()}*"), *unnamed]:
        try:
            lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
        except OSError:  # A link, a file, or removed meanwhile.
            continue
        try:
            if folder.name.startswith(".") and time.time() - os.fstat(lock).st_mtime < UNLOCKED_S:
                continue  # Another engine makes it just now.
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except BlockingIOError:  # Its engine lives.
            pass
        finally:
            os.close(lock)
