"""From a source's configuration to its student's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import PretrainedConfig

from transmla.geometry import MLAGeometry

if TYPE_CHECKING:
    from transmla.families.family import Family

# Of the source's configuration: what names or loads the source, and what the student has under another meaning.
DROPPED = (
    "model_type",
    "architectures",
    "auto_map",
    "transformers_version",
    "_name_or_path",
    "head_dim",
    "dtype",
    "num_nextn_predict_layers",
)


def student_config(source: PretrainedConfig, geometry: MLAGeometry, family: Family) -> PretrainedConfig:
    """Configuration of the student: the source's, with MLA's dimensions under DeepSeek's names."""
    fields = source.to_dict()
    for name in DROPPED:
        fields.pop(name, None)
    if geometry.stock_rope is not None:
        fields["rope_parameters"] = dict(geometry.stock_rope["parameters"])
    elif geometry.theta_power != 1.0:
        fields["rope_parameters"] = _with_theta(fields["rope_parameters"], geometry.theta_power)
    make: Any = family.student_config  # keeps MLA's dimensions, as it keeps every key; none of them is declared
    return make(
        **fields,
        head_dim=geometry.qk_rope_head_dim,
        qk_nope_head_dim=geometry.qk_nope_head_dim,
        qk_rope_head_dim=geometry.qk_rope_head_dim,
        v_head_dim=geometry.v_head_dim,
        kv_lora_rank=geometry.kv_lora_rank,
        q_lora_rank=geometry.q_lora_rank,
        mla_qkv_bias=bool(family.qkv_bias(source)) and not geometry.folded_biases,
        mla_output_bias=bool(family.output_bias(source)),
        mla_query_norm_dim=None if family.head_norms is None else geometry.head_dim,
        mla_latent_norm=geometry.latent_norm,
        **({"mla_latent_heads": geometry.latent_heads} if geometry.latent_heads > 1 else {}),
        **({"mla_tied": True} if geometry.tied else {}),
        **({"mla_stock_router": True} if geometry.stock_router else {}),
        architectures=[family.architecture],
    )


def _with_theta(parameters: dict[str, Any], power: float) -> dict[str, Any]:
    """Rotary parameters, possibly by layer type, with every rope_theta raised to a power."""
    found: dict[str, Any] = {
        name: _with_theta(value, power) if isinstance(value, dict) else value for name, value in parameters.items()
    }
    return found | {"rope_theta": found["rope_theta"] ** power} if "rope_theta" in found else found
