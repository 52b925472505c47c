"""Model classes: every family's own causal language model with multi-head latent attention in the place of its
attentions, and the sources that transformers does not know. Importing this registers them with AutoModelForCausalLM.

transformers' model code takes seconds to import: whoever needs a class asks its family (`Family.student_model`), and
what is said of a configuration alone is said without it.
"""

from __future__ import annotations

from transformers import (
    AutoModelForCausalLM,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.models.gemma3.modeling_gemma3 import Gemma3RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from transmla.families import FAMILIES
from transmla.families.gemma2 import MLAGemma2Config
from transmla.families.gemma3 import MLAGemma3TextConfig
from transmla.families.llama import MLALlamaConfig
from transmla.families.mimo import MiMoConfig, MLAMiMoConfig
from transmla.families.mistral import MLAMistralConfig
from transmla.families.mixtral import MLAMixtralConfig
from transmla.families.qwen2 import MLAQwen2Config
from transmla.families.qwen3 import MLAQwen3Config
from transmla.modeling.student import install_attention


class MLALlamaForCausalLM(LlamaForCausalLM):
    """Llama with multi-head latent attention."""

    config_class = MLALlamaConfig

    def __init__(self, config: MLALlamaConfig) -> None:
        super().__init__(config)
        install_attention(self)


class MLAQwen2ForCausalLM(Qwen2ForCausalLM):
    """Qwen2 with multi-head latent attention."""

    config_class = MLAQwen2Config

    def __init__(self, config: MLAQwen2Config) -> None:
        super().__init__(config)
        install_attention(self)


class MLAQwen3ForCausalLM(Qwen3ForCausalLM):
    """Qwen3 with multi-head latent attention; the norm of the queries is kept, that of the keys is linearised."""

    config_class = MLAQwen3Config

    def __init__(self, config: MLAQwen3Config) -> None:
        super().__init__(config)
        install_attention(self, query_norm=Qwen3RMSNorm)


class MLAMistralForCausalLM(MistralForCausalLM):
    """Mistral with multi-head latent attention."""

    config_class = MLAMistralConfig

    def __init__(self, config: MLAMistralConfig) -> None:
        super().__init__(config)
        install_attention(self)


class MLAMixtralForCausalLM(MixtralForCausalLM):
    """Mixtral with multi-head latent attention."""

    config_class = MLAMixtralConfig

    def __init__(self, config: MLAMixtralConfig) -> None:
        super().__init__(config)
        install_attention(self)


class MLAGemma2ForCausalLM(Gemma2ForCausalLM):
    """Gemma 2 with multi-head latent attention."""

    config_class = MLAGemma2Config

    def __init__(self, config: MLAGemma2Config) -> None:
        super().__init__(config)
        install_attention(self, softcap=config.attn_logit_softcapping)


class MLAGemma3ForCausalLM(Gemma3ForCausalLM):
    """Gemma 3 with multi-head latent attention; the norm of the queries is kept, that of the keys is linearised."""

    config_class = MLAGemma3TextConfig

    def __init__(self, config: MLAGemma3TextConfig) -> None:
        super().__init__(config)
        install_attention(self, query_norm=Gemma3RMSNorm)


class MiMoForCausalLM(Qwen2ForCausalLM):
    """MiMo without its prediction layers."""

    config_class = MiMoConfig
    _keys_to_ignore_on_load_unexpected = [r"^model\.mtp_layers\."]


class MLAMiMoForCausalLM(Qwen2ForCausalLM):
    """MiMo with multi-head latent attention."""

    config_class = MLAMiMoConfig

    def __init__(self, config: MLAMiMoConfig) -> None:
        super().__init__(config)
        install_attention(self)


for _family in FAMILIES.values():
    AutoModelForCausalLM.register(_family.student_config, _family.student_model, exist_ok=True)
    if _family.source_config is not None:
        AutoModelForCausalLM.register(_family.source_config, _family.source_model, exist_ok=True)
