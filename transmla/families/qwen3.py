"""Qwen3: Llama with an RMSNorm on every head's queries and keys."""

from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from transmla.families.family import NO_PLAN, Family
from transmla.families.head_norm import INEXPRESSIBLE, plain_head_norms, read_plain
from transmla.modeling.student import install_attention


class MLAQwen3Config(Qwen3Config):
    """Qwen3's configuration with MLA's dimensions."""

    model_type = "mla_qwen3"
    base_model_tp_plan = NO_PLAN


class MLAQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with multi-head latent attention; the norm of the queries is kept, that of the keys is linearised."""

    config_class = MLAQwen3Config

    def __init__(self, config: MLAQwen3Config) -> None:
        super().__init__(config)
        install_attention(self, query_norm=Qwen3RMSNorm)


QWEN3 = Family(
    model_type="qwen3",
    student_config=MLAQwen3Config,
    student_model=MLAQwen3ForCausalLM,
    read_attention=read_plain,
    head_norms=plain_head_norms,
    qkv_bias=lambda config: True,  # the linear map that replaces normalised keys has one
    output_bias=lambda config: config.attention_bias,
    inexpressible=lambda config: INEXPRESSIBLE,
)
