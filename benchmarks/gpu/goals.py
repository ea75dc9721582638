"""What the measurements on one H200 are to show, each beside the row that shows it."""

import re
from collections.abc import Callable
from typing import Any

ONE_STREAM_TOKENS_PER_S = {"CASA-Helium1-VL-2B": 700, "CASA-Qwen2_5-VL-3B-LiveCC": 470}
# Of what the bandwidth allows, at 128 sequences.
FLOOR_SHARE = 0.6
FIRST_TOKEN_MS, FIRST_TOKEN_SIDE = 16, 896
SESSIONS, FLAT_RATIO = 192, 1.05


def one_stream(row: dict[str, Any]) -> float:
    """Return the longest step of one stream, in ms."""
    return 1e3 / ONE_STREAM_TOKENS_PER_S[re.split(r",| \(", row["case"])[0]]


def many_sequences(row: dict[str, Any]) -> float:
    """Return the longest step of the largest batch, in ms."""
    return row["floor"] / FLOOR_SHARE


# Also in another mode: "MODEL (compile)".
MODEL = rf"(?:{'|'.join(ONE_STREAM_TOKENS_PER_S)})(?: \(\S+\))?"
# What was measured, the case, and the goal with its direction.
GOALS: list[tuple[str, str, str, Callable[[dict[str, Any]], float]]] = [
    ("decode step", rf"{MODEL}, 1 sequences,", "<=", one_stream),
    ("decode step", rf"{MODEL}, 128 sequences,", "<=", many_sequences),
    ("first token", rf"{MODEL}, {FIRST_TOKEN_SIDE} px", "<=", lambda _: FIRST_TOKEN_MS),
    ("sessions within the bound", MODEL, ">=", lambda _: SESSIONS),
    ("ratio of both", MODEL, "<=", lambda _: FLAT_RATIO),
]


def goal(row: dict[str, Any]) -> str:
    """Return a row's goal and whether it is reached, for a table; "" where it has none."""
    for what, case, direction, value_of in GOALS:
        if row["what"] == what and re.match(case, row["case"]):
            value = value_of(row)
            is_reached = row["value"] <= value if direction == "<=" else row["value"] >= value
            return f"{direction} {value:.4g}{'' if is_reached else ' MISSED'}"
    return ""
