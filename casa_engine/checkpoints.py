"""Reading and writing checkpoints, strictly: a folder holds exactly the model that its config describes.

config.json, model*.safetensors (+ index), generation_config.json,
tokenizer files, preprocessor_config.json, processor_config.json, chat_template.jinja
"""

from pathlib import Path
from typing import Literal

import torch
from transformers import AutoConfig, GenerationConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from casa_engine.checkpoint_folder import list_files, stage_checkpoint
from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_object
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.originals.views import resolve_checkpoint
from casa_engine.processing_casa import CasaProcessor
from casa_engine.strict_weights import check_shapes, model_shapes
from casa_engine.tensor_map import stored_shapes
from casa_engine.tokenization import byte_tokenizer, chat_template
from casa_engine.untrusted_folder import check_files, check_folder, check_no_code
from casa_engine.weight_files import share_files

MIN_PIXELS, MAX_PIXELS = 28 * 28, 1024 * 28 * 28


def read_config(folder: str | Path) -> CasaConfig:
    """Read the configuration of a checkpoint folder.

    Raises:
        CheckpointError: The folder is missing, or holds no CASA configuration.
    """
    path = Path(folder) / "config.json"
    if not path.is_file():
        raise CheckpointError(f"{folder} has no config.json; expected a CASA checkpoint folder (see casa-checkpoint).")
    check_files(Path(folder))
    kind = read_object(path).get("model_type")
    if kind != CasaConfig.model_type:
        raise CheckpointError(f"{path} has model_type {kind!r}; expected {CasaConfig.model_type!r}.")
    check_no_code(Path(folder))
    return AutoConfig.from_pretrained(folder)


def check_tensors(folder: str | Path, config: CasaConfig) -> None:
    """Compare the stored tensors with those of the model, without loading any.

    Raises:
        CheckpointError: Tensors are missing, extra or of another shape; the message names them.
    """
    check_shapes(str(folder), model_shapes(config), stored_shapes(folder))


def load_model(
    folder: str | Path, dtype: torch.dtype | Literal["auto"] = torch.float32
) -> CasaForConditionalGeneration:
    """Load the eager model, ready for inference; an original of a published model in place.

    Args:
        folder: The checkpoint.
        dtype: Of the weights; "auto" for the one that the checkpoint names, or is stored in.

    Raises:
        CheckpointError: Anything about the folder is not as its configuration says.
    """
    folder = resolve_checkpoint(folder)
    config = read_config(folder)
    check_tensors(folder, config)
    return CasaForConditionalGeneration.from_pretrained(folder, config=config, dtype=dtype).eval()


def load_processor(folder: str | Path) -> CasaProcessor:
    """Load a checkpoint's processor, with image preprocessing that needs no torchvision.

    Raises:
        CheckpointError: The folder may not be trusted (see `untrusted_folder`).
    """
    folder = resolve_checkpoint(folder)
    if folder.is_dir():
        check_folder(folder)
    return CasaProcessor.from_pretrained(folder)


def save_checkpoint(model: CasaForConditionalGeneration, processor: CasaProcessor, folder: str | Path) -> None:
    """Write model, processor and generation defaults, as one transaction.

    Raises:
        OutputError: The folder cannot be written, or holds such files of others; it is as before.
    """
    with stage_checkpoint(folder, weight_bytes(model)) as staged:
        write_checkpoint(model, processor, staged.path)
        list_files(staged.path)
        staged.commit()


def write_checkpoint(model: CasaForConditionalGeneration, processor: CasaProcessor, folder: Path) -> None:
    """Write model, processor and generation defaults into a folder of the caller's own, such as a staged one."""
    model.generation_config = GenerationConfig(
        eos_token_id=model.config.text_config.eos_token_id,
        pad_token_id=processor.tokenizer.pad_token_id,
    )
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    share_files(folder, "*.safetensors")


def weight_bytes(model: CasaForConditionalGeneration) -> int:
    """Size of a model's weights."""
    return sum(parameter.nbytes for parameter in model.parameters())


def default_processor(config: CasaConfig) -> CasaProcessor:
    """A processor with a byte tokenizer for a configuration without one of its own."""
    images = Qwen2VLImageProcessorPil(
        min_pixels=MIN_PIXELS,
        max_pixels=MAX_PIXELS,
        patch_size=config.vision_config.patch_size,
        merge_size=config.vision_config.spatial_merge_size,
    )
    return CasaProcessor(images, byte_tokenizer(config), chat_template=chat_template(), fusion=config.fusion)


def random_model(config: CasaConfig, seed: int = 0, dtype: torch.dtype = torch.float32) -> CasaForConditionalGeneration:
    """A model with random weights: biases and norms too, so that no term is invisible in a comparison."""
    torch.manual_seed(seed)
    previous = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        model = CasaForConditionalGeneration(config).eval()
    finally:
        torch.set_default_dtype(previous)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.1)
            elif parameter.ndim == 1:
                parameter.uniform_(0.8, 1.2)
    return model


def write_random_checkpoint(
    config: CasaConfig, folder: str | Path, seed: int = 0, dtype: torch.dtype = torch.float32
) -> None:
    """Write a checkpoint of a `random_model`, with a processor of its own, as one transaction.

    Raises:
        OutputError: The folder cannot be written, or holds such files of others; it is as before.
    """
    with torch.device("meta"):
        needed_bytes = sum(map(torch.numel, CasaForConditionalGeneration(config).parameters())) * dtype.itemsize
    with stage_checkpoint(folder, needed_bytes) as staged:  # before the model is made, which may take minutes
        write_checkpoint(random_model(config, seed, dtype), default_processor(config), staged.path)
        list_files(staged.path)
        staged.commit()
