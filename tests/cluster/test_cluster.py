"""The application on a real cluster of two nodes: what clients see of it, and what it survives."""

import contextlib
import json
import os
import re
import signal
import time
from concurrent.futures import ThreadPoolExecutor
from threading import Semaphore

import httpx
import numpy as np
import psutil
import pytest
from PIL import Image

from casa_digits.cases import draw_suites
from casa_digits.endpoint import EndpointRunner
from casa_digits.evaluate import play
from casa_engine.errors import InputError
from image_files import data_url, encoded
from monitoring import CLUSTER_BOARD, alert_metrics, board_metrics
from waiting import until

pytestmark = pytest.mark.vllm
MODEL = "casa-tiny-digits"
# Replicas copy theirs every two seconds (application.py), and Ray passes them on every second (conftest.py).
METRICS_INTERVAL_S = 4
METRICS_S = 60


@pytest.fixture(scope="module")
def http(cluster):
    """A plain HTTP client, which shows status and headers as they are."""
    with httpx.Client(base_url=cluster.url, timeout=120) as client:
        yield client


def noise(seed, side=320):
    """A data URL of more than 256 KiB: an image of nothing but noise."""
    pixels = np.random.default_rng(seed).integers(0, 256, (side, side, 3), dtype=np.uint8)
    return data_url(encoded(Image.fromarray(pixels)))


def body(*urls, text="Read the digits.", **options):
    content = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
    message = {"role": "user", "content": [*content, {"type": "text", "text": text}]}
    return {"model": MODEL, "messages": [message], "max_tokens": 4, "temperature": 0} | options


def ask(http, *urls, headers=None, **options):
    answer = http.post("/v1/chat/completions", json=body(*urls, **options), headers=headers)
    assert answer.status_code == 200, answer.text
    return answer


def total(cluster, name, **labels):
    """Sum of a metric over nodes and replicas, of the series that have these labels."""
    lines = re.findall(rf"^{name}\{{(.*)\}} (\S+)$", cluster.metrics(), re.MULTILINE)
    wanted = [f'{key}="{value}"' for key, value in labels.items()]
    return sum(float(value) for series, value in lines if all(label in series for label in wanted))


def settled(cluster, name):
    """A counter's value once what was counted before has arrived at the endpoint.

    Each node reports every few seconds, and later where it has no time: two equal values were seen in between.
    """
    values = [-2.0, -1.0]

    def stands_still():
        time.sleep(METRICS_INTERVAL_S)
        values.append(total(cluster, name))
        return values[-1] == values[-2] == values[-3]

    until(stands_still, METRICS_S)
    return values[-1]


def test_each_node_has_a_replica(cluster):
    replicas = cluster.replicas()
    assert len(replicas) == 2
    assert len({replica["node_id"] for replica in replicas.values()}) == 2


def test_a_replica_is_two_processes(cluster):
    """The server and the engine: the only worker is in the engine's."""
    for replica in cluster.replicas().values():
        started = [child.cmdline() for child in psutil.Process(replica["pid"]).children(recursive=True)]
        assert [line[0] for line in started if line and line[0].startswith("VLLM::")] == ["VLLM::EngineCore"]


def test_digits_are_read(cluster):
    suite = draw_suites(seed=0, scale=0.1)[0]
    runner = EndpointRunner(f"{cluster.url}/v1")
    right = sum(play(runner, turns) for turns in suite.conversations)
    assert right >= suite.threshold * len(suite.conversations)


def test_images_find_the_replica_that_has_their_pages(cluster, http):
    # Idle replicas are chosen by chance: all images on one of two would be seen once in 2,000 runs.
    urls = [noise(seed) for seed in range(12)]
    assert len(urls[0]) > 256 * 1024
    before = settled(cluster, "ray_casa_vision_encoder_runs_total")
    homes = {url: ask(http, url).headers["x-casa-replica"] for url in urls}
    for url in [*reversed(urls), *urls]:
        again = ask(http, url)
        assert (again.headers["x-casa-replica"], again.headers["x-casa-images"]) == (homes[url], "hit")
    assert set(homes.values()) == set(cluster.replicas())
    until(lambda: total(cluster, "ray_casa_vision_encoder_runs_total") - before >= len(urls), METRICS_S)
    assert settled(cluster, "ray_casa_vision_encoder_runs_total") - before == len(urls)


def test_routing_is_counted(cluster, http):
    hits = total(cluster, "ray_casa_routing_images_total", result="hit")
    url = noise(100)
    ask(http, url)
    ask(http, url)
    until(lambda: total(cluster, "ray_casa_routing_images_total", result="hit") > hits)


def test_an_image_goes_by_its_uuid(http):
    part = {"type": "image_url", "image_url": {"url": noise(7, 56)}, "uuid": "seven"}
    request = body()
    request["messages"][0]["content"].insert(0, part)
    answers = [http.post("/v1/chat/completions", json=request) for _ in range(3)]
    assert [answer.status_code for answer in answers] == [200] * 3
    assert [answer.headers["x-casa-images"] for answer in answers] == ["miss", "hit", "hit"]


def test_sessions_stay(http):
    homes = {}
    for turn in range(3):
        for session in range(8):
            answer = ask(http, text=f"turn {turn}", headers={"x-session-id": f"sticky {session}"})
            assert answer.headers["x-casa-session"] == ("new" if turn == 0 else "kept")
            homes.setdefault(session, set()).add(answer.headers["x-casa-replica"])
    assert all(len(replicas) == 1 for replicas in homes.values())
    assert len(set.union(*homes.values())) == 2


def test_streams_as_openai_does(cluster):
    chunks = list(cluster.client().chat.completions.create(**body(noise(3, 56), stream=True)))
    whole = cluster.client().chat.completions.create(**body(noise(3, 56)))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == whole.choices[0].message.content
    assert chunks[-1].choices[0].finish_reason == whole.choices[0].finish_reason


@pytest.mark.parametrize(
    ("path", "request_body", "status", "said"),
    [
        ("/v1/chat/completions", json.dumps(body(model="other")), 404, "other"),
        ("/v1/chat/completions", json.dumps(body("data:image/png;base64,AAAA")), 400, "JPEG, PNG"),
        ("/v1/chat/completions", json.dumps(body("http://127.0.0.1/x.png")), 400, "domain"),
        ("/v1/chat/completions", json.dumps(body(max_tokens=-1)), 400, "max_tokens"),
        ("/v1/chat/completions", "{bad", 400, "JSON"),
        ("/v1/chat/completions", '{"model": 3}', 400, "messages"),
        ("/v1/chat/completions", " " * 100_000_001, 413, "ingress.max_request_bytes"),
        ("/v1/nowhere", "{}", 404, "no such path"),
    ],
)
def test_bad_requests_get_a_sentence(http, path, request_body, status, said):
    answer = http.post(path, content=request_body, headers={"Content-Type": "application/json"})
    assert answer.status_code == status
    assert said in answer.json()["error"]["message"]
    ask(http)


def test_metrics_of_the_board_and_the_alerts_exist(cluster, http):
    ask(http, noise(1, 56), headers={"x-session-id": "for the metrics"})
    ask(http, noise(1, 56), headers={"x-session-id": "for the metrics"})
    # Errors are counted from the first one on.
    assert http.post("/v1/chat/completions", json={"messages": []}).status_code == 400
    # `up` is Prometheus' own.
    wanted = (board_metrics(CLUSTER_BOARD) | alert_metrics("casa-cluster")) - {"up"}
    assert wanted

    seen = set()

    def missing():
        # Ray Serve sets its gauges of health and status every ten seconds, each at its own time; Ray tells them once.
        seen.update(re.findall(r"^([a-zA-Z_:][a-zA-Z0-9_:]*)[{ ]", cluster.metrics(), re.MULTILINE))
        return wanted - seen

    with contextlib.suppress(AssertionError):
        until(lambda: not missing(), METRICS_S)
    assert not missing()


def test_what_no_node_can_hold_is_refused_at_once(cluster):
    from casa_serving.cluster import build_app

    with pytest.raises(InputError, match=r"cannot hold 3 replicas of 1 CPU each: its nodes have 1 CPU, 1 CPU"):
        build_app(cluster.config | {"replicas": {"min": 3, "max": 3}})


def test_overload_is_refused_with_a_time_to_come_back(http):
    """64 at once, of which two replicas take 26 and the queue 8."""
    with ThreadPoolExecutor(64) as pool:
        send = {"json": body(max_tokens=64, ignore_eos=True)}
        answers = list(pool.map(lambda _: http.post("/v1/chat/completions", **send), range(64)))
    refused = [answer for answer in answers if answer.status_code == 429]
    assert {answer.status_code for answer in answers} == {200, 429}
    assert all(answer.headers["Retry-After"] == "1" for answer in refused)
    assert "busy" in refused[0].json()["error"]["message"]
    ask(http)


def test_a_client_that_leaves_ends_its_request(cluster, http):
    """Counted in tokens, of which probes of health add one now and then."""
    tokens = "ray_vllm_generation_tokens_total"
    before = total(cluster, tokens)
    request = body(max_tokens=3500, ignore_eos=True, stream=True)
    with http.stream("POST", "/v1/chat/completions", json=request) as stream:
        next(stream.iter_lines())
    time.sleep(2 * METRICS_INTERVAL_S)
    soon_after = total(cluster, tokens)
    time.sleep(2 * METRICS_INTERVAL_S)
    later = total(cluster, tokens)
    assert later - soon_after < 100
    assert 0 < later - before < 2500


def test_a_killed_replica_costs_no_answer(cluster, http):
    replicas = cluster.replicas()
    victim = replicas[ask(http, headers={"x-session-id": "on the victim"}).headers["x-casa-replica"]]
    # All on the replica that is going to die.
    stays = {"headers": {"x-session-id": "on the victim"}}
    request = body(max_tokens=600, ignore_eos=True)
    sent = Semaphore(0)
    note = {"trace": lambda event, _: sent.release() if event == "http11.send_request_body.complete" else None}
    with ThreadPoolExecutor(8) as pool:
        plain = [
            pool.submit(http.post, "/v1/chat/completions", json=request, extensions=note, **stays) for _ in range(4)
        ]
        # One that came after the session has moved would stay where that is.
        for _ in plain:
            assert sent.acquire(timeout=20)
        with http.stream("POST", "/v1/chat/completions", json=request | {"stream": True}, **stays) as stream:
            lines = stream.iter_lines()
            next(lines)
            os.kill(victim["pid"], signal.SIGKILL)
            events = [line.removeprefix("data: ") for line in lines if line]
        answers = [answer.result() for answer in plain]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert {answer.headers["x-casa-replica"] for answer in answers} == set(replicas) - {victim["replica_id"]}
    assert all(answer.headers["x-casa-session"] == "moved" for answer in answers)
    assert json.loads(events[-2])["error"]["type"] == "ReplicaLostError"
    assert events[-1] == "[DONE]"
    until(lambda: len(set(cluster.replicas()) - {victim["replica_id"]}) == 2, 300)
