"""Which replica a request prefers."""

import pytest

from casa_serving.cluster.affinity import Affinity, preference
from casa_serving.cluster.image_digests import digest_images
from casa_serving.cluster.routing_context import RoutingContext
from ray_router import make_router, route

pytestmark = pytest.mark.unit


def remembering(**images):
    """Affinity in which each replica has seen the images."""
    affinity = Affinity(max_images=4, max_sessions=2)
    for replica, seen in images.items():
        affinity.record(replica, None, seen)
    return affinity


def order(affinity, images, loads, max_imbalance=4):
    hits = {replica: affinity.num_images_on(replica, images) for replica in loads}
    return preference(hits, loads, max_imbalance, images[0] if images else "request")


def test_the_replica_with_most_images_comes_first():
    affinity = remembering(a=["x"], b=["x", "y"], c=[])
    assert order(affinity, ["x", "y"], {"a": 0, "b": 3, "c": 0})[:2] == ["b", "a"]


def test_a_replica_that_is_too_busy_is_passed_over():
    affinity = remembering(a=["x"], b=[])
    assert order(affinity, ["x"], {"a": 3, "b": 0}) == ["a", "b"]
    assert order(affinity, ["x"], {"a": 4, "b": 0}) == ["b", "a"]


def test_unknown_images_go_to_the_least_loaded():
    assert order(remembering(), ["new"], {"a": 2, "b": 1, "c": 3}) == ["b", "a", "c"]


def test_equal_replicas_are_preferred_alike_everywhere_and_evenly():
    firsts = [order(remembering(), [f"image {i}"], {"a": 0, "b": 0})[0] for i in range(200)]
    again = [order(remembering(), [f"image {i}"], {"b": 0, "a": 0})[0] for i in range(200)]
    assert firsts == again
    assert 70 <= firsts.count("a") <= 130


def test_the_oldest_images_and_sessions_are_forgotten():
    affinity = remembering(a=["1", "2", "3", "4", "5"])
    assert affinity.num_images_on("a", ["1"]) == 0
    assert affinity.num_images_on("a", ["2", "5"]) == 2
    for session in "uvw":
        affinity.record("a", session, [])
    assert [affinity.session_replica(session) for session in "uvw"] == [None, "a", "a"]


def test_a_replica_that_is_gone_is_still_the_home_of_its_sessions():
    affinity = Affinity(max_images=4, max_sessions=4)
    affinity.record("a", "s", ["x"])
    affinity.keep_only(["b"])
    assert affinity.num_images_on("a", ["x"]) == 0
    assert affinity.session_replica("s") == "a"


@pytest.mark.parametrize("late", ["a", "b"])
async def test_a_replica_that_did_not_answer_in_time_has_not_seen_the_images(late):
    router = make_router()
    (replica,) = [each for each in router.curr_replicas.values() if each.replica_id.unique_id == late]
    replica.is_late = True
    home = await route(router, RoutingContext(images=("x",)))
    assert home != late
    replica.is_late = False
    again = RoutingContext(images=("x",))
    assert (await route(router, again), again.affinity) == (home, "hit")


def image(url, **fields):
    return {"type": "image_url", "image_url": {"url": url}, **fields}


def test_images_are_named_by_content_or_uuid():
    one, two = "data:image/png;base64,AAAA", "data:image/png;base64,BBBB"
    text = {"type": "text", "text": "and"}
    messages = [{"role": "user", "content": [image(one), text, image(two)]}, {"role": "user", "content": [image(one)]}]
    names = digest_images(messages)
    assert len(names) == len(set(names)) == 2
    assert digest_images([{"content": [image(two)]}]) == names[1:]
    by_uuid = digest_images([{"content": [image(one, uuid="u")]}])
    assert digest_images([{"content": [{"type": "image_url", "image_url": None, "uuid": "u"}]}]) == by_uuid
    assert by_uuid != digest_images([{"content": [image("u")]}])
    assert len(digest_images([{"content": [image(one, uuid="u" * 1_000_000)]}])[0]) == len(by_uuid[0])


def test_what_is_no_image_has_no_name():
    assert digest_images(None) == ()
    messages = [{"role": "user", "content": "text"}, "message", {"content": ["part", {"image_url": 3}]}]
    assert digest_images(messages) == ()


def test_large_images_are_named_as_well():
    large = "data:image/png;base64," + "A" * 2_000_000
    assert digest_images([{"content": [image(large)]}]) != digest_images([{"content": [image(large + "B")]}])
