"""Mixtral: Mistral's attention with a mixture of experts, which conversion leaves as it is."""

from transformers import MixtralConfig

from transmla.families.family import NO_PLAN, Family


class MLAMixtralConfig(MixtralConfig):
    """Mixtral's configuration with MLA's dimensions."""

    model_type = "mla_mixtral"
    base_model_tp_plan = NO_PLAN
    base_model_ep_plan = NO_PLAN


MIXTRAL = Family(
    model_type="mixtral",
    student_config=MLAMixtralConfig,
    architecture="MLAMixtralForCausalLM",
    inexpressible=lambda config: "stock transformers' DeepSeek routes to experts by sigmoid, Mixtral by softmax",
)
