"""The copy of a GPU's tensors from which a checkpoint is written."""

import pytest
import torch

from transmla.recover.snapshot import HostMemory

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def test_copies_lie_in_locked_memory_and_are_of_their_time() -> None:
    """Also of tensors on the CPU among them, which AdamW's steps may be."""
    memory = HostMemory()
    tensors = {"weight": torch.randn(300, 700, device="cuda"), "step": torch.tensor(3.0)}
    tensors |= {"half": torch.randn(5, 3, device="cuda").bfloat16().T, "empty": torch.empty(0, 4, device="cuda")}
    expected = {name: value.cpu().clone() for name, value in tensors.items()}
    found = memory.copies({"file": tensors})["file"]
    assert found["weight"].is_pinned()
    for value in tensors.values():
        value.zero_()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    again = memory.copies({"file": tensors})["file"]
    assert again["weight"].data_ptr() == found["weight"].data_ptr() and not again["weight"].any()
    memory.release()
    assert not again["weight"].is_pinned()
    assert float(torch.ones(3, device="cuda").sum()) == 3.0  # no error was left behind
