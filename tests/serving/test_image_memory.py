"""The memory that a small body can make a server take: as docs/limits.md says."""

import json
from pathlib import Path

import pytest
from PIL import Image

from image_files import data_url, encoded
from posting import post
from serving_process import casa_serve

pytestmark = pytest.mark.vllm

NUM_IMAGES, SIDE = 30, 4096
# Four images at a time, 14 bytes for each of their pixels, and half as much again for what an allocator keeps.
BOUND_BYTES = 4 * SIDE * SIDE * 14 * 3 // 2


def processes(leader: int) -> list[int]:
    """Returns a process and its descendants."""
    children: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int(status(int(folder.name))["PPid"])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(folder.name))
    found = [leader]
    for process in found:
        found += children.get(process, [])
    return found


def status(process: int) -> dict[str, str]:
    """Returns what Linux says of a process."""
    lines = Path(f"/proc/{process}/status").read_text().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)


def start_peak(process: int) -> None:
    """Lets the largest resident size of a process count from now."""
    Path(f"/proc/{process}/clear_refs").write_text("5")


def peak_bytes(process: int) -> int:
    """Returns the largest resident size of a process."""
    return int(status(process).get("VmHWM", "0 kB").split()[0]) * 1024


def test_thirty_large_images_in_a_small_body(tmp_path):
    """The files differ, so that none is found in a cache; they are taken one after the other."""
    arguments = ["--enforce-eager", "--live-max-sessions", "0", "--max-model-len", "2048"]
    with casa_serve(tmp_path / "log.txt", *arguments, "--limit-mm-per-prompt", json.dumps({"image": 64})) as server:
        small = data_url(encoded(Image.new("RGB", (56, 56), "red")))
        warm = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": small}}]}]}
        assert post(server, "/v1/chat/completions", warm | {"max_tokens": 2})[0] == 200
        of_server = processes(server.process.pid)
        parts = []
        for number in range(NUM_IMAGES):
            large = Image.new("RGB", (SIDE, SIDE), (number, 90, 160))
            parts.append({"type": "image_url", "image_url": {"url": data_url(encoded(large))}})
            parts.append({"type": "text", "text": "x"})
        body = {"messages": [{"role": "user", "content": parts}], "max_tokens": 2}
        assert len(json.dumps(body)) < 4_000_000
        for process in of_server:
            start_peak(process)
        before = sum(map(peak_bytes, of_server))
        code, text = post(server, "/v1/chat/completions", body)
        assert code == 200, text
        taken = sum(map(peak_bytes, of_server)) - before
        print(f"{taken / 1e6:.0f} MB more at the peak, {before / 1e6:.0f} MB before")
        assert taken < BOUND_BYTES
