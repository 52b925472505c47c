"""Model classes: every family's own causal language model with multi-head latent attention in the place of its
attentions, and the sources that transformers does not know. Importing this registers them with AutoModelForCausalLM.

transformers' model code takes seconds to import: whoever needs a class asks its family (`Family.student_model`), and
what is said of a configuration alone is said without it.
"""

from __future__ import annotations

from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    PretrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from transmla.families import FAMILIES
from transmla.families.family import Family
from transmla.families.gemma2 import MLAGemma2Config
from transmla.families.gemma3 import MLAGemma3TextConfig
from transmla.families.llama import MLALlamaConfig
from transmla.families.mimo import MiMoConfig, MLAMiMoConfig
from transmla.families.mistral import MLAMistralConfig
from transmla.families.mixtral import MLAMixtralConfig
from transmla.families.qwen2 import MLAQwen2Config
from transmla.families.qwen3 import MLAQwen3Config
from transmla.families.student_config import student_config
from transmla.geometry import MLAGeometry
from transmla.modeling.student import ATTENTION, install_attention


class _Student(PreTrainedModel):
    """A family's causal language model, which stands behind this among its bases, with every attention replaced.

    query_norm: class of the norm on queries, where the family has one. softcapped: whether its attention caps logits at
    `attn_logit_softcapping`; Gemma 3 has that key too, and does not.
    """

    query_norm: type[nn.Module] | None = None
    softcapped = False

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        softcap = config.attn_logit_softcapping if self.softcapped else None
        install_attention(self, query_norm=self.query_norm, softcap=softcap)


class MLALlamaForCausalLM(_Student, LlamaForCausalLM):
    """Llama with multi-head latent attention."""

    config_class = MLALlamaConfig


class MLAQwen2ForCausalLM(_Student, Qwen2ForCausalLM):
    """Qwen2 with multi-head latent attention."""

    config_class = MLAQwen2Config


class MLAQwen3ForCausalLM(_Student, Qwen3ForCausalLM):
    """Qwen3 with multi-head latent attention; the norm of the queries is kept, that of the keys is linearised."""

    config_class = MLAQwen3Config
    query_norm = Qwen3RMSNorm


class MLAMistralForCausalLM(_Student, MistralForCausalLM):
    """Mistral with multi-head latent attention."""

    config_class = MLAMistralConfig


class MLAMixtralForCausalLM(_Student, MixtralForCausalLM):
    """Mixtral with multi-head latent attention."""

    config_class = MLAMixtralConfig


class MLAGemma2ForCausalLM(_Student, Gemma2ForCausalLM):
    """Gemma 2 with multi-head latent attention."""

    config_class = MLAGemma2Config
    softcapped = True


class MLAGemma3ForCausalLM(_Student, Gemma3ForCausalLM):
    """Gemma 3 with multi-head latent attention; the norm of the queries is kept, that of the keys is linearised."""

    config_class = MLAGemma3TextConfig
    query_norm = Gemma3RMSNorm


class MiMoForCausalLM(Qwen2ForCausalLM):
    """MiMo without its prediction layers."""

    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"^model\.mtp_layers\."]


class MLAMiMoForCausalLM(_Student, Qwen2ForCausalLM):
    """MiMo with multi-head latent attention."""

    config_class = MLAMiMoConfig


def build_student(
    source: PreTrainedModel, geometry: MLAGeometry, family: Family, attention: dict[str, Tensor]
) -> PreTrainedModel:
    """Assemble a student whose trunk shares the source's storage.

    Args:
        source: the original model.
        attention: `model.layers.N.self_attn.*` of the student, any dtype; stored in the source's dtype.
    """
    from accelerate import init_empty_weights  # vLLM, which wants the classes alone, comes without it

    config = student_config(source.config, geometry, family)
    with init_empty_weights(include_buffers=False):
        student = family.student_model(config)
    trunk = {name: value for name, value in source.state_dict().items() if ATTENTION not in name}
    dtype = source.dtype
    state = trunk | {name: value.to(source.device, dtype) for name, value in attention.items()}
    student.load_state_dict(state, assign=True, strict=True)
    student.tie_weights()
    student.config._attn_implementation = source.config._attn_implementation
    student.generation_config = source.generation_config
    student.config.dtype = dtype
    return student.to(source.device).eval()  # type: ignore[arg-type]  # transformers' `to` is typed without its self


for _family in FAMILIES.values():
    AutoModelForCausalLM.register(_family.student_config, _family.student_model, exist_ok=True)
    if _family.source_config is not None:
        AutoModelForCausalLM.register(_family.source_config, _family.source_model, exist_ok=True)
