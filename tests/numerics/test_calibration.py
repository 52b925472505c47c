"""Streamed statistics against the same numbers from whole tensors."""

import pytest
import torch

from tests.conftest import tiny_model, windows
from transmla.convert.calibration import calibrate


def collect_inputs(model, batches) -> list[torch.Tensor]:
    seen: list[list[torch.Tensor]] = [[] for _ in model.model.layers]
    handles = [
        layer.self_attn.register_forward_pre_hook(
            lambda module, args, kwargs, index=index: seen[index].append(kwargs["hidden_states"].flatten(0, 1)),
            with_kwargs=True,
        )
        for index, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        for batch in batches:
            model(batch)
    for handle in handles:
        handle.remove()
    return [torch.cat(parts).double() for parts in seen]


@pytest.mark.parametrize("split", [1, 4, 16])
def test_moments_do_not_depend_on_batching(split: int) -> None:
    model, batches = tiny_model(), windows()
    rows = torch.cat(batches)
    statistics = calibrate(model, rows.split(split), length=32)
    for layer, x in zip(statistics, collect_inputs(model, [rows]), strict=True):
        torch.testing.assert_close(layer.second_moment, x.T @ x / len(x), rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.mean, x.mean(0), rtol=1e-5, atol=1e-6)
        assert layer.augmented()[-1, -1] == 1.0
    assert model.config._attn_implementation == "sdpa"


def test_distances_and_output_energy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("transmla.convert.calibration.QUERY_BLOCK", 5)  # blocks must not change the histogram
    model = tiny_model()
    model.set_attn_implementation("eager")
    row = windows(4)[0][:1]
    with torch.no_grad():
        out = model(row, output_attentions=True)
    model.set_attn_implementation("sdpa")
    statistics = calibrate(model, [row], length=32)
    for layer, weights in zip(statistics, out.attentions, strict=True):
        expected = torch.zeros(4, 32, dtype=torch.float64)
        for t in range(32):
            for s in range(1, t + 1):  # the first token is a sink and does not count
                expected[:, t - s] += weights[0, :, t, s].double()
        expected /= expected.sum(-1, keepdim=True)
        torch.testing.assert_close(layer.distance, expected, rtol=1e-4, atol=1e-6)
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(row)
    handle.remove()
    torch.testing.assert_close(statistics[0].output_mean_square, float(seen[0].square().sum(-1).mean()), rtol=1e-5, atol=0)


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration.data"):
        calibrate(tiny_model(), [], length=32)
