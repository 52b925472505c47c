"""The student: a family's own causal language model whose attentions are MLA."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from transmla.modeling.attention import MLAAttention
from transmla.modeling.config_facts import has_rope_by_layer

ATTENTION = ".self_attn."  # marks the parameters that conversion replaces


def install_attention(
    student: PreTrainedModel, *, query_norm: type[nn.Module] | None = None, softcap: float | None = None
) -> None:
    """Put MLA in the place of every attention of a family's `ForCausalLM`; its trunk stays.

    The configuration's `head_dim` is the rope head's dimension, so that the family's own rotary embedding yields
    MLA's cos and sin (as in transformers' DeepseekV3Config).

    Args:
        query_norm: class of the norm on queries, for a family that has one.
        softcap: cap on the attention's logits, or None.
    """
    for index, layer in enumerate(student.model.layers):
        layer.self_attn = MLAAttention(student.config, index, query_norm=query_norm, softcap=softcap)
    student.post_init()


def rotation(student: PreTrainedModel, states: Tensor, positions: Tensor, index: int) -> tuple[Tensor, Tensor]:
    """cos and sin [B, T, P] of layer `index`. states: any tensor of the trunk's dtype. positions: [B, T]."""
    if has_rope_by_layer(student.config):
        return student.model.rotary_emb(states, positions, student.config.layer_types[index])
    return student.model.rotary_emb(states, positions)


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
