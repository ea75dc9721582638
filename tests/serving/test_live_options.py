"""What the command line says about live sessions, and what is made of it."""

from types import SimpleNamespace

import pytest
from starlette.datastructures import Headers

from casa_engine.errors import InputError
from casa_engine.live import LiveSettings
from casa_serving import cli
from casa_serving.endpoint.request_guard import is_allowed_origin
from casa_serving.engine_defaults import plugins_with
from casa_serving.live import endpoint
from casa_serving.options.live_options import MAX_FRAME_BYTES, LiveOptions
from casa_vllm.api import CAPTION_PROCESSOR

pytestmark = pytest.mark.unit


def test_every_plugin_that_would_be_loaded_still_is():
    assert set(plugins_with(["casa_live"], None).split(",")) >= {"casa", "casa_media", "casa_images", "casa_live"}
    assert plugins_with(["casa_live"], "casa,other") == "casa,other,casa_live"
    assert plugins_with(["casa_live"], "") == "casa_live"


NO_SECONDS = "must be seconds, more than 0 and at most 604800"
BAD_OPTIONS = [
    ("max_sessions", -1, "must be a whole number of at least 0 (0 turns live sessions off)"),
    ("max_frame_bytes", 0, "must be a whole number of at least 1"),
    ("text_budget", 0, "must be a whole number of at least 1"),
    *[
        (f"{name}_timeout", value, NO_SECONDS)
        for name in ("idle", "create", "send")
        for value in (0.0, -1.0, float("nan"), float("inf"), 1e300)
    ],
]


@pytest.mark.parametrize(("name", "value", "said"), BAD_OPTIONS)
def test_options_that_make_no_sense(name, value, said):
    with pytest.raises(InputError) as refused:
        LiveOptions(**{f"live_{name}": value})
    assert str(refused.value) == f"--live-{name.replace('_', '-')} {said}, got {value!r}."


def test_no_sessions_and_the_longest_times_are_taken():
    LiveOptions(live_max_sessions=0, live_idle_timeout=604_800.0, live_send_timeout=1e-3)


def test_a_frame_is_never_larger_than_an_image_or_a_message():
    given = {"live_max_frame_bytes": 10**9}
    assert LiveOptions.from_arguments(given | {"max_image_bytes": 1000}).live_max_frame_bytes == 1000
    assert LiveOptions.from_arguments(given | {"max_image_bytes": 10**9}).live_max_frame_bytes == MAX_FRAME_BYTES


@pytest.mark.parametrize(("sessions", "on_cpu", "added"), [(0, True, False), (8, True, True), (8, False, False)])
def test_the_logits_processor_is_for_live_sessions_on_a_cpu(random_checkpoint, monkeypatch, sessions, on_cpu, added):
    monkeypatch.setattr(cli, "runs_on_cpu", lambda: on_cpu)
    args, _ = cli.parse([str(random_checkpoint), "--live-max-sessions", str(sessions)])
    assert (CAPTION_PROCESSOR in (args.logits_processors or [])) is added


@pytest.mark.parametrize(("asked", "in_force"), [(None, 512), (256, 256), (4096, 512)])
def test_a_servers_budget_bounds_the_default(monkeypatch, asked, in_force):
    def scripted(client, checkpoint):
        return SimpleNamespace(defaults=LiveSettings(text_budget=512))

    monkeypatch.setattr(endpoint, "LiveEngine", scripted)
    client = SimpleNamespace(model_config=SimpleNamespace(max_model_len=1024))
    options = LiveOptions(live_text_budget=asked)
    assert endpoint.open_engine(client, "checkpoint", options).defaults.text_budget == in_force


@pytest.mark.parametrize(
    ("origin", "is_own"),
    [(None, True), ("http://here:8000", True), ("http://there", False), ("http://[::1", False), ("null", False)],
)
def test_pages_of_other_origins_are_strangers(origin, is_own):
    headers = {"host": "here:8000"} | ({} if origin is None else {"origin": origin})
    assert is_allowed_origin(Headers(headers), []) is is_own
