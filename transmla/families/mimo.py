"""MiMo: Qwen2's architecture with extra layers that predict further tokens, which a conversion drops.

transformers has no such class; the source is read as a Qwen2 model, never by code from the hub.
"""

from __future__ import annotations

from transformers import PretrainedConfig, Qwen2Config

from transmla.families.family import NO_PLAN, Family


class MiMoConfig(Qwen2Config):
    """The configuration of a MiMo checkpoint."""

    model_type = "mimo"


class MLAMiMoConfig(Qwen2Config):
    """MiMo's configuration with MLA's dimensions."""

    model_type = "mla_mimo"
    base_model_tp_plan = NO_PLAN


def _notice(config: PretrainedConfig) -> str | None:
    count = getattr(config, "num_nextn_predict_layers", 0)  # no field of Qwen2's configuration
    return f"the {count} extra prediction layer(s) of the source (model.mtp_layers) are dropped" if count else None


MIMO = Family(
    model_type="mimo",
    student_config=MLAMiMoConfig,
    architecture="MLAMiMoForCausalLM",
    source_config=MiMoConfig,
    source_architecture="MiMoForCausalLM",
    qkv_bias=lambda config: True,
    notice=_notice,
)
