"""Two ranks: heads are sharded, key heads repeated where there are fewer than ranks."""

import pytest

from vllm_harness import IMAGE, Answer, Prompt, assert_same, picture

NUM_TOKENS = 6


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("fusion", ["ca", "ca_tv"])
def test_two_ranks(fusion, checkpoints, eager):
    from vllm import LLM, SamplingParams

    folder = checkpoints("tiny-qwen", fusion=fusion)
    prompts = [
        Prompt("no image"),
        Prompt(f"one {IMAGE} two {IMAGE}", (picture(1), picture(2, 84, 56))),
    ]
    llm = LLM(
        str(folder),
        dtype="float32",
        enforce_eager=True,
        max_model_len=256,
        max_num_batched_tokens=256,
        block_size=32,
        num_gpu_blocks_override=100,
        tensor_parallel_size=2,
        distributed_executor_backend="mp",
    )
    params = SamplingParams(temperature=0, max_tokens=NUM_TOKENS, logprobs=0, ignore_eos=True)
    outputs = llm.generate([prompt.for_vllm() for prompt in prompts], params)
    answers = []
    for output in outputs:
        tokens = list(output.outputs[0].token_ids)
        steps = zip(tokens, output.outputs[0].logprobs, strict=True)
        answers.append(Answer(tokens, [step[token].logprob for token, step in steps]))
    assert_same(answers, [eager(folder)(prompt, NUM_TOKENS) for prompt in prompts])
