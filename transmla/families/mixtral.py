"""Mixtral: Mistral's attention with a mixture of experts, which conversion leaves as it is."""

from transformers import MixtralConfig, PretrainedConfig

from transmla.families.family import NO_PLAN, Family
from transmla.modeling.config_facts import has_stock_router


class MLAMixtralConfig(MixtralConfig):
    """Mixtral's configuration with MLA's dimensions."""

    model_type = "mla_mixtral"
    base_model_tp_plan = NO_PLAN
    base_model_ep_plan = NO_PLAN


def _inexpressible(config: PretrainedConfig) -> str | None:
    if has_stock_router(config):
        return None
    return (
        "stock transformers' DeepSeek routes to experts by sigmoid, Mixtral by softmax; convert.router=stock makes a "
        "student whose router can be written as either"
    )


MIXTRAL = Family(
    model_type="mixtral",
    student_config=MLAMixtralConfig,
    architecture="MLAMixtralForCausalLM",
    inexpressible=_inexpressible,
    router=lambda layer: layer.mlp.gate,
)
