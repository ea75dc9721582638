"""CASA's changes to vLLM's configuration, and the options that it rejects."""

import os
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform

from casa_engine.configuration import CasaConfig
from casa_engine.originals.views import resolve_checkpoint
from casa_engine.untrusted_folder import check_folder
from casa_vllm.exit_messages import close_error_output_at_exit
from casa_vllm.renderer import MODE

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig

# vLLM's own splitting operators, and CASA's.
SPLITTING_OPS = (
    "vllm::unified_kv_cache_update",
    "vllm::unified_mla_kv_cache_update",
    "vllm::casa_cross_attention",
)
# Of a sequence in a step of CUDA graphs: a live frame's text, beside which the other sequences decode; and in all.
GRAPH_TOKENS_A_SEQUENCE, MAX_GRAPH_TOKENS = 32, 512


class CasaConfigHook(VerifyAndUpdateConfig):
    """Hooks called by vLLM for the architecture, before the engine starts."""

    @staticmethod
    def verify_and_update_model_config(model_config: "ModelConfig") -> None:
        """Select CASA's renderer, an original's view, and M-RoPE if the text uses it: insertion on Qwen backbones.

        CA text has one axis; only image keys have three. vLLM 0.32 treats any config with a field
        `mrope_section` as an M-RoPE model, so for CA the field has another name in the engine.

        Raises:
            CheckpointError: The folder may not be trusted, or is an original and fits no family.
        """
        close_error_output_at_exit()
        if model_config.tokenizer_mode not in ("auto", "hf", MODE):
            raise ValueError(
                f"tokenizer_mode is {model_config.tokenizer_mode!r}; CASA models work with 'auto' and 'hf': leave "
                "--tokenizer-mode out."
            )
        model_config.tokenizer_mode = MODE
        view = resolve_checkpoint(model_config.model)
        if view != Path(model_config.model):  # an original: its own tokenizer and processor are not used
            model_config.model = model_config.tokenizer = str(view)
        if view.is_dir():  # its configurations were checked before (see CasaConfig.from_dict); here also its files
            check_folder(view)
        config: CasaConfig = model_config.hf_config
        section = config.mrope_section
        if section is None:
            return
        if config.is_cross_attention:
            config.image_mrope_section, config.mrope_section = section, None
        else:
            config.text_config.rope_parameters["mrope_section"] = list(section)

    @staticmethod
    def verify_and_update_config(vllm_config: "VllmConfig") -> None:
        """Set scheduler, worker and caches of the CA fusions.

        Raises:
            ValueError: An option is not supported with CASA models.
        """
        from casa_vllm.compat import check_version

        check_version()
        _require_fast_encoder()
        config: CasaConfig = vllm_config.model_config.hf_config
        _reject_image_options(vllm_config)
        grammars = vllm_config.structured_outputs_config
        if grammars.backend == "auto":
            # An engine has one backend, that of the first grammar. With vLLM's "auto" a client's request is checked
            # with one that another client's first request may have replaced, and fails in the engine.
            grammars.backend = "xgrammar"
        if current_platform.is_cpu():
            _keep_worker_in_engine(vllm_config)
        else:
            _set_vision_encoder(vllm_config)
        if not config.is_cross_attention:
            return
        _reject_options(vllm_config)
        vllm_config.scheduler_config.scheduler_cls = "casa_vllm.scheduler.create_scheduler"
        vllm_config.scheduler_config.disable_hybrid_kv_cache_manager = False
        vllm_config.ec_manager_config.encoder_cache_manager_cls = "casa_vllm.encoder_cache.ImageEncoderCacheManager"
        config.vllm_encoder_budget = vllm_config.scheduler_config.max_num_encoder_input_tokens
        if current_platform.is_cpu():
            vllm_config.parallel_config.worker_cls = "casa_vllm.v1_runner.CasaCPUWorker"
            return
        if current_platform.is_cuda_alike() and vllm_config.parallel_config.worker_cls == "auto":
            from casa_vllm.attention_metadata import GPU_WORKER

            vllm_config.parallel_config.worker_cls = GPU_WORKER
        compilation = vllm_config.compilation_config
        _set_graph_sizes(vllm_config)
        if compilation.splitting_ops is None and not vllm_config.model_config.enforce_eager:
            # The operator reads the step's metadata, so it must not be part of a piecewise graph.
            compilation.splitting_ops = [*compilation._attention_ops, *SPLITTING_OPS]


def _keep_worker_in_engine(vllm_config: "VllmConfig") -> None:
    """Let the only worker of a CPU run in the engine's process: a start is 10 s shorter, and 0.5 GiB stay free.

    vLLM gives it a process of its own, in which it can bind OpenMP's threads; with "nobind" there is nothing to bind.
    """
    from vllm.ray.lazy_utils import is_in_ray_actor
    from vllm.v1.executor.uniproc_executor import UniProcExecutor

    parallel = vllm_config.parallel_config
    # Ray Serve LLM names "mp" for every engine on a CPU.
    names = ("uni", "mp") if is_in_ray_actor() else ("uni",)
    is_bound = os.environ.get("VLLM_CPU_OMP_THREADS_BIND") != "nobind"
    if parallel.world_size == 1 and parallel.distributed_executor_backend in names and not is_bound:
        # The class and not the name, which vLLM's CPU platform replaces with "mp".
        parallel.distributed_executor_backend = UniProcExecutor


def _require_fast_encoder() -> None:
    """Reject a GPU without torchvision: transformers' vision encoder would stand in, several times slower."""
    if not current_platform.is_cpu() and find_spec("torchvision") is None:
        raise ValueError(
            "torchvision is not installed; expected it on a machine with a GPU, where CASA models run vLLM's vision "
            "encoder, which needs it: install the torchvision that vLLM names (pip install vllm brings it)."
        )


def _set_vision_encoder(vllm_config: "VllmConfig") -> None:
    """Set the sizes of the vision encoder's graphs where nobody has chosen others, and compile one without graphs.

    vLLM does neither unless told; an engine that compiles nothing (`--enforce-eager`) does not compile the encoder.
    """
    compilation = vllm_config.compilation_config
    if not compilation.cudagraph_mm_encoder:
        compilation.compile_mm_encoder = True
        return
    if compilation.encoder_cudagraph_token_budgets:
        return
    from casa_vllm.encoder_graphs import graph_tokens

    # vLLM: a graph has at least as many tokens as images. Where none has, it chooses sizes itself.
    smallest = compilation.encoder_cudagraph_max_vision_items_per_batch
    sizes = graph_tokens(vllm_config.scheduler_config.max_num_encoder_input_tokens)
    compilation.encoder_cudagraph_token_budgets = [size for size in sizes if size >= smallest]


def _set_graph_sizes(vllm_config: "VllmConfig") -> None:
    """Have CUDA graphs of short prefills for few sequences, too, where nobody has chosen their sizes.

    vLLM's largest graph has two tokens a sequence, which is enough for decoding alone, and 512 at most.
    """
    compilation, scheduler = vllm_config.compilation_config, vllm_config.scheduler_config
    is_chosen = compilation.max_cudagraph_capture_size is not None or compilation.cudagraph_capture_sizes is not None
    largest = min(GRAPH_TOKENS_A_SEQUENCE * scheduler.max_num_seqs, MAX_GRAPH_TOKENS, scheduler.max_num_batched_tokens)
    if not is_chosen and 2 * scheduler.max_num_seqs < largest:
        compilation.max_cudagraph_capture_size = largest


def _reject_image_options(vllm_config: "VllmConfig") -> None:
    """Reject options by which images bypass casa_vllm.image_items or its cache."""
    multimodal = vllm_config.model_config.multimodal_config
    if multimodal is None:
        return
    if multimodal.enable_mm_embeds:
        raise ValueError(
            "CASA models do not work with embeddings in place of images (--enable-mm-embeds): leave the option out."
        )
    if multimodal.mm_processor_cache_type == "shm":
        raise ValueError(
            "CASA models do not work with --mm-processor-cache-type shm: a refused request would hold its images there "
            "for ever. Use lru, vLLM's default."
        )


def _reject_options(vllm_config: "VllmConfig") -> None:
    parallel, model = vllm_config.parallel_config, vllm_config.model_config
    events = vllm_config.kv_events_config
    refused = {
        "pipeline parallelism (--pipeline-parallel-size)": parallel.pipeline_parallel_size > 1,
        "context parallelism": (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1
        ),
        # A session's chunks could go to different engines.
        "data parallelism (--data-parallel-size)": parallel.data_parallel_size > 1,
        "microbatching (--enable-dbo)": parallel.enable_dbo,
        "KV connectors (--kv-transfer-config)": vllm_config.kv_transfer_config is not None,
        "encoder connectors (--ec-transfer-config)": vllm_config.ec_transfer_config is not None,
        "--disable-hybrid-kv-cache-manager": (vllm_config.scheduler_config.disable_hybrid_kv_cache_manager is True),
        "speculative decoding": vllm_config.speculative_config is not None,
        "LoRA": vllm_config.lora_config is not None,
        "a quantised KV cache (--kv-cache-dtype)": (
            vllm_config.cache_config.cache_dtype not in ("auto", "float16", "bfloat16", "float32")
        ),
        "prompt embeddings on Model Runner V2 (--enable-prompt-embeds)": (
            model.enable_prompt_embeds and vllm_config.use_v2_model_runner
        ),
        "pooling (--runner pooling)": model.runner_type == "pooling",
        # Image pages have keys that no event announces.
        "KV-cache events (--kv-events-config)": events is not None and events.enable_kv_cache_events,
        "another scheduler (--scheduler-cls)": (vllm_config.scheduler_config.scheduler_cls is not None),
        "Model Runner V1 on a GPU (VLLM_USE_V2_MODEL_RUNNER=0)": (
            not current_platform.is_cpu() and not vllm_config.use_v2_model_runner
        ),
    }
    found = [name for name, is_set in refused.items() if is_set]
    if found:
        fusion = vllm_config.model_config.hf_config.fusion
        raise ValueError(
            f"fusion {fusion!r} does not work with {', '.join(found)}: images live in KV-cache "
            "pages of their own. Start without, or use an `insertion` checkpoint."
        )
