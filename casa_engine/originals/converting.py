"""Writes an original as a checkpoint of ours: tensors are copied from file to file, a few megabytes at a time."""

import json
import os
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import torch

from casa_engine.atomic_files import write_atomically
from casa_engine.checkpoint_folder import list_files, stage_checkpoint
from casa_engine.errors import CheckpointError
from casa_engine.originals.plan import Plan
from casa_engine.originals.snapshot import hash_files
from casa_engine.originals.text_files import write_text_files
from casa_engine.safetensors_header import DTYPE_BYTES, TensorHeader
from casa_engine.tensor_map import Part, check_finite
from casa_engine.weight_files import INDEX, WEIGHTS, share_files

ORIGIN_FILE = "original.json"
CHUNK_BYTES = 16 << 20
CHECKED = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}
ALIGNMENT = 8
Piece = tuple[str, Part, TensorHeader]  # name there, name and rows here, where it lies


def convert(plan: Plan, out: str | Path) -> None:
    """Write a checkpoint of ours, as one transaction; of the weights some megabytes are in memory at a time.

    Raises:
        CheckpointError: The plan is not complete or was made without weights, or a tensor holds NaN or infinity.
        OutputError: The folder cannot be written, or holds such files of others; it is as before.
    """
    plan.check()
    snapshot = plan.snapshot
    if not snapshot.has_weights:
        raise CheckpointError(f"{snapshot.path} holds no weights to convert; expected the checkpoint's own folder.")
    needed = sum(snapshot.tensors[name].num_bytes for name, parts in plan.assignment.parts.items() if parts)
    with stage_checkpoint(out, needed) as staged:
        _write_weights(plan, staged.path)
        write_small_files(plan, staged.path, hash_files(snapshot.path))
        share_files(staged.path, "*")
        list_files(staged.path)
        staged.commit()


def write_small_files(plan: Plan, folder: Path, files: dict) -> None:
    """Write all but the weights: configuration, text files, and what the original was.

    Args:
        plan: A complete one.
        folder: Where they go.
        files: Size and hash of the original's files, as far as they are known.
    """
    plan.config.save_pretrained(folder)
    write_text_files(plan, folder)
    content = {
        "family": plan.family,
        "fingerprint": plan.snapshot.fingerprint,
        "files": files,
        "fields": {one.name: [one.value, one.origin, one.status] for one in plan.values.values()},
        "tensors": {name: rule.status for name, rule in plan.assignment.rules.items() if rule.status != "known"},
    }
    write_atomically(folder / ORIGIN_FILE, (json.dumps(content, indent=1) + "\n").encode())


def _write_weights(plan: Plan, folder: Path) -> None:
    by_file: dict[str, list[Piece]] = defaultdict(list)
    for name, parts in plan.assignment.parts.items():
        header = plan.snapshot.tensors[name]
        by_file[header.file] += [(name, part, header) for part in parts]
    files = [pieces for _, pieces in sorted(by_file.items()) if pieces]
    weight_map = {}
    for number, pieces in enumerate(files, start=1):
        name = WEIGHTS if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        # The largest types first, so that each tensor is aligned to its own.
        pieces.sort(key=lambda piece: (-DTYPE_BYTES[piece[2].dtype], piece[2].start, piece[1].rows or (0, 0)))
        with (plan.snapshot.path / pieces[0][2].file).open("rb") as source, (folder / name).open("wb") as target:
            _write_file(pieces, source, target)
        weight_map |= {part.name: name for _, part, _ in pieces}
    if len(files) > 1:
        total = sum(_num_bytes(part, header) for pieces in files for _, part, header in pieces)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / INDEX).write_text(json.dumps(content, indent=1) + "\n")


def _write_file(pieces: list[Piece], source: BinaryIO, target: BinaryIO) -> None:
    entries, position = {"__metadata__": {"format": "pt"}}, 0
    for _, part, header in pieces:
        end = position + _num_bytes(part, header)
        shape = list(part.shape(header.shape))
        entries[part.name] = {"dtype": header.dtype, "shape": shape, "data_offsets": [position, end]}
        position = end
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % ALIGNMENT)
    target.write(len(text).to_bytes(8, "little") + text)
    for name, part, header in pieces:
        for chunk in _chunks(source, part, header):
            if header.dtype in CHECKED:
                check_finite(name, torch.frombuffer(chunk, dtype=CHECKED[header.dtype]))
            target.write(chunk)


def _chunks(source: BinaryIO, part: Part, header: TensorHeader) -> Iterator[bytearray]:
    """Yield the bytes of a tensor, or of its rows."""
    row_bytes = header.num_bytes // header.shape[0] if part.rows else 0
    position = header.start + (part.rows[0] * row_bytes if part.rows else 0)
    end = position + _num_bytes(part, header)
    while position < end:
        chunk = bytearray(os.pread(source.fileno(), min(CHUNK_BYTES, end - position), position))
        if not chunk:
            raise CheckpointError(f"{source.name} became shorter while it was read.")
        position += len(chunk)
        yield chunk


def _num_bytes(part: Part, header: TensorHeader) -> int:
    if part.rows is None:
        return header.num_bytes
    return header.num_bytes // header.shape[0] * (part.rows[1] - part.rows[0])
