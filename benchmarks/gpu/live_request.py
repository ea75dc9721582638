"""A live session as the engine sees it: a request that grows by a frame at a time, sampled by the captioner's rules."""

from typing import Any

from bench_engine import IMAGE, BenchEngine

from casa_bench.engine_backend import add_chunk, render
from casa_engine.live.caption_logits import EXTRA_ARG, CaptionRules, CaptionState, to_dict
from casa_engine.live.settings import LiveSettings

STOP_ID = 5
# Of a session's frame; the byte tokenizer gives a token a character and two an image.
FRAME_TEXT = "seen:" + IMAGE + "next one now:"
MAX_STEPS = 1000


def caption_params(max_tokens: int, **options: Any) -> Any:
    """Return vLLM's parameters of a session that says exactly so many tokens, with the published captioner's rules."""
    from vllm import SamplingParams

    settings = LiveSettings()
    rules = CaptionRules(
        (STOP_ID,),
        settings.repetition_penalty,
        settings.penalty_decay,
        settings.penalty_clamp,
        settings.stop_bias,
        settings.ngram_size,
        settings.ngram_window,
    )
    state = CaptionState().read(list(range(40, 60)), rules)
    return SamplingParams(
        temperature=settings.temperature,
        top_k=settings.top_k,
        max_tokens=max_tokens,
        ignore_eos=True,
        detokenize=False,
        extra_args={EXTRA_ARG: to_dict(state, rules)},
        **options,
    )


class LiveRequest:
    """One session in an engine of this process; `close` it, or nothing else can be finished.

    Args:
        bench: The engine.
        name: Of the request.
    """

    def __init__(self, bench: BenchEngine, name: str) -> None:
        self._bench, self._name = bench, name

    def show(self, frame: Any, num_tokens: int) -> None:
        """Show a frame and step until it has its caption of so many tokens."""
        from vllm.sampling_params import RequestOutputKind

        engine = self._bench.engine
        prompt = render(engine, {"prompt": FRAME_TEXT, "multi_modal_data": {"image": frame}})
        params = caption_params(num_tokens, output_kind=RequestOutputKind.DELTA)
        add_chunk(engine, self._name, prompt, params)
        for _ in range(MAX_STEPS):
            for output in engine.step():
                if output.request_id == self._name and output.outputs[0].finish_reason is not None:
                    return
        raise RuntimeError(f"{MAX_STEPS} steps, and a frame has no caption.")

    def close(self) -> None:
        """Free its pages."""
        self._bench.engine.abort_request([self._name])
        self._bench.finish()
