"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from transformers import Qwen2Config, Qwen2ForCausalLM

from transmla.families.family import NO_PLAN, Family
from transmla.modeling.student import install_attention


class MLAQwen2Config(Qwen2Config):
    """Qwen2's configuration with MLA's dimensions."""

    model_type = "mla_qwen2"
    base_model_tp_plan = NO_PLAN


class MLAQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with multi-head latent attention."""

    config_class = MLAQwen2Config

    def __init__(self, config: MLAQwen2Config) -> None:
        super().__init__(config)
        install_attention(self)


QWEN2 = Family(
    model_type="qwen2",
    student_config=MLAQwen2Config,
    student_model=MLAQwen2ForCausalLM,
    qkv_bias=lambda config: True,
)
