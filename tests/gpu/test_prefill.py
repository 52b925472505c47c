"""Prompts read as packed documents on a GPU, against each by itself."""

import pytest
import torch
from transformers import DynamicCache

from tests.conftest import VOCAB, settings, tiny_model
from transmla.convert.conversion import convert_model
from transmla.generate.prefill import packs, read_packed

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


@pytest.mark.parametrize("student", [False, True])
@torch.no_grad()
def test_packed_prompts_are_each_alone(student: bool) -> None:
    model = tiny_model("qwen2")
    if student:
        chosen = settings(qk_rope_head_dim=8, kv_lora_rank=24, freqfold=2)
        model = convert_model(model, chosen, torch.randint(VOCAB, (4, 16))).student
    model = model.to("cuda", torch.bfloat16).eval()
    prompts = [torch.randint(VOCAB, (length,)).tolist() for length in (300, 1, 700, 17, 64)]
    cache = DynamicCache(config=model.config)
    assert packs(model, 1024, cache) and not packs(model, 700, cache)
    found = read_packed(model, prompts, cache)
    for row, prompt in enumerate(prompts):
        own = DynamicCache(config=model.config)
        ids = torch.tensor([prompt], device="cuda")
        alone = model(input_ids=ids, past_key_values=own, use_cache=True, logits_to_keep=1).logits[0, -1]
        torch.testing.assert_close(found[row], alone, rtol=6e-2, atol=6e-2)
        for one, other in zip(cache.layers, own.layers, strict=True):
            padded = one.keys[row, :, -len(prompt) :]
            torch.testing.assert_close(padded, other.keys[0], rtol=6e-2, atol=6e-2)
            assert not one.keys[row, :, : -len(prompt)].any()
