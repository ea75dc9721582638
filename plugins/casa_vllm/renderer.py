"""vLLM's renderer, which checks the parts of messages and binds the clients' names of images to the client.

It runs for every path, and in the task of the request, whose context has the owner of the names
(`casa_engine.image_owner`); the image processor runs in threads without that context.

vLLM has a single thread for images, whatever `--renderer-num-workers` is: its caches in the server and in the engine
must see images in one order. Ours need not agree (`image_items.py`), so here the option counts for images, too.
"""

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from vllm.renderers.hf import HfRenderer
from vllm.utils.async_utils import make_async

from casa_engine.image_owner import scope_image_name
from casa_vllm.content_parts import checked_messages

if TYPE_CHECKING:
    from vllm.config import VllmConfig

MODE = "casa"


class CasaRenderer(HfRenderer):
    """Registered under vLLM's tokenizer mode "casa", which CASA's config hook chooses."""

    def __init__(self, config: "VllmConfig", tokenizer: Any) -> None:
        super().__init__(config, tokenizer)
        num_workers = config.model_config.renderer_num_workers
        self._workers = self._process_images_async = None
        if num_workers > 1:
            self._workers = ThreadPoolExecutor(num_workers, "casa-render")
            self._process_images_async = make_async(super()._process_tokens, executor=self._workers)

    def shutdown(self) -> None:
        """End the threads, after what they render now."""
        super().shutdown()
        if self._workers is not None:
            self._workers.shutdown(wait=False)

    def render_messages(self, messages: list[Any], params: Any) -> Any:
        """Render messages as vLLM does, after checking them."""
        return super().render_messages(self._checked(messages), params)

    async def render_messages_async(self, messages: list[Any], params: Any) -> Any:
        """As `render_messages`."""
        return await super().render_messages_async(self._checked(messages), params)

    def clear_mm_cache(self) -> None:
        """Clear vLLM's cache, and the processor's own, which vLLM 0.32 does not know."""
        super().clear_mm_cache()
        if self.mm_processor is not None:
            self.mm_processor.clear_cache()

    def _checked(self, messages: list[Any]) -> list[Any]:
        return checked_messages(messages, takes_prompt_embeds=self.model_config.enable_prompt_embeds)

    def _process_tokens(self, prompt: Any, **options: Any) -> Any:
        return super()._process_tokens(with_owned_names(prompt), **options)

    async def _process_tokens_async(self, prompt: Any, **options: Any) -> Any:
        prompt = with_owned_names(prompt)
        if self._process_images_async is None or not prompt.get("multi_modal_data"):
            return await super()._process_tokens_async(prompt, **options)
        return await self._process_images_async(prompt, **options)


def with_owned_names(prompt: dict[str, Any]) -> dict[str, Any]:
    """Return a tokenized prompt with its UUIDs replaced.

    Raises:
        InputError: A UUID is no string.
    """
    named = prompt.get("multi_modal_uuids")
    if not named:
        return prompt
    salt = prompt.get("cache_salt")
    owned = {
        modality: [
            None if uuid is None else scope_image_name(uuid, salt)
            for uuid in ([uuids] if isinstance(uuids, str) else uuids or ())
        ]
        for modality, uuids in named.items()
    }
    return {**prompt, "multi_modal_uuids": owned}


def register_renderer() -> None:
    """Register the mode with vLLM. Idempotent."""
    from vllm.renderers.registry import RENDERER_REGISTRY
    from vllm.tokenizers.registry import TokenizerRegistry

    if MODE not in RENDERER_REGISTRY.renderers:
        RENDERER_REGISTRY.register(MODE, __name__, CasaRenderer.__name__)
    if MODE not in TokenizerRegistry.tokenizers:
        module, name = TokenizerRegistry.tokenizers["hf"]
        TokenizerRegistry.register(MODE, module, name)
