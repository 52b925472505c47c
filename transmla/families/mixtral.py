"""Mixtral: Mistral's attention with a mixture of experts, which conversion leaves as it is."""

from transformers import MixtralConfig, MixtralForCausalLM

from transmla.families.family import NO_PLAN, Family
from transmla.modeling.student import install_attention


class MLAMixtralConfig(MixtralConfig):
    """Mixtral's configuration with MLA's dimensions."""

    model_type = "mla_mixtral"
    base_model_tp_plan = NO_PLAN
    base_model_ep_plan = NO_PLAN


class MLAMixtralForCausalLM(MixtralForCausalLM):
    """Mixtral with multi-head latent attention."""

    config_class = MLAMixtralConfig

    def __init__(self, config: MLAMixtralConfig) -> None:
        super().__init__(config)
        install_attention(self)


MIXTRAL = Family(
    model_type="mixtral",
    student_config=MLAMixtralConfig,
    student_model=MLAMixtralForCausalLM,
    inexpressible=lambda config: "stock transformers' DeepSeek routes to experts by sigmoid, Mixtral by softmax",
)
