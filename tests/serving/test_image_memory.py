"""The memory that a small body can make a server take: as docs/limits.md says."""

import json

import psutil
import pytest
from PIL import Image

from image_files import data_url, encoded
from posting import post
from process_memory import peak_bytes, start_peak
from serving_process import casa_serve

pytestmark = pytest.mark.vllm

NUM_IMAGES, SIDE = 30, 4096
# Four images at a time, 14 bytes for each of their pixels, and half as much again for what an allocator keeps.
BOUND_BYTES = 4 * SIDE * SIDE * 14 * 3 // 2


def test_thirty_large_images_in_a_small_body(tmp_path):
    """The files differ, so that none is found in a cache; they are taken one after the other."""
    arguments = ["--enforce-eager", "--live-max-sessions", "0", "--max-model-len", "2048"]
    with casa_serve(tmp_path / "log.txt", *arguments, "--limit-mm-per-prompt", json.dumps({"image": 64})) as server:
        small = data_url(encoded(Image.new("RGB", (56, 56), "red")))
        warm = {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": small}}]}]}
        assert post(server, "/v1/chat/completions", warm | {"max_tokens": 2})[0] == 200
        leader = psutil.Process(server.process.pid)
        of_server = [process.pid for process in (leader, *leader.children(recursive=True))]
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
