"""What the command line says about live sessions, and what is made of it."""

import pytest

from casa_engine.errors import InputError
from casa_serving import cli
from casa_serving.defaults import plugins_with_live
from casa_serving.live.options import MAX_FRAME_BYTES, LiveOptions


def test_every_plugin_that_would_be_loaded_still_is():
    assert set(plugins_with_live(None).split(",")) >= {"casa", "casa_media", "casa_images", "casa_live"}
    assert plugins_with_live("casa,other") == "casa,other,casa_live"
    assert plugins_with_live("") == "casa_live"


@pytest.mark.parametrize(("name", "value"), [("max_sessions", -1), ("idle_timeout", 0.0), ("max_frame_bytes", 0)])
def test_options_that_make_no_sense(name, value):
    with pytest.raises(InputError, match=f"--live-{name.replace('_', '-')}"):
        LiveOptions(**{f"live_{name}": value})


def test_a_frame_is_never_larger_than_an_image_or_a_message():
    given = {"live_max_frame_bytes": 10**9}
    assert LiveOptions.from_arguments(given | {"max_image_bytes": 1000}).live_max_frame_bytes == 1000
    assert LiveOptions.from_arguments(given | {"max_image_bytes": 10**9}).live_max_frame_bytes == MAX_FRAME_BYTES


@pytest.mark.parametrize(("sessions", "on_cpu", "added"), [(0, True, False), (8, True, True), (8, False, False)])
def test_the_logits_processor_is_for_live_sessions_on_a_cpu(random_checkpoint, monkeypatch, sessions, on_cpu, added):
    monkeypatch.setattr(cli, "on_cpu", lambda: on_cpu)
    args, _ = cli.parse([str(random_checkpoint), "--live-max-sessions", str(sessions)])
    assert (cli.CAPTION_PROCESSOR in (args.logits_processors or [])) is added
