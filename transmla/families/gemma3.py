"""Gemma 3's text model: norms on queries and keys; windowed layers with their own rotary frequencies."""

from __future__ import annotations

from torch import Tensor
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedModel
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm

from transmla.families.family import NO_PLAN, Family
from transmla.families.gemma2 import refuse_bidirectional
from transmla.families.head_norm import centred_head_norms, read_centred
from transmla.modeling.student import install_attention


class MLAGemma3TextConfig(Gemma3TextConfig):
    """Gemma 3's text configuration with MLA's dimensions."""

    model_type = "mla_gemma3_text"
    base_model_tp_plan = NO_PLAN


class MLAGemma3ForCausalLM(Gemma3ForCausalLM):
    """Gemma 3 with multi-head latent attention; the norm of the queries is kept, that of the keys is linearised."""

    config_class = MLAGemma3TextConfig

    def __init__(self, config: MLAGemma3TextConfig) -> None:
        super().__init__(config)
        install_attention(self, query_norm=Gemma3RMSNorm)


def _frequencies(model: PreTrainedModel, index: int) -> Tensor:
    return getattr(model.model.rotary_emb, f"{model.config.layer_types[index]}_inv_freq")


GEMMA3 = Family(
    model_type="gemma3_text",
    student_config=MLAGemma3TextConfig,
    student_model=MLAGemma3ForCausalLM,
    read_attention=read_centred,
    head_norms=centred_head_norms,
    frequencies=_frequencies,
    qkv_bias=lambda config: True,  # the linear map that replaces normalised keys has one
    output_bias=lambda config: config.attention_bias,
    refuse=refuse_bidirectional,
    inexpressible=lambda config: "Gemma 3's trunk (norms behind each block and on queries, GeGLU) is not DeepSeek's",
    plain_residual=False,
)
