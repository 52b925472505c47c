"""Llama 2 and 3 and models of the same architecture (SmolLM2, ...)."""

from transformers import LlamaConfig, LlamaForCausalLM

from transmla.families.family import NO_PLAN, Family
from transmla.modeling.student import install_attention


class MLALlamaConfig(LlamaConfig):
    """Llama's configuration with MLA's dimensions."""

    model_type = "mla_llama"
    base_model_tp_plan = NO_PLAN


class MLALlamaForCausalLM(LlamaForCausalLM):
    """Llama with multi-head latent attention."""

    config_class = MLALlamaConfig

    def __init__(self, config: MLALlamaConfig) -> None:
        super().__init__(config)
        install_attention(self)


LLAMA = Family(
    model_type="llama",
    student_config=MLALlamaConfig,
    student_model=MLALlamaForCausalLM,
    qkv_bias=lambda config: config.attention_bias,
    output_bias=lambda config: config.attention_bias,
)
