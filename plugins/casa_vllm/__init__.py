"""casa_vllm: CASA models in vLLM, out of tree.

Installing the distribution is enough: vLLM calls `register` (entry point group
`vllm.general_plugins`) in every process, and finds the architecture by the checkpoint's config.

    prompt -> renderer.py: names of images bound to the client
           -> processing.py: markers out of the stream, images attached to text positions
           -> image_items.py: one entry point for pixels, processed images kept by content
           -> scheduler.py, encoder_cache.py, image_manager.py: pages of images, shared by content
              sessions.py: prompts that grow by chunks, and that no mix of them stops the engine
           -> v1_runner.py (CPU) or v2_model_state.py (GPU): encode images, write their K/V
           -> model.py, cross_attention.py, ops/: self-attention + window attention
"""

ARCHITECTURE = "CasaForConditionalGeneration"
MODELS = ((ARCHITECTURE, "casa_vllm.model:CasaForConditionalGeneration"),)


def register() -> None:
    """Make vLLM know CASA: configuration, architecture, config hook, cache, renderer. Safe to call twice."""
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.model_executor.models.registry import ModelRegistry

    import casa_engine  # noqa: F401 (teaches transformers' AutoConfig the model_type "casa")
    from casa_vllm.config_hook import CasaConfigHook
    from casa_vllm.image_manager import register_image_cache
    from casa_vllm.renderer import register_renderer

    for architecture, path in MODELS:
        if architecture not in ModelRegistry.get_supported_archs():
            ModelRegistry.register_model(architecture, path)
        MODELS_CONFIG_MAP.setdefault(architecture, CasaConfigHook)
    # Here and not with the model: the engine process builds KV-cache groups without a model.
    register_image_cache()
    register_renderer()
