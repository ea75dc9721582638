"""How configuration and model are read from a folder: never with its code, and by its tensor map where it has one.

Mixed into `CasaConfig` and `CasaPreTrainedModel`. A package (`code_package.py`) has transformers' own loading instead:
whoever loads one has allowed its code.
"""

from os import PathLike
from pathlib import Path
from typing import Any

from transformers import GenerationConfig, PreTrainedConfig
from transformers.utils import CONFIG_NAME, GENERATION_CONFIG_NAME

from casa_engine.json_files import read_object
from casa_engine.tensor_map import mapped_weights, read_tensor_map
from casa_engine.untrusted_folder import check_no_code
from casa_engine.view_folder import is_view


class GuardedConfig:
    """A configuration that is only read from folders without code."""

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As transformers' own. `AutoConfig` calls it, and so vLLM, before anything else of a folder is read.

        Raises:
            CheckpointError: The folder's configurations name code.
        """
        folder = kwargs.get("name_or_path")
        if folder is not None and Path(folder).is_dir():
            check_no_code(Path(folder))
        return super().from_dict(config_dict, **kwargs)


class GuardedModel:
    """A model that is only read from folders without code."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike | None, *args: Any, config: Any = None, **kwargs: Any
    ) -> Any:
        """As transformers' own; weights of other names are read through the folder's tensor map, where it has one.

        Raises:
            CheckpointError: A configuration of the folder names code.
        """
        folder = pretrained_model_name_or_path
        if folder is not None and isinstance(config, cls.config_class) and _is_read_by_view(folder, config):
            folder = config.name_or_path
        if folder is not None and Path(folder).is_dir():
            check_no_code(Path(folder))
        tensor_map = None if folder is None else read_tensor_map(folder)
        if tensor_map is None:
            # Never pickles; `Trainer` leaves some beside the weights, so that they are not refused here.
            return super().from_pretrained(folder, *args, config=config, **{"use_safetensors": True, **kwargs})
        config = cls.config_class.from_pretrained(folder) if config is None else config
        tensors = dict(mapped_weights(folder, tensor_map))
        loaded = super().from_pretrained(None, *args, config=config, state_dict=tensors, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with what was loaded, where that is asked for
        model.config.name_or_path = str(folder)
        if (Path(folder) / GENERATION_CONFIG_NAME).is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return loaded


def _is_read_by_view(folder: str | PathLike, config: PreTrainedConfig) -> bool:
    """Whether a folder is an original whose configuration AutoModel has read, which is that of its view."""
    path = Path(folder) / CONFIG_NAME
    is_original = path.is_file() and read_object(path).get("model_type") != config.model_type
    return is_original and is_view(Path(config.name_or_path))
