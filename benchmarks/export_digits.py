"""The chats of the digits test through an exported model: `python benchmarks/export_digits.py FOLDER [--scale 1.0]`.

FOLDER is what `casa-export FOLDER` wrote of the embedded model.
"""

import argparse
import sys
from pathlib import Path

from casa_digits.cases import draw_suites
from casa_digits.evaluate import Report, run_suites
from casa_digits.runners import EagerRunner
from casa_engine.checkpoints import load_processor
from casa_export.exported_model import ExportedModel


class ExportedRunner(EagerRunner):
    """The evaluation's runner with an exported model in the eager one's place."""

    def __init__(self, folder: Path, device: str) -> None:
        self.model, self.processor = ExportedModel.load(folder, device), load_processor(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--scale", type=float, default=1.0)
    options = parser.parse_args()
    runner = ExportedRunner(options.folder, options.device)
    report = Report(run_suites(runner, draw_suites(0, options.scale)))
    print(report.table())
    return 0 if report.passed else 1


if __name__ == "__main__":
    sys.exit(main())
