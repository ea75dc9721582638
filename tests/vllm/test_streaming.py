"""A session whose prompt grows by a chunk with an image, through AsyncLLM in processes of its own."""

import asyncio

import pytest
import torch

from vllm_harness import IMAGE, Answer, Prompt, assert_same, picture

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
def test_thirty_chunks_with_an_image_each(preset, fusion, checkpoints, eager):
    folder = checkpoints(preset, fusion=fusion)
    answers = asyncio.run(stream(folder))

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
