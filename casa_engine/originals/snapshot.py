"""What a checkpoint says of itself without its weights: configurations and the headers of its tensors.

Read from its folder, or from a headers file that the folder's owner has sent:

    {"format": "casa-headers/1", "fingerprint", "files": {name: {"bytes", "sha256"}}, "documents": {name: JSON},
     "tensors": [["layers.{layer}.x.weight", "BF16", [64, 64], "0-27", "model.safetensors"], ...]}
"""

import hashlib
import json
import os
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from casa_engine.atomic_files import file_hash, write_atomically
from casa_engine.errors import CheckpointError, OutputError
from casa_engine.json_files import read_json, read_object
from casa_engine.originals.layer_names import split_layer
from casa_engine.safetensors_header import MAX_TENSORS, TensorHeader, check_tensor
from casa_engine.untrusted_folder import check_files, check_reference, fields_of
from casa_engine.weight_files import stored_tensors

FORMAT = "casa-headers/1"
CONFIG, GENERATION, TOKENIZER = "config.json", "generation_config.json", "tokenizer.json"
TOKENIZER_CONFIG, TEMPLATE = "tokenizer_config.json", "chat_template.jinja"
DOCUMENTS = (
    CONFIG,
    GENERATION,
    "preprocessor_config.json",
    "processor_config.json",
    TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "chat_template.json",
)
MAX_TEMPLATE_BYTES = 1 << 20
# Whose remote code an original may name: it is not run either way. Anything else is not what it claims to be.
OWNER = "kyutai/"
SAMPLES, SAMPLE_BYTES = 64, 4096


@dataclass(frozen=True)
class Snapshot:
    """A checkpoint without its weights.

    Attributes:
        path: The folder, or the headers file.
        documents: Parsed JSON by file name, the chat template as text, and of tokenizer.json a summary.
        tensors: By name.
        fingerprint: SHA-256 over the configurations, the headers and samples of each file's data, as hexadecimals.
        files: SHA-256 and size of each file; empty for a folder, which can be hashed when that is needed.
        has_weights: Whether `path` is a folder.
    """

    path: Path
    documents: dict[str, Any]
    tensors: dict[str, TensorHeader]
    fingerprint: str
    files: dict[str, dict[str, Any]]
    has_weights: bool

    @property
    def config(self) -> dict[str, Any]:
        """The original's config.json."""
        return self.documents[CONFIG]

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the stored tensors."""
        return {name: header.shape for name, header in self.tensors.items()}


def read_snapshot(path: str | Path) -> Snapshot:
    """Read a folder or a headers file; execute nothing of it, and load no weights.

    Raises:
        CheckpointError: It is neither, is damaged, or may not be trusted (see `untrusted_folder`).
    """
    path = Path(path)
    if path.is_file():
        return _from_headers_file(path)
    if not (path / CONFIG).is_file():
        raise CheckpointError(f"{path} is no checkpoint: expected a folder with config.json, or a headers file.")
    check_files(path)
    documents: dict[str, Any] = {name: read_object(path / name) for name in DOCUMENTS if (path / name).is_file()}
    if (path / TEMPLATE).is_file():
        documents[TEMPLATE] = _template(path / TEMPLATE)
    if (path / TOKENIZER).is_file():
        documents[TOKENIZER] = _tokenizer_summary(path / TOKENIZER)
    _check_documents(path, documents)
    tensors = stored_tensors(path)
    return Snapshot(path, documents, tensors, _fingerprint(path, documents, tensors), {}, has_weights=True)


def write_headers_file(snapshot: Snapshot, path: Path) -> None:
    """Write what `read_snapshot` reads, with the hash of every file of the folder, and no weights.

    Raises:
        CheckpointError: A file cannot be read.
        OutputError: The file cannot be written.
    """
    content = {
        "format": FORMAT,
        "fingerprint": snapshot.fingerprint,
        "files": snapshot.files or hash_files(snapshot.path),
        "documents": snapshot.documents,
        "tensors": _packed(snapshot.tensors),
    }
    lines = json.dumps(content, ensure_ascii=False, separators=(",", ":")) + "\n"
    try:
        write_atomically(path, lines.encode())
    except OSError as error:
        raise OutputError(f"{path} was not written: {error.strerror or error}.") from error


def hash_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return size and SHA-256 of every file of a folder; those of weights are what the hub lists."""
    paths = sorted(path for path in folder.iterdir() if path.is_file())
    return {path.name: {"bytes": path.stat().st_size, "sha256": file_hash(path)} for path in paths}


def _check_documents(path: Path, documents: Mapping[str, Any]) -> None:
    for name, document in documents.items():
        for field, value in fields_of(document):
            check_reference(path / name, field, value)
            if field == "auto_map":
                for _, reference in fields_of(value):
                    _check_code_reference(path / name, reference)


def _check_code_reference(path: Path, reference: Any) -> None:
    """Code in the folder itself is what originals have, and is not run; code of somebody else is refused."""
    for each in reference if isinstance(reference, list) else [reference]:
        if isinstance(each, str) and "--" in each and not each.startswith(OWNER):
            raise CheckpointError(
                f"{path} has auto_map to {each.partition('--')[0]!r}, another repository; expected the checkpoint's "
                "own files, which casa-engine does not run. Remove the field."
            )


def _template(path: Path) -> str:
    content = path.read_bytes()
    if len(content) > MAX_TEMPLATE_BYTES:
        raise CheckpointError(f"{path} has {len(content)} bytes; expected at most {MAX_TEMPLATE_BYTES}.")
    return content.decode(errors="replace")


def _tokenizer_summary(path: Path) -> dict[str, Any]:
    """Of a tokenizer what decides ids, and in place of its vocabulary the file's hash."""
    content = read_object(path)
    model = content.get("model") if isinstance(content.get("model"), dict) else {}
    vocabulary, added = model.get("vocab"), content.get("added_tokens")
    tokens = [token for token in (added if isinstance(added, list) else ()) if isinstance(token, dict)]
    return {
        "type": model.get("type"),
        "vocabulary": len(vocabulary) if isinstance(vocabulary, (dict, list)) else 0,
        "added_tokens": [[token.get("id"), str(token.get("content"))] for token in tokens],
        "post_processor": content.get("post_processor"),
        "sha256": file_hash(path),
    }


def _fingerprint(folder: Path, documents: Mapping[str, Any], tensors: Mapping[str, TensorHeader]) -> str:
    digest = hashlib.sha256()
    listed = [[name, header.dtype, header.shape, header.file] for name, header in sorted(tensors.items())]
    digest.update(json.dumps([documents, listed], sort_keys=True).encode())
    for name in sorted({header.file for header in tensors.values()}):
        with (folder / name).open("rb") as file:
            num_bytes = os.fstat(file.fileno()).st_size
            digest.update(f"{name} {num_bytes}".encode())
            for sample in range(SAMPLES):
                digest.update(os.pread(file.fileno(), SAMPLE_BYTES, num_bytes * sample // SAMPLES))
    return digest.hexdigest()


def _packed(tensors: Mapping[str, TensorHeader]) -> list[list]:
    layers: dict[tuple, list[int]] = defaultdict(list)
    for name, header in tensors.items():
        pattern, layer = split_layer(name)
        row = layers[pattern, header.dtype, header.shape, header.file]
        if layer is not None:
            row.append(layer)
    return [[*key[:3], _ranges(numbers), key[3]] for key, numbers in layers.items()]


def _ranges(numbers: list[int]) -> str:
    """1, 2, 3 and 7 as "1-3,7"."""
    ranges: list[list[int]] = []
    for number in sorted(numbers):
        if ranges and number == ranges[-1][1] + 1:
            ranges[-1][1] = number
        else:
            ranges.append([number, number])
    return ",".join(f"{start}-{end}" if start != end else str(start) for start, end in ranges)


def _from_headers_file(path: Path) -> Snapshot:
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        raise CheckpointError(f"{path} is no headers file: expected JSON with format {FORMAT!r}.")
    try:
        documents = dict(content["documents"])
        for name in {CONFIG, *documents}:
            if not isinstance(documents[name], str if name == TEMPLATE else dict):
                raise TypeError(f"{name} is of another kind")
        _check_summary(documents.get(TOKENIZER, {}))
        tensors = dict(_unpacked(content["tensors"]))
        fingerprint, files = str(content["fingerprint"]), dict(content["files"])
        if not re.fullmatch("[0-9a-f]{64}", fingerprint):
            raise ValueError(f"its fingerprint is {fingerprint[:80]!r}, no SHA-256")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is a damaged headers file: {error!r}.") from error
    _check_documents(path, documents)
    return Snapshot(path, documents, tensors, fingerprint, files, has_weights=False)


def _check_summary(summary: dict[str, Any]) -> None:
    """Raise TypeError unless it is what `_tokenizer_summary` returns, as far as it is read."""
    rows = summary.get("added_tokens", [])
    if type(summary.get("vocabulary", 0)) is not int or not isinstance(rows, list):
        raise TypeError(f"{TOKENIZER} is of another kind")
    if any(not isinstance(row, list) or len(row) != 2 for row in rows):
        raise TypeError(f"{TOKENIZER} has added_tokens that are no pairs")


def _unpacked(rows: list[list]) -> Iterator[tuple[str, TensorHeader]]:
    count = 0
    for pattern, dtype, shape, numbers, file in rows:
        check_tensor(pattern.replace("{layer}", "0", 1), dtype, shape)
        header = TensorHeader(dtype, tuple(shape), str(file))
        for number in _numbers(numbers) if numbers else [None]:
            count += 1
            if count > MAX_TENSORS:
                raise ValueError(f"it names more than {MAX_TENSORS} tensors")
            yield (pattern if number is None else pattern.replace("{layer}", str(number), 1)), header


def _numbers(text: str) -> Iterator[int]:
    for part in text.split(","):
        start, _, end = part.partition("-")
        yield from range(int(start), int(end or start) + 1)
