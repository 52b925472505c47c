"""The student's own classes in vLLM, by its transformers backend: the student's code, with vLLM's attention and cache.

vLLM's MLA attention has neither windows nor a cap, takes a latent behind a real norm, and drops the bias of `kv_b`. So
students run with expanded keys and values, which vLLM caches whole: exact, and without MLA's smaller cache.
"""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn
from transformers import AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from vllm.model_executor.models.transformers import TransformersForCausalLM, TransformersMoEForCausalLM

from transmla.families import FAMILIES
from transmla.modeling.attention import MLAAttention

IMPLEMENTATION = "transmla_vllm"  # of the students' attentions: hands queries, keys and values to vLLM's


class VllmAttention(nn.Module):
    """Where vLLM finds an attention to cache for: it looks for `forward`'s one call of an attention function."""

    def __init__(self, attention: MLAAttention, config: PretrainedConfig) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = attention.layer_idx
        self.scaling = attention.scaling
        self.is_causal = True

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """query, key: [1, H, T, N + P]; value: [1, H, T, V]. Returns [1, T, H, V], or flattened as vLLM has it."""
        attention_interface = ALL_ATTENTION_FUNCTIONS["vllm"]
        return attention_interface(self, query, key, value, attention_mask, scaling=self.scaling, **kwargs)


def _to_vllm(
    module: Any,  # an MLAAttention with a VllmAttention in it
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    return module.vllm(query, key, value, mask, **kwargs)


ALL_ATTENTION_FUNCTIONS.register(IMPLEMENTATION, _to_vllm)


def serve_attention(trunk: nn.Module, config: PretrainedConfig) -> None:
    """Have the attentions of a student's trunk end in vLLM's; windows and caps come to it from the configuration."""
    own = copy.copy(config)
    own._attn_implementation = IMPLEMENTATION
    for attention in [module for module in trunk.modules() if isinstance(module, MLAAttention)]:
        attention.config, attention.softcap = own, None
        attention.vllm = VllmAttention(attention, config)


def _trunk_of(student: type[PreTrainedModel]) -> type:
    """What AutoModel makes of a student's configuration: the trunk of its model, with vLLM's attention."""

    class Trunk:
        config_class = student.config_class

        @staticmethod
        def _from_config(config: PretrainedConfig, **kwargs: Any) -> nn.Module:
            trunk = student._from_config(config, **kwargs).model
            serve_attention(trunk, config)
            return trunk

    return Trunk


for _family in FAMILIES.values():
    AutoModel.register(_family.student_config, _trunk_of(_family.student_model), exist_ok=True)


def _with_all_heads(vllm_config: Any) -> Any:
    """vLLM's configuration with as many key and value heads as query heads: what expanding a latent gives. The model's
    own still says how many the source had.

    Raises:
        ValueError: several cards are to share the heads. vLLM would warn, give each a part, and compute nonsense.
    """
    if (cards := vllm_config.parallel_config.tensor_parallel_size) > 1:
        raise ValueError(f"--tensor-parallel-size {cards}: a student's own class runs on one card; leave it out, or 1")
    shape = vllm_config.model_config.model_arch_config
    shape.total_num_kv_heads = shape.total_num_attention_heads
    return vllm_config


class Student(TransformersForCausalLM):
    """Any student without experts. A class of its own, because vLLM takes its own backend's for stock MLA."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=_with_all_heads(vllm_config), prefix=prefix)


class StudentWithExperts(TransformersMoEForCausalLM):
    """A student with experts (Mixtral)."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=_with_all_heads(vllm_config), prefix=prefix)
