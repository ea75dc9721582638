"""Configuration of a synthetic original, as a published checkpoint brings its own. For transformers 4.51."""

from transformers import PretrainedConfig


class Config(PretrainedConfig):
    """Holds the fields of `originals.original_config`."""

    model_type = "CASA_Helium1_VL_2B"
