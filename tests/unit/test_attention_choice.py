"""What computes attention over packed documents, where a stage names it."""

import pytest
import torch

from transmla.errors import RecipeError
from transmla.modeling.kernels import cudnn_packed, packed
from transmla.modeling.kernels.packed import boundaries, kernels_there, plan_of
from transmla.plan import stage_checks
from transmla.plan.checks import prepare
from transmla.recipe.compose import load_recipe

WIDE = ["dtype=bfloat16"]
REFUSED = {
    "no GPU": ([], "needs a GPU; auto would use every document by itself"),
    "rows of one length": (["recover.0.trainer.packing_strategy=wrapped"], "rows of this stage are not packed"),
    "padded rows": (["recover.0.trainer.packing=false"], "rows of this stage are not packed"),
    "logits": (["recover.0.logits=0.1"], "auto would use a mask"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("kernel", ["cudnn", "flash"])
def test_a_kernel_that_cannot_run_is_refused(kernel: str, case: str) -> None:
    words, expected = REFUSED[case]
    recipe = load_recipe("debug", ["device=cpu", *WIDE, f"recover.0.attention={kernel}", *words])
    with pytest.raises(RecipeError) as caught:
        prepare(recipe)
    assert caught.value.key == "recover.0.attention" and expected in caught.value.problem


GPU = {
    "an older card": ((8, 0), torch.bfloat16, "this card has 8.0; auto would use FlashAttention's"),
    "no package": ((9, 0), torch.bfloat16, "nvidia-cudnn-frontend is not installed"),
    "float32": ((9, 0), torch.float32, "its kernels have no float32; auto would use a mask"),
}


@pytest.mark.parametrize("case", GPU)
def test_cudnn_on_a_gpu(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    capability, dtype, expected = GPU[case]
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(cudnn_packed, "find_spec", lambda name: None)
    recipe = load_recipe("debug", ["recover.0.attention=cudnn"])
    config = prepare(load_recipe("debug", ["device=cpu"])).config
    with pytest.raises(RecipeError) as caught:
        stage_checks._check_attention(recipe.recover[0], "recover.0", config, torch.device("cuda", 0), dtype)
    assert expected in caught.value.problem


def test_what_was_asked_for_is_computed_and_named() -> None:
    bounds = boundaries(torch.tensor([[0, 1, 2, 0, 1, 0]]))
    query, value = torch.empty(6, 4, 16), torch.empty(6, 4, 8)
    assert not packed._by_cudnn(query, value, plan_of(bounds, "flash")[1])
    assert packed._by_cudnn(query, value, plan_of(bounds, "cudnn")[1])
    device = torch.device("cuda", 0)
    assert "cuDNN" in kernels_there(device, "cudnn") and "FlashAttention" in kernels_there(device, "flash")
