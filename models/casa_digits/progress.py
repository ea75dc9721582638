"""What a training run needs to go on after it was ended: `casa-train-digits --progress FILE`.

It is kept where a new pool of images begins, because all that is drawn from then on follows from the random generator.
"""

import time
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from casa_engine.atomic_files import write_atomically
from casa_engine.errors import InputError


class ProgressFile:
    """The progress of stages 2 to 6 in a file.

    Args:
        path: The file; its folder must exist.
        options: What the weights follow from, by name. A run goes on only with the same.

    Raises:
        InputError: There is such a file, but of a run with other options, or it is none.
    """

    def __init__(self, path: Path, options: dict[str, Any]) -> None:
        self.path, self.options = path, options
        self._found: dict[str, Any] | None = None
        self._started_s, self._minutes_before = time.monotonic(), 0.0
        if not path.exists():
            return
        try:
            # Plain values and tensors only: nothing in the file is run.
            self._found = torch.load(path, weights_only=True)
            begun, self._minutes_before = dict(self._found["options"]), float(self._found["minutes"])
        except Exception as error:
            raise InputError(f"{path} is no file of --progress: {error}. Name another.") from error
        others = [name for name in {**begun, **options} if begun.get(name) != options.get(name)]
        if others:
            raise InputError(f"{path} belongs to a run with another {', another '.join(others)}. Name another file.")

    @property
    def stage(self) -> str | None:
        """The stage to go on with (a course's name), or None: those before it are done."""
        return None if self._found is None else self._found["stage"]

    @property
    def minutes(self) -> float:
        """How long the run has taken so far, over all its parts; what a part did after its last `keep` is not in it."""
        return self._minutes_before + (time.monotonic() - self._started_s) / 60

    def remove(self) -> None:
        """Remove the file: the run is over, and the same command begins anew."""
        self.path.unlink(missing_ok=True)

    def keep(
        self,
        stage: str,
        step: int,
        trained: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        rng: np.random.Generator,
    ) -> None:
        """Write the progress of a stage before `step`; at every moment the file is whole."""
        generator = rng.bit_generator.state
        content = BytesIO()  # torch.save hides the reason when a disk is full
        torch.save(
            {
                "options": self.options,
                "minutes": self.minutes,
                "stage": stage,
                "step": step,
                "weights": trained.state_dict(),
                "optimizer": optimizer.state_dict(),
                "schedule": {name: value for name, value in schedule.state_dict().items() if name != "lr_lambdas"},
                # 128-bit numbers, which torch's plain loader does not take.
                "generator": {**generator, "state": {name: str(n) for name, n in generator["state"].items()}},
            },
            content,
        )
        write_atomically(self.path, content.getbuffer())

    def restore(
        self,
        stage: str,
        trained: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        schedule: torch.optim.lr_scheduler.LRScheduler,
        rng: np.random.Generator,
    ) -> int:
        """Set everything as it was kept; return the next step (0, and nothing set, where none of it was kept)."""
        if self._found is None or self.stage != stage:
            return 0
        found, self._found = self._found, None
        trained.load_state_dict(found["weights"])
        optimizer.load_state_dict(found["optimizer"])
        schedule.load_state_dict({**found["schedule"], "lr_lambdas": [None] * len(schedule.lr_lambdas)})
        generator = found["generator"]
        rng.bit_generator.state = {**generator, "state": {name: int(n) for name, n in generator["state"].items()}}
        return found["step"]
