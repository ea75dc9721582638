"""Asynchronous scheduling: on wherever vLLM has it on for its own scheduler, and really two steps in flight.

vLLM's warning about custom scheduler classes ("async scheduling being disabled") is printed for every custom scheduler,
whatever it is: what it warns of is shown here not to be so. That answers stay right is tested beside everything else
(`is_async` in test_image_pages.py, test_live_text.py, test_scheduler_simulation.py and test_v2_runner.py).
"""

import logging

import pytest
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.v1.core.sched.async_scheduler import AsyncScheduler

from casa_vllm.scheduler import CasaAsyncScheduler
from vllm_harness import IMAGE, Prompt, assert_same, picture

pytestmark = pytest.mark.vllm


@pytest.mark.parametrize("chosen", [None, True, False], ids=["default", "on", "off"])
def test_configuration_leaves_the_choice_to_vllm(chosen, checkpoints, monkeypatch):
    """What the platform of a GPU would find: CASA's hook comes first, and a CPU switches it off only afterwards."""
    found, cpu = [], type(current_platform)
    switch_off = cpu.check_and_update_config

    def record(config):
        found.append(config.scheduler_config.async_scheduling)
        switch_off(config)

    monkeypatch.setattr(cpu, "check_and_update_config", staticmethod(record))
    folder = str(checkpoints("tiny-llama", fusion="ca"))
    EngineArgs(model=folder, dtype="float32", max_model_len=256, async_scheduling=chosen).create_engine_config()
    assert found == [chosen is not False], "vLLM has it on unless it is switched off"


def test_two_steps_are_in_flight(engine, checkpoints, eager, caplog, monkeypatch):
    """A request's next step is scheduled before the token of the last one is known, and its placeholder is filled."""
    folder = checkpoints("tiny-llama", fusion="ca")
    logger = logging.getLogger("vllm.casa_scheduler")  # vLLM's loggers do not propagate
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    logger.setLevel(logging.INFO)
    vllm = engine(folder, is_async=True)
    assert "asynchronous scheduling is on" in caplog.text
    scheduler = vllm.scheduler
    assert isinstance(scheduler, AsyncScheduler)
    # vLLM's bookkeeping of tokens that are still to come is in effect, not a copy of it.
    for name in ("_update_after_schedule", "_update_request_with_output"):
        assert getattr(CasaAsyncScheduler, name) is getattr(AsyncScheduler, name)
    schedule, update, in_flight, most = scheduler.schedule, scheduler.update_from_output, [], []

    def count_schedule(*args, **kwargs):
        output = schedule(*args, **kwargs)
        if output.total_num_scheduled_tokens:
            in_flight.append(output)
            most.append((len(in_flight), max(request.num_output_placeholders for request in scheduler.running)))
        return output

    def count_update(output, *args, **kwargs):
        if output.total_num_scheduled_tokens:
            in_flight.remove(output)
        return update(output, *args, **kwargs)

    scheduler.schedule, scheduler.update_from_output = count_schedule, count_update
    prompt = Prompt(f"An image {IMAGE} in a text", (picture(1),))
    try:
        answers = vllm.ask([prompt], 8)
    finally:
        del scheduler.schedule, scheduler.update_from_output
    assert max(most) == (2, 2), f"(steps in flight, tokens to come) were {most}"
    assert not in_flight
    assert_same(answers, [eager(folder)(prompt, 8)])
