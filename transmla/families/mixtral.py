"""Mixtral: Mistral's attention with a mixture of experts, which conversion leaves as it is."""

from transformers import MixtralConfig, MixtralForCausalLM

from transmla.families.base import Family
from transmla.modeling.student import MLAStudent


class MLAMixtralConfig(MixtralConfig):
    """Mixtral's configuration with MLA's dimensions."""

    model_type = "mla_mixtral"
    base_model_tp_plan = None
    base_model_ep_plan = None


class MLAMixtralForCausalLM(MLAStudent, MixtralForCausalLM):
    """Mixtral with multi-head latent attention."""

    config_class = MLAMixtralConfig


MIXTRAL = Family(
    model_type="mixtral",
    student_config=MLAMixtralConfig,
    student_model=MLAMixtralForCausalLM,
    inexpressible=lambda config: "stock transformers' DeepSeek routes to experts by sigmoid, Mixtral by softmax",
)
