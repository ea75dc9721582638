"""Malformed requests for every path of a server, made from its own OpenAPI schema.

    python tests/support/request_fuzzer.py http://127.0.0.1:8000 --cases 2000 --seed 7

Bodies are drawn from the schema of each path and then damaged: values of other kinds, of other
sizes, in other places, bytes that are no JSON. Whatever is sent, the server answers with no 5xx,
errors in OpenAI's shape of at most 64 kB, and it lives on.
"""

from __future__ import annotations

import argparse
import asyncio
import copy
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import aiohttp

MAX_ERROR_BYTES = 65_536
TIMEOUT_S = 120
# They set what the server does for others, or are answered by a stream that the fuzzer would wait for.
LEFT_OUT = ("/metrics",)
# Drawn often: what the API's own fields mean is where bodies get far.
GOOD = {
    "model": "casa-tiny-digits",
    "max_tokens": 3,
    "max_completion_tokens": 3,
    "max_output_tokens": 3,
    "prompt": "Read.",
    "messages": [{"role": "user", "content": "Read."}],
    "input": "Read.",
    "tokens": [1, 2, 3],
    "query": "Read.",
    "items": ["a", "b"],
    "label_token_ids": [1, 2],
    "stream": False,
}
WEIRD = (
    None, True, False, 0, -1, 1, 2, 129, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, -1e308, 1e-320,
    "", "a", "0", "NaN", "null", "\x00", "\ud800", "\U0010ffff", "../../etc/passwd", "a" * 300, "{{ 1/0 }}", "(a*)*b",
    [], [[]], [None], [1], [-1], ["a"], [{}], {}, {"": ""}, {"type": "text"}, {"type": "object"}, {"$ref": "#"},
    {"role": "user"}, {"type": "image_url", "image_url": {"url": "data:,"}}, {"1": 1e308}, ["a"] * 65, [0] * 3000,
)  # fmt: skip
RAW = (
    b"", b"{", b"[]", b"null", b"1", b'"a"', b"{}{}", b"\xff\xfe", b"\xef\xbb\xbf{}", b'{"a": NaN}', b'{"a": 1e999}',
    b'{"model": 1, "model": 2}', b"[" * 5000, b'{"a":' * 5000, b'{"a": "\\ud800"}',
    b'{"prompt": "' + b"a" * 300_000 + b'"}',
)  # fmt: skip
HEADERS = (
    {"Content-Type": "text/plain"},
    {"Content-Type": "application/json; charset=utf-16"},
    {"Content-Type": "multipart/form-data; boundary=x"},
    {"Content-Encoding": "gzip"},
    {"Accept": "image/png"},
    {"X-Request-Id": "a" * 1000},
    {"Expect": "100-continue"},
)


@dataclass(frozen=True)
class Case:
    """A request.

    Attributes:
        number: Its place in the sequence, which with the seed makes it again.
        method: HTTP's.
        path: With what stands for its parameters.
        body: As it is sent.
        headers: Beside the content type.
    """

    number: int
    method: str
    path: str
    body: bytes
    headers: dict[str, str]


class Fuzzer:
    """Makes cases from a schema.

    Args:
        openapi: The server's `/openapi.json`.
        seed: The same seed and schema give the same cases.
    """

    def __init__(self, openapi: dict[str, Any], seed: int) -> None:
        self._schemas = openapi.get("components", {}).get("schemas", {})
        self._chance = random.Random(seed)
        self.operations = [
            (method.upper(), path, body_schema(operation))
            for path, operations in sorted(openapi["paths"].items())
            for method, operation in sorted(operations.items())
            if path not in LEFT_OUT
        ]

    def cases(self, count: int) -> Iterator[Case]:
        """Yield `count` cases, each path in turn."""
        for number in range(count):
            method, path, schema = self.operations[number % len(self.operations)]
            path = path.replace("{", "").replace("}", "")
            if self._chance.random() < 0.05:
                method = self._chance.choice(("GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "POST"))
            headers = dict(self._chance.choice(HEADERS)) if self._chance.random() < 0.08 else {}
            body = b"" if method in ("GET", "HEAD", "OPTIONS") else self._body(schema)
            yield Case(number, method, path, body, {"Content-Type": "application/json", **headers})

    def _body(self, schema: dict[str, Any]) -> bytes:
        if self._chance.random() < 0.1:
            return self._chance.choice(RAW)
        body = self._draw(schema, 4)
        if isinstance(body, dict):
            body |= {name: copy.deepcopy(value) for name, value in GOOD.items() if self._chance.random() < 0.8}
            for _ in range(self._chance.choice((0, 1, 1, 2, 4))):
                self._damage(body)
        text = json.dumps(body).encode()
        if self._chance.random() < 0.05:
            cut = self._chance.randrange(len(text) + 1)
            return text[:cut] + self._chance.randbytes(2) + text[cut:]
        return text

    def _draw(self, schema: Any, depth: int) -> Any:
        """Draw a value that fits a schema, more or less."""
        if not isinstance(schema, dict) or depth < 0:
            return self._chance.choice(WEIRD)
        if "$ref" in schema:
            return self._draw(self._schemas.get(schema["$ref"].rsplit("/", 1)[-1], {}), depth)
        for several in ("anyOf", "oneOf", "allOf"):
            if schema.get(several):
                return self._draw(self._chance.choice(schema[several]), depth)
        if schema.get("enum"):
            return self._chance.choice(schema["enum"])
        if "const" in schema:
            return schema["const"]
        kind = schema.get("type")
        if kind == "object" or "properties" in schema:
            properties, required = schema.get("properties", {}), set(schema.get("required", ()))
            some = [name for name in properties if name in required or self._chance.random() < 0.08]
            return {name: self._draw(properties[name], depth - 1) for name in some}
        if kind == "array":
            return [self._draw(schema.get("items", {}), depth - 1) for _ in range(self._chance.randrange(3))]
        plain = {
            "string": ("a", "Read.", ""),
            "integer": (0, 1, 3, -1),
            "number": (0.5, 1, -2.0),
            "boolean": (True, False),
        }
        return self._chance.choice(plain.get(kind, WEIRD))

    def _damage(self, value: Any) -> None:
        """Change something somewhere in a value. Mutates `value`."""
        while isinstance(value, dict | list) and value:
            key = self._chance.choice(list(value) if isinstance(value, dict) else range(len(value)))
            if isinstance(value[key], dict | list) and value[key] and self._chance.random() < 0.6:
                value = value[key]
                continue
            action = self._chance.randrange(3)
            if action == 0:
                value[key] = copy.deepcopy(self._chance.choice(WEIRD))
            elif action == 1:
                del value[key]
            elif isinstance(value, list):
                value += [value[key]] * self._chance.choice((1, 70))
            else:
                value[self._chance.choice(("x", key * 2, "url", "data"))] = value[key]
            return


def body_schema(operation: dict[str, Any]) -> dict[str, Any]:
    """Return the schema of an operation's body; one that says nothing for what takes any."""
    content = operation.get("requestBody", {}).get("content", {})
    return next(iter(content.values()), {}).get("schema", {}) or {
        "type": "object",
        "properties": {name: {} for name in GOOD},
    }


def fault_of(status: int, body: bytes) -> str | None:
    """Return what is wrong with an answer, or None."""
    if status >= 500:
        return f"status {status}: {body[:300]!r}"
    if status < 400:
        return None
    if len(body) > MAX_ERROR_BYTES:
        return f"an error of {len(body)} bytes"
    try:
        error = json.loads(body)["error"]
        fits = set(error) == {"message", "type", "param", "code"} and error["message"] and error["code"] == status
    except (ValueError, TypeError, KeyError):
        fits = False
    return None if fits else f"not OpenAI's shape: {status} {body[:300]!r}"


async def fuzz(url: str, *, cases: int, seed: int, parallel: int = 8, key: str | None = None) -> list[str]:
    """Send cases to a server.

    Args:
        url: Its address without a path.
        cases: How many.
        seed: Of the cases.
        parallel: How many at once.
        key: The server's, if it asks for one.

    Returns:
        What was wrong, a line for each; empty if nothing was.
    """
    faults: list[str] = []
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    timeout = aiohttp.ClientTimeout(total=TIMEOUT_S)
    async with aiohttp.ClientSession(url, headers=headers, timeout=timeout) as session:
        async with session.get("/openapi.json") as answer:
            waiting = Fuzzer(await answer.json(), seed).cases(cases)

        async def work() -> None:
            for case in waiting:
                fault = await send(session, case)
                if fault is not None:
                    faults.append(
                        f"case {case.number} of seed {seed}: {case.method} {case.path} {case.body[:400]!r}: {fault}"
                    )

        await asyncio.gather(*(work() for _ in range(parallel)))
        async with session.get("/health") as answer:
            if answer.status != 200:
                faults.append(f"/health answers {answer.status} afterwards")
    return faults


async def send(session: aiohttp.ClientSession, case: Case) -> str | None:
    """Send a case; return what is wrong with its answer, or None."""
    try:
        async with session.request(
            case.method, case.path, data=case.body or None, headers=case.headers, allow_redirects=False
        ) as answer:
            body = await answer.read()
            # An error that has no body may have any shape.
            return fault_of(answer.status, body) if case.method != "HEAD" or answer.status >= 500 else None
    except TimeoutError:
        return f"no answer in {TIMEOUT_S} s"
    except aiohttp.ClientError as error:
        return f"no answer: {error!r}"


def main() -> None:
    """Fuzz a server that runs."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--cases", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--parallel", type=int, default=8)
    parser.add_argument("--key")
    options = vars(parser.parse_args())
    faults = asyncio.run(fuzz(options.pop("url"), **options))
    print("\n".join(faults) or "nothing is wrong")
    raise SystemExit(bool(faults))


if __name__ == "__main__":
    main()
