"""Llama 2 and 3 and models of the same architecture (SmolLM2, ...)."""

from transformers import LlamaConfig

from transmla.families.family import NO_PLAN, Family


class MLALlamaConfig(LlamaConfig):
    """Llama's configuration with MLA's dimensions."""

    model_type = "mla_llama"
    base_model_tp_plan = NO_PLAN


LLAMA = Family(
    model_type="llama",
    student_config=MLALlamaConfig,
    architecture="MLALlamaForCausalLM",
    qkv_bias=lambda config: config.attention_bias,
    output_bias=lambda config: config.attention_bias,
)
