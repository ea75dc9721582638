"""Makes transformers' Auto classes find CASA by its `model_type`."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoProcessor,
)

from casa_engine.configuration import CasaConfig
from casa_engine.modeling_casa import CasaForConditionalGeneration
from casa_engine.originals.auto import register_originals
from casa_engine.processing_casa import CasaProcessor


def register_auto_classes() -> None:
    """Register configuration, model and processor, and the configurations of originals. Safe to call twice."""
    AutoConfig.register(CasaConfig.model_type, CasaConfig, exist_ok=True)
    AutoModel.register(CasaConfig, CasaForConditionalGeneration, exist_ok=True)
    AutoModelForCausalLM.register(CasaConfig, CasaForConditionalGeneration, exist_ok=True)
    AutoModelForImageTextToText.register(CasaConfig, CasaForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(CasaConfig, CasaProcessor, exist_ok=True)
    register_originals()
