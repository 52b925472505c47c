"""The map of names, walked in both directions against a real student and the stock class."""

import pytest
import torch
from transformers import DeepseekV3ForCausalLM

from tests.numerics.test_exact import conversion
from transmla.export.deepseek_config import deepseek_config
from transmla.export.deepseek_names import name_map, template
from transmla.export.deepseek_weights import export_state

CASES = {
    "plain": ("llama", {}, {}),
    "tied": ("llama", {"tie_word_embeddings": True}, {}),
    "query rank": ("llama", {}, {"q_lora_rank": 24}),
    "norm": ("llama", {}, {"latent_norm": True}),
    "norm, query rank": ("llama", {}, {"latent_norm": True, "q_lora_rank": 24}),
    "biases": ("qwen2", {}, {}),
    "biases, query rank": ("qwen2", {}, {"q_lora_rank": 24}),
    "two latents": ("llama", {}, {"groups": 2, "latent_heads": 2}),
    "two latents, biases": ("qwen2", {}, {"groups": 2, "latent_heads": 2}),
    "two tied latents": ("llama", {}, {"groups": 2, "latent_heads": 2, "tied": True}),
    "tied, biases, query rank": ("qwen2", {}, {"tied": True, "q_lora_rank": 24}),
    "biases, norm": ("qwen2", {}, {"latent_norm": True}),
    "experts": ("mixtral", {"num_local_experts": 4, "leaning": True}, {"router": "stock"}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_tensor_has_its_name_on_the_other_side(case: str) -> None:
    family, fields, section = CASES[case]
    _, done = conversion(family, fields, torch.float32, **section)
    student, shifts = done.student, done.router_shifts
    names = name_map(student.config)
    own = {template(name)[0] for name in student.state_dict()} | {"lm_head.weight"}
    with torch.device("meta"):
        stock = DeepseekV3ForCausalLM(deepseek_config(student.config, "compact", torch.float32))
    theirs = {template(name)[0] for name in stock.state_dict()}
    assert set(names.to_deepseek) == own
    assert names.filled <= theirs and bool(names.filled) == (case == "experts")
    theirs -= names.filled
    assert set(names.from_deepseek) == theirs
    assert {template(name)[0] for name in export_state(student, "compact", torch.float32, shifts=shifts)} == theirs
    for deepseek, students in names.from_deepseek.items():
        assert all(names.to_deepseek[name] == deepseek for name in students)
        assert students or deepseek in names.added


def test_a_name_says_its_layer() -> None:
    assert template("model.layers.12.self_attn.o_proj.weight") == ("model.layers.{}.self_attn.o_proj.weight", 12)
    assert template("model.norm.weight") == ("model.norm.weight", None)
