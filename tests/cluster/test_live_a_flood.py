import asyncio
import json
import struct
import time
from urllib.parse import urlsplit

import numpy as np
import psutil
import pytest
from PIL import Image
from websockets.asyncio.client import connect

from image_files import encoded

pytestmark = pytest.mark.vllm
OUT = open("/tmp/flood.txt", "a", buffering=1)


def rss():
    found = {}
    for p in psutil.process_iter():
        try:
            name = " ".join(p.cmdline())[:60]
            if name.startswith(("ray::Proxy", "ray::ServeReplica")):
                key = name.replace("ray::ServeReplica:casa:", "")[:12] + str(p.pid)
                found[key] = p.memory_info().rss >> 20
        except psutil.Error:
            pass
    return found


def test_never_reads(cluster):
    async def run():
        faulty = json.dumps({"type": "question", "text": "?"} | {f"{n}" * 60: 0 for n in range(4)}).encode()
        message = b"\x81\xfe" + struct.pack(">H", len(faulty)) + bytes(4) + faulty
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(cluster.url).port)
        writer.write(
            b"GET /v1/live HTTP/1.1\r\nHost: x\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n\r\n"
        )
        await reader.readuntil(b"\r\n\r\n")
        create = b'{"type": "session.create"}'
        writer.write(b"\x81" + bytes([0x80 | len(create)]) + bytes(4) + create)
        reader._transport.pause_reading()
        sent = 0
        t = time.time()
        last = 0

        async def flood():
            nonlocal sent
            while True:
                writer.write(message * 100)
                await writer.drain()
                sent += 100

        task = asyncio.create_task(flood())
        while time.time() - t < 15:
            await asyncio.sleep(3)
            print("noread", round(time.time() - t), sent, rss(), task.done() and repr(task.exception()), file=OUT)
        task.cancel()
        writer.transport.abort()
        await asyncio.sleep(5)
        print("after", rss(), file=OUT)

    asyncio.run(run())


def test_floods(cluster):
    async def run():
        noise = np.random.default_rng(0).integers(0, 256, (1400, 1400, 3), dtype=np.uint8)
        file = struct.pack("<d", 0.0) + encoded(Image.fromarray(noise))
        async with connect(cluster.live_url, max_size=None, open_timeout=60) as socket:
            await socket.send('{"type": "session.create"}')
            sent = 0
            t = time.time()

            async def read():
                n = 0
                async for m in socket:
                    n += 1
                return n

            task = asyncio.create_task(read())
            try:
                async with asyncio.timeout(8):
                    while True:
                        await socket.send(file)
                        sent += 1
                        if sent % 40 == 0:
                            print("flood", round(time.time() - t, 1), sent, len(file), rss(), file=OUT)
            except Exception as e:
                print("end", repr(e), file=OUT)
        print("flood sent", sent, sent * len(file) / (time.time() - t) / 1e6, "MB/s", rss(), file=OUT)
        await asyncio.sleep(5)
        print("after", rss(), file=OUT)

    asyncio.run(run())
