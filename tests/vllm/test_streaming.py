"""A session whose prompt grows by a chunk with an image, through AsyncLLM in processes of its own."""

import asyncio

import pytest
import torch

from casa_vllm.image_cache_spec import MAX_IMAGES_PER_WINDOW
from vllm_harness import BARE_IMAGE, IMAGE, Answer, Prompt, assert_same, picture

pytestmark = pytest.mark.vllm
NUM_CHUNKS, NUM_TOKENS = 30, 2


def chunk(index):
    return Prompt(f"{IMAGE}{index} ", (picture(60 + index, 56, 28 if index % 3 else 112),))


async def stream(folder):
    """Answers of all chunks."""
    from vllm import SamplingParams
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.engine.protocol import StreamingInput
    from vllm.renderers.inputs.preprocess import parse_model_prompt
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.async_llm import AsyncLLM

    engine = AsyncLLM.from_engine_args(
        AsyncEngineArgs(
            model=str(folder),
            dtype="float32",
            enforce_eager=True,
            max_model_len=1024,
            max_num_batched_tokens=64,
            block_size=32,
            num_gpu_blocks_override=120,
            limit_mm_per_prompt={"image": 4},
        )
    )
    params = SamplingParams(
        temperature=0,
        max_tokens=NUM_TOKENS,
        logprobs=0,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA,
    )
    answers, done = [Answer() for _ in range(NUM_CHUNKS)], asyncio.Event()

    async def chunks():
        for index in range(NUM_CHUNKS):
            parsed = parse_model_prompt(engine.model_config, chunk(index).for_vllm())
            renderer = engine.renderer
            (prompt,) = await renderer.render_cmpl_async([parsed], renderer.default_cmpl_tok_params)
            done.clear()
            yield StreamingInput(prompt, params)
            await done.wait()

    index = 0
    try:
        async for output in engine.generate(chunks(), params, "session"):
            for completion in output.outputs:
                answers[index].tokens += completion.token_ids
                steps = zip(completion.token_ids, completion.logprobs or (), strict=True)
                answers[index].logprobs += [step[token].logprob for token, step in steps]
            if len(answers[index].tokens) == NUM_TOKENS:
                index = min(index + 1, NUM_CHUNKS - 1)
                done.set()
    finally:
        engine.shutdown()
    return answers


@pytest.mark.parametrize(("preset", "fusion"), [("tiny-qwen", "ca_tv"), ("tiny-llama", "ca")], ids=["ca_tv", "ca"])
async def test_thirty_chunks_with_an_image_each(preset, fusion, checkpoints, eager):
    folder = checkpoints(preset, fusion=fusion)
    answers = await stream(folder)

    assert_same(answers, continued(eager(folder)))


@torch.inference_mode()
def continued(oracle):
    """The eager model over the same chunks.

    Like vLLM it goes on from the tokens that were computed: the last one of each answer was only
    sampled and is not part of the session.
    """
    cache, answers = oracle.model.new_cache(), []
    for index in range(NUM_CHUNKS):
        prompt, answer = chunk(index), Answer()
        batch = dict(oracle.processor(images=list(prompt.images), text=prompt.text))
        for _ in range(NUM_TOKENS):
            output = oracle.model(**batch, past_key_values=cache)
            logprobs = output.logits[0, -1].float().log_softmax(-1)
            token = int(logprobs.argmax())
            answer.tokens.append(token)
            answer.logprobs.append(float(logprobs[token]))
            batch = {"input_ids": torch.tensor([[token]])}
        answers.append(answer)
    return answers


SMALL = {"max_num_batched_tokens": 64, "max_model_len": 256}


@pytest.mark.parametrize("preset_fusion", [("tiny-llama", "ca"), ("tiny-qwen", "ca_tv")], ids=["ca", "ca_tv"])
def test_a_window_over_two_chunks_has_limits(preset_fusion, checkpoints, eager, engine):
    """It may not exceed what one step encodes (128 tokens here); once it stalled the engine, and with it everybody."""
    preset, fusion = preset_fusion
    folder = checkpoints(preset, fusion=fusion)
    vllm = engine(folder, poison=True, **SMALL)
    free = vllm.num_free_blocks
    large, medium, small = picture(1, 336, 224), picture(2, 224, 168), picture(3, 56, 56)
    vllm.send_chunk("session", Prompt(f"abc{BARE_IMAGE}", (large,)), 1)
    first, _ = vllm.answer_chunk("session")

    vllm.send_chunk("session", Prompt(f"{BARE_IMAGE}de", (medium,)), 1)
    bystander = vllm.add(Prompt(f"see {IMAGE} now", (small,)), 2)
    refused, completion = vllm.answer_chunk("session")
    assert completion.finish_reason == "error"
    assert completion.stop_reason.startswith("2 adjacent images share one window and have 144 tokens")
    assert refused.tokens == []

    many = MAX_IMAGES_PER_WINDOW
    vllm.send_chunk("session", Prompt(f"{BARE_IMAGE * many}de", (picture(4, 28, 28),) * many), 1)
    assert f"{many + 1} adjacent images" in vllm.answer_chunk("session")[1].stop_reason
    vllm.send_chunk("session", Prompt("x" * 255), 1)
    assert "fewer than 256 together" in vllm.answer_chunk("session")[1].stop_reason
    with pytest.raises(ValueError, match="no text token"):
        vllm.send_chunk("session", Prompt(BARE_IMAGE, (small,)), 1)

    # The session goes on as if nothing had been sent, and so does everybody else.
    vllm.send_chunk("session", Prompt(f"{BARE_IMAGE}de", (small,)), 2)
    last, _ = vllm.answer_chunk("session")
    assert len(vllm.run_until(lambda answers: bystander in answers)[bystander].tokens) == 2
    together = Prompt(f"abc{BARE_IMAGE}{BARE_IMAGE}de", (large, small))
    assert_same([first, last], [eager(folder)(Prompt("abc"), 1), eager(folder)(together, 2)])
    vllm.engine.abort_request(["session"], internal=True)
    assert vllm.num_free_blocks == free


def test_idle_sessions_hold_up_nobody(checkpoints, eager, engine):
    """Sessions that hold all pages, two of which need more: stock vLLM preempts none of them, and nothing runs."""
    folder = checkpoints("tiny-llama", fusion="ca")
    vllm = engine(folder, poison=True, num_gpu_blocks_override=80, **SMALL)
    text = "The quick brown fox jumps over the lazy dog. " * 4
    sessions = [f"session-{index}" for index in range(10)]
    for index, session in enumerate(sessions):
        vllm.send_chunk(session, Prompt(f"{index}{text}"), 1)
        vllm.answer_chunk(session)
    image = picture(5, 336, 224)
    prompts = [Prompt(f"{IMAGE}{text}{index}", (image,)) for index in range(4)]
    names = [vllm.add(prompt, 4) for prompt in prompts]
    for session in sessions[:3]:
        vllm.send_chunk(session, Prompt(" and on."), 1)
    answers = vllm.run_until(lambda answers: len(answers) == len(names))
    assert_same([answers[name] for name in names], [eager(folder)(prompt, 4) for prompt in prompts])
    # A session whose pages were taken computes its text again.
    vllm.send_chunk(sessions[9], Prompt(" Bye."), 2)
    answer, _ = vllm.answer_chunk(sessions[9])
    assert_same([answer], [eager(folder)(Prompt(f"9{text} Bye."), 2)])
    assert vllm.engine.reset_prefix_cache(reset_running_requests=True)
    vllm.engine.abort_request(sessions, internal=True)
