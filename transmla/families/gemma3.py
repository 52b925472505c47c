"""Gemma 3's text model: norms on queries and keys; windowed layers with their own rotary frequencies."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import Tensor
from transformers import Gemma3TextConfig

from transmla.families.family import NO_PLAN, Family
from transmla.families.gemma2 import refuse_bidirectional
from transmla.families.head_norm import centred_head_norms, read_centred

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class MLAGemma3TextConfig(Gemma3TextConfig):
    """Gemma 3's text configuration with MLA's dimensions."""

    model_type = "mla_gemma3_text"
    base_model_tp_plan = NO_PLAN


def _frequencies(model: PreTrainedModel, index: int) -> Tensor:
    return getattr(model.model.rotary_emb, f"{model.config.layer_types[index]}_inv_freq")


GEMMA3 = Family(
    model_type="gemma3_text",
    student_config=MLAGemma3TextConfig,
    architecture="MLAGemma3ForCausalLM",
    read_attention=read_centred,
    head_norms=centred_head_norms,
    frequencies=_frequencies,
    qkv_bias=lambda config: True,  # the linear map that replaces normalised keys has one
    output_bias=lambda config: config.attention_bias,
    refuse=refuse_bidirectional,
    inexpressible=lambda config: "Gemma 3's trunk (norms behind each block and on queries, GeGLU) is not DeepSeek's",
    plain_residual=False,
)
