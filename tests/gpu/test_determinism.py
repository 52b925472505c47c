"""With `deterministic` on a GPU: kernels whose gradients are the same bits every time, and whole stages that are."""

import hashlib
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.gpu.test_packed_attention import bounds_of, drawn
from transmla.cli import main
from transmla.modeling.determinism import use_deterministic
from transmla.modeling.kernels.cudnn_packed import has_cudnn, why_not_ordered
from transmla.modeling.kernels.fused import sdpa
from transmla.modeling.kernels.packed import packed_attention, plan_of

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
REPEATED = 20
LONG = [3000, 17, 2500, 700, 1975]


@pytest.fixture(autouse=True)
def _deterministic():
    use_deterministic(True)
    yield
    use_deterministic(False)


def gradients(inputs: list[Tensor], compute) -> list[Tensor]:
    out = compute(*inputs)
    weights = torch.linspace(-1, 1, out.numel(), device="cuda").view_as(out)
    return [out.detach(), *torch.autograd.grad((out * weights).sum(), inputs)]


def always_alike(inputs: list[Tensor], compute) -> None:
    first = gradients(inputs, compute)
    for _ in range(REPEATED):
        for one, other in zip(first, gradients(inputs, compute), strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("kernel", ["auto", "cudnn", "flash"])
@pytest.mark.parametrize("shape", [(28, 28, 192, 128), (28, 4, 128, 128), (9, 9, 96, 64)])
def test_packed_attention(shape, kernel: str) -> None:
    device = torch.device("cuda", 0)
    if kernel == "cudnn":
        if not has_cudnn(device):
            pytest.skip("needs nvidia-cudnn-frontend and compute capability 9.0")
        if (reason := why_not_ordered(device, torch.bfloat16, *shape[2:])) is not None:
            pytest.skip(reason)
    bounds = bounds_of(LONG)
    documents = {"document_bounds": bounds.cuda(), "document_plan": torch.tensor(plan_of(bounds, kernel))}
    inputs = drawn(sum(LONG), *shape, torch.bfloat16)
    always_alike(inputs, lambda *x: packed_attention(torch.nn.Identity(), *x, None, scaling=0.08, **documents)[0])


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [(28, 28, 192, 128), (9, 9, 96, 64)])
def test_attention_over_rows(shape, masked: bool) -> None:
    inputs = drawn(4096, *shape, torch.bfloat16)
    mask = torch.ones(4096, 4096, dtype=torch.bool, device="cuda").tril()[None, None] if masked else None
    always_alike(inputs, lambda *x: sdpa(*x, mask, 0.08, 0.0))


def test_compiled_norms_and_sums_over_tokens() -> None:
    """Gradients of a norm's weight and of a bias are sums over all tokens, which a compiler cuts in pieces."""
    model = torch.nn.Sequential(torch.nn.RMSNorm(576), torch.nn.Linear(576, 1536), torch.nn.SiLU()).cuda()
    states = torch.randn(16384, 576, device="cuda")

    def run() -> list[Tensor]:
        torch._dynamo.reset()
        compiled = torch.compile(model, dynamic=True)
        return list(torch.autograd.grad(compiled(states).square().sum(), list(model.parameters())))

    first = run()
    for _ in range(3):
        assert all(map(torch.equal, first, run()))


def test_two_runs_of_a_recipe(tmp_path: Path, quick) -> None:
    found = []
    for name in ("one", "other"):
        words = ["recover.0.compile=true", "recover.1.compile=true", "dtype=bfloat16", "deterministic=true"]
        torch._dynamo.reset()
        assert main(["recover", "recipe=debug", "device=cuda", f"output_dir={tmp_path / name}", *words]) == 0
        files = sorted((tmp_path / name / "recovered").glob("*.safetensors"))
        found.append([hashlib.sha256(file.read_bytes()).hexdigest() for file in files])
    assert found[0] == found[1]
