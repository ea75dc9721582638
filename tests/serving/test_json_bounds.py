"""JSON is counted before it is parsed, wherever the network cuts it, and parsed strictly."""

import json
import tracemalloc

import pytest

from casa_serving.endpoint.json_bounds import StructureCounter, parse_json
from casa_serving.errors import RequestError
from casa_serving.options.request_limits import RequestLimits

pytestmark = pytest.mark.unit

SMALL = RequestLimits(max_json_depth=4, max_json_values=20, max_json_containers=10)


def count(text, limits=SMALL, size=None):
    """Feed a text in pieces of `size` bytes."""
    counter = StructureCounter(limits)
    for at in range(0, len(text), size or len(text)):
        counter.feed(text[at : at + (size or len(text))])


@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
@pytest.mark.parametrize(
    "text",
    [
        json.dumps([[[[]]]]),
        json.dumps({"a": "[[[[[[[" + "{" * 40 + ",,,,," * 40}),
        json.dumps({"a": 'quotes " and \\ and \\\\" [[[[[[ ' * 9}),
        json.dumps(list(range(20))),
        json.dumps([{}] * 9),
        json.dumps({"ä\u2028": "\U0001f600[[[["}),
    ],
)
def test_what_is_within_the_limits_passes_in_any_pieces(text, size):
    count(text.encode(), size=size)


@pytest.mark.parametrize("size", [1, 2, 3, 7, None])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[[[[[]]]]]", "nested too deeply"),
        ('{"a":{"a":{"a":{"a":{}}}}}', "nested too deeply"),
        (r'{"\\":[[[[[', "nested too deeply"),
        ("[" + "{}," * 10 + "{}]", "too many arrays and objects"),
        (json.dumps(list(range(23))), "too many values"),
        ('"a"' * 41, "too many values"),
    ],
)
def test_what_is_over_a_limit_is_refused_in_any_pieces(text, message, size):
    with pytest.raises(RequestError, match=message) as caught:
        count(text.encode(), size=size)
    assert caught.value.status == 400


def test_it_counts_as_the_parser_does():
    """Of random JSON: depth and containers are exactly those of the parsed value."""
    import random

    chance = random.Random(7)

    def value(depth):
        kind = chance.randrange(6) if depth else chance.randrange(4)
        if kind == 4:
            return [value(depth - 1) for _ in range(chance.randrange(4))]
        if kind == 5:
            return {text(): value(depth - 1) for _ in range(chance.randrange(4))}
        return [None, True, chance.random(), text()][kind]

    def text():
        return "".join(chance.choice('[]{},:"\\\n ü') for _ in range(chance.randrange(8)))

    def items(found):
        return found.values() if isinstance(found, dict) else found if isinstance(found, list) else ()

    def containers(found):
        return isinstance(found, list | dict) + sum(map(containers, items(found)))

    def depth(found):
        return isinstance(found, list | dict) + max(map(depth, items(found)), default=0)

    # Strings are bounded with the containers.
    words = {"max_json_containers": "too many (arrays and objects|values)", "max_json_depth": "nested too deeply"}
    num_refused = 0
    for _ in range(300):
        found = [value(6)]
        limits = {"max_json_containers": containers(found), "max_json_depth": depth(found)}
        body = json.dumps(found, ensure_ascii=chance.random() < 0.5).encode()
        count(body, RequestLimits(**limits), size=chance.randrange(1, 9))
        for name in words:
            if limits[name] > 1:
                with pytest.raises(RequestError, match=words[name]):
                    count(body, RequestLimits(**{name: limits[name] - 1}))
                num_refused += 1
    assert num_refused > 100


@pytest.mark.parametrize("piece", [b"[],", b'"",', b'{"a":', b'\\"', b'"\\', b"1,", b" "])
def test_counting_holds_no_memory(piece):
    """10 MB of anything: refused or taken, with less than 1 MB held."""
    body = piece * (10_000_000 // len(piece))
    tracemalloc.start()
    try:
        count(body, RequestLimits(), size=65_536)
    except RequestError:
        pass
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1_000_000


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"{oops", "not JSON"),
        (b"", "not JSON"),
        (b"{} {}", "not JSON"),
        (b'{"a": NaN}', "NaN is no number"),
        (b'{"a": -Infinity}', "-Infinity is no number"),
        (b'{"a": 1, "b": {"c": 1, "c": 2}}', "same name twice"),
        (b'{"a": "\xff"}', "not UTF-8: byte 7"),
        ('{"a": 1}'.encode("utf-16"), "not UTF-8"),
        ('{"a": 1}'.encode("utf-16-le"), "not JSON"),
        (b'{"a": ' + b"1" * 5000 + b"}", "too many digits"),
        (b'{"a": "\x00"}', "not JSON"),
    ],
)
def test_what_is_no_json(body, message):
    with pytest.raises(RequestError, match=message) as caught:
        parse_json(body)
    assert caught.value.status == 400
    assert len(str(caught.value)) < 200


def test_a_byte_order_mark_is_skipped():
    assert parse_json(b'\xef\xbb\xbf{"a": 1}') == {"a": 1}
