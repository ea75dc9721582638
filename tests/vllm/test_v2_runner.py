"""vLLM's Model Runner V2, which serves GPUs, against the eager model, on a CPU.

Triton's interpreter runs its kernels and ours (see support/interpreted_triton.py). It has to be
switched on before vLLM is imported, so the tests run in a pytest of their own that the first one
starts; there are few of them, because that decodes some 45 tokens a second.
"""

import pytest
import torch

from casa_engine.live.caption_logits import CaptionRules, CaptionState, caption_logits, to_dict
from interpreter_process import IS_V2, V2, check_under_interpreter
from vllm_fuzz import FEW_PAGES, fuzz
from vllm_harness import BARE_IMAGE, IMAGE, Prompt, assert_same, picture

NUM_TOKENS = 4
# Prompts longer than this are cut into chunks.
STEP_TOKENS = 64

PROMPTS = [
    Prompt("hello"),
    Prompt(f"{BARE_IMAGE}{BARE_IMAGE}two {IMAGE} one", tuple(picture(i, 56, 28 * i) for i in (1, 2, 3))),
    Prompt(f"Text that is cut into chunks, before and after {IMAGE} the image in it.", (picture(4, 140, 84),)),
    Prompt(f"last: {BARE_IMAGE}", (picture(1, 56, 28),)),
]
MODELS = [
    pytest.param(("tiny-llama", "ca"), id="llama-ca"),
    pytest.param(("tiny-qwen", "ca_tv"), id="qwen-ca_tv"),
    pytest.param(("tiny-llama", "ca_tv"), id="llama-ca_tv", marks=pytest.mark.slow),
    pytest.param(("tiny-qwen", "ca"), id="qwen-ca", marks=pytest.mark.slow),
    pytest.param(("tiny-qwen3", "ca_tv"), id="qwen3-ca_tv", marks=pytest.mark.slow),
]

in_v2 = pytest.mark.skipif(not IS_V2, reason="runs in the process that test_in_a_process_of_their_own starts")


@pytest.mark.vllm
@pytest.mark.skipif(IS_V2, reason="this is that process")
@pytest.mark.parametrize("tier", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
def test_in_a_process_of_their_own(tier):
    check_under_interpreter(__file__, *V2, "-m", tier, timeout_s=900 if tier == "not slow" else 3600)


@pytest.fixture(scope="module", params=MODELS)
def v2(request, engine, checkpoints):
    """Folder and engine of a model on the second runner; the tests of a model share it."""
    preset, fusion = request.param
    folder = checkpoints(preset, fusion=fusion)
    limits = {"max_num_seqs": 4, "max_num_batched_tokens": STEP_TOKENS}
    return folder, engine(folder, poison=True, **limits, limit_mm_per_prompt={"image": 3})


def runner_of(engine):
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    runner = engine.engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
    assert isinstance(runner, GPUModelRunner)
    return runner


@in_v2
def test_equals_eager_cold_and_warm(v2, eager):
    folder, engine = v2
    engine.scheduler.reset_encoder_cache()
    engine.forget_text()
    expected = [eager(folder)(prompt, NUM_TOKENS) for prompt in PROMPTS]
    text_model = runner_of(engine).model.model.language_model
    assert text_model.stacked_images.is_usable, "image keys of all layers are to be written in one go, as on a GPU"
    assert text_model.joint.is_usable, "both attentions of a layer are to be projected as one, as on a GPU"
    encoded = engine.images.counters.images_encoded
    assert_same(engine.ask(PROMPTS, NUM_TOKENS), expected)
    assert engine.images.counters.images_encoded == encoded + 4, "the fifth image is the first's"
    # Again: text from the prefix cache, images from the pages of the run before.
    assert_same(engine.ask(PROMPTS[::-1], NUM_TOKENS), expected[::-1])
    assert engine.images.counters.images_encoded == encoded + 4


@in_v2
def test_rules_of_live_sessions(v2, eager):
    """Rows with rules choose what the reference chooses; those beside them know nothing of it."""
    folder, engine = v2
    oracle, num_tokens = eager(folder), 10
    rules = CaptionRules((5,), 1.5, 0.9, 5.0, 0.8, 2, 20)
    names, expected = [], []
    for prompt in PROMPTS[:3]:
        batch = dict(oracle.processor(images=list(prompt.images) or None, text=prompt.text))
        state = CaptionState().read(batch["input_ids"][0].tolist(), rules)
        names.append(engine.add(prompt, num_tokens, extra_args={"casa_live": to_dict(state, rules)}))
        expected.append(chosen_by_rules(oracle.model, batch, state, rules, num_tokens))
    names.append(engine.add(PROMPTS[0], num_tokens))
    plain = oracle(PROMPTS[0], num_tokens).tokens
    answers = engine.run()
    assert [answers[name].tokens for name in names] == [*expected, plain]
    assert expected[0] != plain, "rules that change nothing show nothing"


@torch.inference_mode()
def chosen_by_rules(model, batch, state, rules, num_tokens):
    """Greedy tokens of the eager model under the reference's rules."""
    cache, chosen = model.new_cache(), []
    for _ in range(num_tokens):
        state = state.decay_counts(rules)
        logits = model(**batch, past_key_values=cache, logits_to_keep=1).logits[0, -1].float()
        chosen.append(int(caption_logits(logits, state, rules).argmax()))
        state = state.read(chosen[-1:], rules)
        batch = {"input_ids": torch.tensor([chosen[-1:]])}
    return chosen


@in_v2
@pytest.mark.slow
@pytest.mark.parametrize("model", MODELS[:2])
@pytest.mark.parametrize(
    "options",
    [{}, {"is_async": True}, {"scheduling_policy": "priority"}, {"enable_prefix_caching": False}],
    ids=["first-come", "async", "priority", "no-prefix-cache"],
)
def test_random_requests(model, options, engine, checkpoints, eager):
    preset, fusion = model
    folder = checkpoints(preset, fusion=fusion)
    fuzz(engine(folder, poison=True, **FEW_PAGES, **options), eager(folder), seed=1, count=8)


@in_v2
def test_prompt_embeddings_are_refused(checkpoints):
    from vllm.engine.arg_utils import EngineArgs

    arguments = EngineArgs(
        model=str(checkpoints("tiny-llama", fusion="ca")), dtype="float32", enable_prompt_embeds=True
    )
    with pytest.raises(ValueError, match="prompt embeddings on Model Runner V2"):
        arguments.create_engine_config()


@in_v2
def test_an_engine_without_images(engine, checkpoints, eager):
    """With a limit of no image vLLM gives the runner no cache of encoders at all."""
    folder = checkpoints("tiny-llama", fusion="ca")
    vllm = engine(folder, max_num_seqs=4, max_num_batched_tokens=STEP_TOKENS, limit_mm_per_prompt={"image": 0})
    assert_same(vllm.ask(PROMPTS[:1], NUM_TOKENS), [eager(folder)(PROMPTS[0], NUM_TOKENS)])


@in_v2
def test_decode_from_the_buffers_of_a_graph(v2, eager, monkeypatch):
    """CA layers read what `prepare_attn` returned at capture, as a replayed CUDA graph does.

    Sequences come and go under it, so that the batch is smaller than the graph and rows are
    padding. Self-attention is vLLM's own and runs eagerly.
    """
    from replayed_graphs import use_graphs

    folder, engine = v2
    replays = use_graphs(runner_of(engine), [4], monkeypatch)
    lengths = [2, 6, 4, 3]
    names = [engine.add(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    answers = engine.run()
    expected = [eager(folder)(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert_same([answers[name] for name in names], expected)
    sizes = {batch.num_reqs for batch in replays if batch.max_query_len is None}
    assert len(sizes) > 1, f"decode batches of {sizes} requests; expected several sizes"


@in_v2
def test_short_prefills_are_replayed(v2, eager, monkeypatch):
    """Chunks of several windows beside requests that decode, each step of them one graph with padding."""
    from replayed_graphs import use_graphs

    folder, engine = v2
    engine.forget_text()
    engine.engine.step()  # the worker hears with the next step which requests of other tests have ended
    replays = use_graphs(runner_of(engine), [4, 16, STEP_TOKENS], monkeypatch)
    lengths = [12, 5, 4, 3]
    names = [engine.add(PROMPTS[0], lengths[0])]
    for _ in range(3):
        engine._step()
    names += [engine.add(prompt, length) for prompt, length in zip(PROMPTS[1:], lengths[1:], strict=True)]
    answers = engine.run()
    expected = [eager(folder)(prompt, length) for prompt, length in zip(PROMPTS, lengths, strict=True)]
    assert_same([answers[name] for name in names], expected)
    mixed = [batch for batch in replays if 1 in batch.num_scheduled_tokens and (batch.num_scheduled_tokens > 1).any()]
    assert any((batch.num_scheduled_tokens > 1).sum() > 1 for batch in mixed), "no step had chunks beside a decode"
    assert any(batch.num_tokens < batch.num_tokens_after_padding for batch in mixed), "no graph was larger than a step"
    decodes = [batch for batch in replays if batch.max_query_len is None]
    assert decodes and all((batch.num_scheduled_tokens == 1).all() for batch in decodes)
    assert {batch.max_query_len for batch in replays} == {None, STEP_TOKENS}


@in_v2
def test_what_a_gpu_worker_runs_before_serving(v2, eager):
    """Warm-up steps of made-up requests, and dummy batches with attention; then a real answer."""
    from vllm.v1.worker.gpu.warmup import run_mixed_prefill_decode_warmup

    folder, engine = v2
    engine.forget_text()
    engine.engine.step()  # the worker hears with the next step which requests of other tests have ended
    worker = engine.engine.engine_core.engine_core.model_executor.driver_worker.worker
    assert run_mixed_prefill_decode_warmup(runner_of(engine), worker.execute_model, worker.sample_tokens, num_tokens=6)
    runner_of(engine)._dummy_run(3, uniform_decode=True)
    runner_of(engine)._dummy_run(8)
    # The warm-up wrote into blocks that the engine believes empty: nothing may be left of it.
    assert_same(engine.ask(PROMPTS[1:2], NUM_TOKENS), [eager(folder)(PROMPTS[1], NUM_TOKENS)])
