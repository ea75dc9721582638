"""What a cluster configuration may say, and the sentence for what it may not."""

import pytest

from casa_engine.errors import InputError
from casa_serving.cluster.config import parse_config
from casa_serving.options.image_limits import ImageLimits
from casa_serving.options.live_options import LiveOptions

pytestmark = pytest.mark.unit


def test_an_empty_configuration_serves_the_embedded_model():
    config = parse_config({})
    assert config.checkpoint is None
    assert (config.replicas.min, config.replicas.max) == (1, 1)
    assert ImageLimits(**config.images.model_dump(exclude={"allowed_media_domains"})) == ImageLimits()


def test_live_sessions_have_the_limits_of_casa_serve():
    config = parse_config({})
    assert config.live.options(config.images.max_image_bytes) == LiveOptions()
    small = parse_config({"images": {"max_image_bytes": 1000}, "live": {"max_sessions": 0, "text_budget": 64}})
    assert small.live.options(1000) == LiveOptions(live_max_sessions=0, live_max_frame_bytes=1000, live_text_budget=64)


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"replica": 2}, "there is no key 'replica'"),
        ({"replicas": {"mim": 2}}, "there is no key 'replicas.mim'"),
        ({"replicas": {"min": 3, "max": 2}}, "max (2) is below min (3)"),
        ({"replicas": {"min": 0}}, "replicas.min: input should be greater than 0, got 0"),
        ({"cpus": 0}, "cpus: input should be greater than 0"),
        ({"device": "tpu"}, "device: input should be 'auto', 'cpu' or 'gpu', got 'tpu'"),
        ({"engine": {"model": "other"}}, "engine sets ['model']"),
        ({"concurrency": {"running": "many"}}, "concurrency.running"),
        ({"live": {"max_sessions": -1}}, "live.max_sessions: input should be greater than or equal to 0, got -1"),
        ({"live": {"idle_timeout": 3}}, "there is no key 'live.idle_timeout'"),
        ({"replicas": {"target_late_frames": 2}}, "replicas.target_late_frames: input should be less than"),
    ],
)
def test_what_is_wrong_is_named_in_one_sentence(args, said):
    with pytest.raises(InputError, match=r"^The cluster configuration is wrong: ") as caught:
        parse_config(args)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
