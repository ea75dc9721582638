"""Options of the command line for limits that are declared as dataclasses."""

from __future__ import annotations

import argparse
from collections.abc import Mapping


def add_options(group: argparse._ArgumentGroup, defaults: Mapping[str, float | None], texts: Mapping[str, str]) -> None:
    """Add an option for each limit, with its default in the help.

    Args:
        group: Where they are added.
        defaults: Default values by the limits' names; seconds are floats.
        texts: Help by the limits' names.
    """
    for name, default in defaults.items():
        group.add_argument(
            f"--{name.replace('_', '-')}",
            type=float if isinstance(default, float) else int,
            default=default,
            help=f"{texts[name]} (default: {default})",
        )
