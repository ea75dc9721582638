"""Makes transformers read originals: by their own model types, with this engine's classes and no code of theirs."""

from pathlib import Path
from typing import Any

from transformers import AutoConfig

from casa_engine.configuration import CasaConfig
from casa_engine.errors import CheckpointError
from casa_engine.json_files import read_object
from casa_engine.originals.snapshot import TOKENIZER_CONFIG
from casa_engine.originals.views import resolve_checkpoint

# The first is what the hub says of its model; the others follow its pattern and are not verified.
MODEL_TYPES = (
    "CASA_Helium1_VL_2B",
    "CASA_Helium1_VL_2B_Shared",
    "Helium1_VL_2B",
    "CASA_Qwen2_5_VL_3B",
    "CASA_Qwen2_5_VL_3B_Shared",
    "CASA_Qwen2_5_VL_3B_Frozen",
    "CASA_Qwen2_5_VL_3B_LiveCC",
)


class OriginalConfig(CasaConfig):
    """The configuration of an original, of which none is ever made: reading one gives the `CasaConfig` of its view."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """Called by `AutoConfig.from_pretrained` with what config.json holds.

        Raises:
            CheckpointError: The checkpoint is not in a folder here, does not fit its family, or has code for its
                tokenizer.
        """
        name = kwargs.pop("name_or_path", None)
        if name is not None:
            _check_tokenizer(Path(name) / TOKENIZER_CONFIG)
        view = None if name is None else resolve_checkpoint(name)
        if view is None or not view.is_dir():
            raise CheckpointError(
                f"{name} is not a folder; expected a checkpoint's. Download it first (hf download {name} --local-dir "
                "FOLDER) and give the folder."
            )
        return CasaConfig.from_pretrained(view, name_or_path=str(view), **kwargs)


def _check_tokenizer(path: Path) -> None:
    """Raise CheckpointError for code of a tokenizer: vLLM loads that one before it asks for the view's."""
    code = read_object(path).get("auto_map") if path.is_file() else None
    if isinstance(code, list) or (isinstance(code, dict) and "AutoTokenizer" in code):
        raise CheckpointError(
            f"{path} has auto_map with AutoTokenizer, which vLLM would run with --trust-remote-code. Remove it, or use "
            "casa serve: casa-engine reads tokenizer.json itself."
        )


def register_originals() -> None:
    """Register a configuration for each model type. Safe to call twice."""
    for model_type in MODEL_TYPES:
        config_class = type(f"Original{model_type}", (OriginalConfig,), {"model_type": model_type})
        AutoConfig.register(model_type, config_class, exist_ok=True)
