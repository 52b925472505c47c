"""Mistral: Llama with an optional sliding window, the same in all layers."""

from transformers import MistralConfig, MistralForCausalLM

from transmla.families.base import Family
from transmla.modeling.student import MLAStudent


class MLAMistralConfig(MistralConfig):
    """Mistral's configuration with MLA's dimensions."""

    model_type = "mla_mistral"
    base_model_tp_plan = None


class MLAMistralForCausalLM(MLAStudent, MistralForCausalLM):
    """Mistral with multi-head latent attention."""

    config_class = MLAMistralConfig


MISTRAL = Family(model_type="mistral", student_config=MLAMistralConfig, student_model=MLAMistralForCausalLM)
