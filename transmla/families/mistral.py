"""Mistral: Llama with an optional sliding window, the same in all layers."""

from transformers import MistralConfig

from transmla.families.family import NO_PLAN, Family


class MLAMistralConfig(MistralConfig):
    """Mistral's configuration with MLA's dimensions."""

    model_type = "mla_mistral"
    base_model_tp_plan = NO_PLAN


MISTRAL = Family(model_type="mistral", student_config=MLAMistralConfig, architecture="MLAMistralForCausalLM")
