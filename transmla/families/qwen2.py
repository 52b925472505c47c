"""Qwen2 and Qwen2.5: Llama with a bias on queries, keys and values."""

from transformers import Qwen2Config

from transmla.families.family import NO_PLAN, Family


class MLAQwen2Config(Qwen2Config):
    """Qwen2's configuration with MLA's dimensions."""

    model_type = "mla_qwen2"
    base_model_tp_plan = NO_PLAN


QWEN2 = Family(
    model_type="qwen2",
    student_config=MLAQwen2Config,
    architecture="MLAQwen2ForCausalLM",
    qkv_bias=lambda config: True,
)
