"""When `compile: auto` compiles, and what it says where it does not."""

import pytest
import torch

from tests.conftest import tiny_config
from transmla.recipe.stages import Distill, Layerwise, Sft
from transmla.recover import compiling
from transmla.recover.compiling import FEW, why_not

GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def _a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, "has_compiler", lambda: True)
    monkeypatch.setattr(compiling, "find_spec", lambda name: name)


def stage(kind: type = Distill, **fields: object):
    return kind(**({"kind": kind.__name__.lower(), "data": ["unused"], "tokens": FEW} | fields))


@pytest.mark.parametrize("kind", [Layerwise, Distill, Sft])
def test_layers_are_compiled_on_a_gpu(kind: type) -> None:
    assert stage(kind).compile == "auto"
    assert why_not(stage(kind), tiny_config(), GPU, one_shape=True) is None


@pytest.mark.parametrize(
    "asked, family, device, one_shape, reason",
    [
        (stage(), "llama", torch.device("cpu"), True, "off a GPU"),
        (stage(tokens=FEW - 1), "llama", GPU, True, "999,999 tokens"),
        (stage(train="lora"), "llama", GPU, True, "adapters"),
        (stage(Layerwise, logits=0.5), "llama", GPU, True, "logits"),
        (stage(), "mixtral", GPU, True, "experts"),
        (stage(), "llama", GPU, False, "padded"),
    ],
)
def test_reasons(asked, family: str, device: torch.device, one_shape: bool, reason: str) -> None:
    assert reason in (why_not(asked, tiny_config(family), device, one_shape=one_shape) or "")


@pytest.mark.parametrize("name, reason", [("has_compiler", "C compiler"), ("find_spec", "Triton")])
def test_without_a_compiler(name: str, reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiling, name, lambda *_: None)
    assert reason in (why_not(stage(), tiny_config(), GPU, one_shape=True) or "")
