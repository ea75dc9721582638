"""Options that every command has that starts vLLM in this process or asks a server with a key."""

from __future__ import annotations

import argparse
import os

from casa_bench.workload import bounded

DTYPES = ("auto", "float32", "bfloat16", "float16")


def add_model_options(parser: argparse.ArgumentParser) -> None:
    """Declare what is set of vLLM for a checkpoint, and the model's name at a server."""
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of a folder; auto is the checkpoint's own, which vLLM makes 16 bits of float32 (%(default)s)",
    )
    parser.add_argument("--kv-cache-gib", type=bounded(0.01, 4096.0), help="engine: size of its KV cache")
    parser.add_argument("--enforce-eager", action="store_true", help="engine: do not compile the model")
    parser.add_argument("--served-model", help="endpoint: the model's name there; default: the first it serves")


def add_key_option(parser: argparse.ArgumentParser) -> None:
    """Declare the server's key."""
    parser.add_argument("--api-key", default=os.environ.get("OPENAI_API_KEY"), help="of a server ($OPENAI_API_KEY)")


def without_key(arguments: list[str]) -> list[str]:
    """Return a command line without the value of --api-key, which no report may hold."""
    hidden, words = False, []
    for word in arguments:
        name, equals, _ = word.partition("=")
        # argparse takes abbreviations too.
        is_key = not hidden and len(name) > 2 and "--api-key".startswith(name)
        words.append("..." if hidden else f"{name}=..." if is_key and equals else word)
        hidden = is_key and not equals
    return words
