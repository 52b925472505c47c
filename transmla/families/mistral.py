"""Mistral: Llama with an optional sliding window, the same in all layers."""

from transformers import MistralConfig, MistralForCausalLM

from transmla.families.family import NO_PLAN, Family
from transmla.modeling.student import install_attention


class MLAMistralConfig(MistralConfig):
    """Mistral's configuration with MLA's dimensions."""

    model_type = "mla_mistral"
    base_model_tp_plan = NO_PLAN


class MLAMistralForCausalLM(MistralForCausalLM):
    """Mistral with multi-head latent attention."""

    config_class = MLAMistralConfig

    def __init__(self, config: MLAMistralConfig) -> None:
        super().__init__(config)
        install_attention(self)


MISTRAL = Family(model_type="mistral", student_config=MLAMistralConfig, student_model=MLAMistralForCausalLM)
