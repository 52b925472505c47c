"""Names of a student's tensors and of DeepSeek's, as data, in both directions.

Most names are DeepSeek's already. What differs follows from the format's biases: DeepSeek has them on `q_a_proj`,
`kv_a_proj_with_mqa` and `o_proj` alone, so that the student's others become columns of a weight, and a biased query
goes through a query latent that is the attention's input itself.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from transformers import PretrainedConfig

from transmla.export.expressible import has_latent_norm
from transmla.export.latent_blocks import is_grouped
from transmla.modeling.config_facts import has_experts, is_tied, latent_heads
from transmla.sources.weights import FILLED

LAYER, ATTENTION = "model.layers.{}.", "model.layers.{}.self_attn."

# Student's name -> DeepSeek's.
OUTSIDE = {
    "model.embed_tokens.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}
IN_LAYER = {
    "input_layernorm.weight": "input_layernorm.weight",
    "post_attention_layernorm.weight": "post_attention_layernorm.weight",
}
DENSE = {
    "mlp.gate_proj.weight": "mlp.gate_proj.weight",
    "mlp.up_proj.weight": "mlp.up_proj.weight",
    "mlp.down_proj.weight": "mlp.down_proj.weight",
}
EXPERTS = {
    "mlp.gate.weight": "mlp.gate.weight",
    "mlp.experts.gate_up_proj": "mlp.experts.gate_up_proj",
    "mlp.experts.down_proj": "mlp.experts.down_proj",
}
LATENTS = {
    "kv_a_proj_with_mqa.weight": "kv_a_proj_with_mqa.weight",
    "o_proj.weight": "o_proj.weight",
}
QUERY = {"q_proj.weight": "q_proj.weight"}
QUERY_LATENT = {"q_a_proj.weight": "q_a_proj.weight", "q_b_proj.weight": "q_b_proj.weight"}
BIASED_QUERY = {"q_proj.weight": "q_b_proj.weight", "q_proj.bias": "q_b_proj.weight"}
BIASED_QUERY_LATENT = {
    "q_a_proj.weight": "q_b_proj.weight",
    "q_b_proj.weight": "q_b_proj.weight",
    "q_b_proj.bias": "q_b_proj.weight",
}
UP = {"kv_b_proj.weight": "kv_b_proj.weight"}
BIASES = {"kv_a_proj_with_mqa.bias": "kv_a_proj_with_mqa.bias", "kv_b_proj.bias": "kv_b_proj.weight"}
BIASES_BEHIND_A_NORM = {"kv_a_proj_with_mqa.bias": "kv_a_proj_with_mqa.bias", "kv_b_proj.bias": "o_proj.bias"}

# What DeepSeek has and the student has not.
LINEAR_NORM = ("kv_a_layernorm.weight",)
LINEAR_QUERY_NORM = ("q_a_layernorm.weight",)
IDENTITY_QUERY_LATENT = ("q_a_proj.weight", "q_a_proj.bias", "q_a_layernorm.weight", "o_proj.bias")
SHARED_EXPERT = ("gate_proj", "up_proj", "down_proj")  # DeepSeek always has one; here its weights are zero


@dataclass(frozen=True)
class NameMap:
    """Names with `{}` for the number of the layer.

    to_deepseek: by the student's name. added: DeepSeek's tensors that the exporter makes by itself. filled: a router's,
    in no file: transformers fills it with zeros. With it vLLM does not load a checkpoint whose `topk_method` is greedy,
    and SGLang takes a sigmoid for the softmax.
    """

    to_deepseek: dict[str, str]
    added: frozenset[str]
    filled: frozenset[str] = frozenset()

    @property
    def from_deepseek(self) -> dict[str, tuple[str, ...]]:
        """By DeepSeek's name, the student's tensors that it is made of; none for what is added alone."""
        found: dict[str, tuple[str, ...]] = dict.fromkeys(sorted(self.added), ())
        for student, deepseek in self.to_deepseek.items():
            found[deepseek] = (*found.get(deepseek, ()), student)
        return found

    def attention(self, name: str) -> str:
        """DeepSeek's name within an attention, by the student's."""
        return self.to_deepseek[ATTENTION + name].removeprefix(ATTENTION)


def template(name: str) -> tuple[str, int | None]:
    """A tensor's name with `{}` for its layer, and the layer; None where it is in no layer."""
    match = re.fullmatch(r"(model\.layers\.)(\d+)(\..+)", name)
    return (name, None) if match is None else (f"{match[1]}{{}}{match[3]}", int(match[2]))


def name_map(config: PretrainedConfig) -> NameMap:
    """The names of a student of this configuration."""
    normed, biased, ranked = has_latent_norm(config), config.mla_qkv_bias, config.q_lora_rank is not None
    attention = LATENTS | UP
    added: list[str] = []
    if biased:
        attention |= BIASED_QUERY_LATENT if ranked else BIASED_QUERY
        attention |= BIASES_BEHIND_A_NORM if normed else BIASES
        added += IDENTITY_QUERY_LATENT
    else:
        attention |= QUERY_LATENT if ranked else QUERY
        added += LINEAR_QUERY_NORM if ranked and not normed else ()
    if normed:
        attention["kv_a_layernorm.weight"] = "kv_a_layernorm.weight"
        if ranked:
            attention["q_a_layernorm.weight"] = "q_a_layernorm.weight"
    else:
        added += LINEAR_NORM
    if is_grouped(config):
        attention = _by_latent(attention, 0 if is_tied(config) else latent_heads(config))
        added += UP.values() if is_tied(config) else ()
    sparse = has_experts(config)
    inside = IN_LAYER | (EXPERTS if sparse else DENSE)
    shared = [f"{LAYER}mlp.shared_experts.{name}.weight" for name in SHARED_EXPERT] if sparse else []
    return NameMap(
        to_deepseek=OUTSIDE
        | {LAYER + student: LAYER + deepseek for student, deepseek in inside.items()}
        | {ATTENTION + student: ATTENTION + deepseek for student, deepseek in attention.items()},
        added=frozenset([*(ATTENTION + name for name in added), *shared]),
        filled=frozenset([LAYER + FILLED] if sparse else []),
    )


def _by_latent(attention: dict[str, str], count: int) -> dict[str, str]:
    """Names of an attention whose `kv_b_proj` is one of every latent, or of none."""
    found = {name: deepseek for name, deepseek in attention.items() if not name.startswith("kv_b_proj.")}
    for name in attention.keys() - found.keys():
        kind = name.removeprefix("kv_b_proj.")
        found |= {f"kv_b_proj.{index}.{kind}": attention[name] for index in range(count)}
    return found
