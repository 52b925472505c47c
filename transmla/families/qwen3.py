"""Qwen3: Llama with an RMSNorm on every head's queries and keys."""

from transformers import Qwen3Config

from transmla.families.family import NO_PLAN, Family
from transmla.families.head_norm import INEXPRESSIBLE, plain_head_norms, read_plain


class MLAQwen3Config(Qwen3Config):
    """Qwen3's configuration with MLA's dimensions."""

    model_type = "mla_qwen3"
    base_model_tp_plan = NO_PLAN


QWEN3 = Family(
    model_type="qwen3",
    student_config=MLAQwen3Config,
    architecture="MLAQwen3ForCausalLM",
    read_attention=read_plain,
    head_norms=plain_head_norms,
    qkv_bias=lambda config: True,  # the linear map that replaces normalised keys has one
    output_bias=lambda config: config.attention_bias,
    inexpressible=lambda config: INEXPRESSIBLE,
)
