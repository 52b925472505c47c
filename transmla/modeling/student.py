"""The student: a family's own causal language model whose attentions are MLA."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from accelerate import init_empty_weights
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel

from transmla.geometry import MLAGeometry
from transmla.modeling.attention import MLAAttention

if TYPE_CHECKING:
    from transmla.families import Family

ATTENTION = ".self_attn."  # marks the parameters that conversion replaces
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


class MLAStudent:
    """Mixin before a family's `ForCausalLM`: the same trunk, MLA in place of its attention.

    The configuration's `head_dim` is the rope head's dimension, so that the family's own rotary embedding yields
    MLA's cos and sin (as in transformers' DeepseekV3Config).

    query_norm: class of the norm on queries, for a family that has one. caps_attention: whether the family caps its
    attention logits at `attn_logit_softcapping`.
    """

    query_norm: type[nn.Module] | None = None
    caps_attention: bool = False

    def __init__(self, config: PretrainedConfig) -> None:
        super().__init__(config)
        softcap = config.attn_logit_softcapping if self.caps_attention else None
        for index, layer in enumerate(self.model.layers):
            layer.self_attn = MLAAttention(config, index, query_norm=self.query_norm, softcap=softcap)
        self.post_init()

    def rotation(self, states: Tensor, positions: Tensor, index: int) -> tuple[Tensor, Tensor]:
        """cos and sin [B, T, P] of layer `index`. states: any tensor of the trunk's dtype. positions: [B, T]."""
        return self.model.rotary_emb(states, positions)


def student_config(source: PretrainedConfig, geometry: MLAGeometry, family: Family) -> PretrainedConfig:
    """Configuration of the student: the source's, with MLA's dimensions under DeepSeek's names."""
    fields = source.to_dict()
    for name in DROPPED:
        fields.pop(name, None)
    if geometry.theta_power != 1.0:
        fields["rope_parameters"] = _with_theta(fields["rope_parameters"], geometry.theta_power)
    return family.student_config(
        **fields,
        head_dim=geometry.qk_rope_head_dim,
        qk_nope_head_dim=geometry.qk_nope_head_dim,
        qk_rope_head_dim=geometry.qk_rope_head_dim,
        v_head_dim=geometry.v_head_dim,
        kv_lora_rank=geometry.kv_lora_rank,
        q_lora_rank=geometry.q_lora_rank,
        mla_qkv_bias=bool(family.qkv_bias(source)),
        mla_output_bias=bool(family.output_bias(source)),
        mla_query_norm_dim=None if family.head_norms is None else geometry.head_dim,
        mla_latent_norm=geometry.latent_norm,
        architectures=[family.student_model.__name__],
    )


def _with_theta(parameters: dict, power: float) -> dict:
    """Rotary parameters, possibly by layer type, with every rope_theta raised to a power."""
    found = {name: _with_theta(value, power) if isinstance(value, dict) else value for name, value in parameters.items()}
    return found | {"rope_theta": found["rope_theta"] ** power} if "rope_theta" in found else found


def build_student(
    source: PreTrainedModel, geometry: MLAGeometry, family: Family, attention: dict[str, Tensor]
) -> PreTrainedModel:
    """Assemble a student whose trunk shares the source's storage.

    Args:
        source: the original model.
        attention: `model.layers.N.self_attn.*` of the student, any dtype; stored in the source's dtype.
    """
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
    return student.to(source.device).eval()


def share_trunk(student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    """Point the student's trunk at the teacher's storage where all of it is equal.

    After a stage that trained everything the trunks differ and nothing is shared.
    """
    own = {name: value for name, value in student.named_parameters() if ATTENTION not in name}
    other = dict(teacher.named_parameters())
    same = all(
        name in other and other[name].shape == value.shape and torch.equal(other[name], value.to(other[name]))
        for name, value in own.items()
    )
    if same:
        for name, value in own.items():
            value.data = other[name].data


def train_only(student: PreTrainedModel, what: str) -> None:
    """Set which parameters take a gradient: `attention` or `all`; with `lora` none does, adapters bring their own."""
    for name, parameter in student.named_parameters():
        parameter.requires_grad_(what == "all" or (what == "attention" and ATTENTION in name))


def adapted_layers(student: PreTrainedModel, targets: str) -> dict[str, nn.Linear]:
    """The linear layers that get adapters, by name: those of the `attention`s, or `all` but the head."""
    head = student.get_output_embeddings()
    return {
        name: module
        for name, module in student.named_modules()
        if type(module) is nn.Linear and module is not head and (targets == "all" or ATTENTION in name)
    }
