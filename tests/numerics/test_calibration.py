"""Streamed statistics against the same numbers from whole tensors."""

import gc
import weakref

import pytest
import torch

from tests.conftest import VOCAB, tiny_model, windows
from transmla.convert.attention_moments import AttentionMoments, by_distance
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


@pytest.mark.parametrize("length", [1, 2, 5, 6, 9])
def test_windows_shorter_than_the_stride(length: int) -> None:
    """Of every fourth query the first may be the only one, with hardly a token before it."""
    ids = torch.randint(1, VOCAB, (5, length), generator=torch.Generator().manual_seed(0))
    for layer in calibrate(tiny_model(), ids.split(1), length=length):
        assert layer.distance.isfinite().all() and layer.averaged.isfinite().all()


@pytest.mark.parametrize("rows, columns, stride", [(1, 1, 4), (1, 7, 4), (3, 9, 4), (5, 30, 4), (8, 8, 1), (4, 20, 3)])
def test_sums_along_diagonals(rows: int, columns: int, stride: int) -> None:
    weights = torch.rand(2, rows, columns, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(2, columns, dtype=torch.float64)
    for row in range(rows):
        place = columns - 1 - stride * (rows - 1 - row)
        weights[:, row, place + 1 :] = 0.0
        for column in range(place + 1):
            expected[:, place - column] += weights[:, row, column]
    torch.testing.assert_close(by_distance(weights, stride), expected)


def test_what_attention_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every moment against sums over the source's own attention weights, in float64."""
    monkeypatch.setattr("transmla.convert.attention_moments.QUERY_BLOCK", 5)  # blocks must not change a moment
    monkeypatch.setattr("transmla.convert.attention_moments.QUERY_STRIDE", 1)
    model = tiny_model()
    model.set_attn_implementation("eager")
    rows = windows(4)[0][:2]
    with torch.no_grad():
        out = model(rows, output_attentions=True)
    model.set_attn_implementation("sdpa")
    statistics = calibrate(model, [rows], length=32)
    inputs = collect_inputs(model, [rows])
    for index, (layer, weights) in enumerate(zip(statistics, out.attentions, strict=True)):
        attention, weights = model.model.layers[index].self_attn, weights.double()
        heads, groups = weights.shape[1], attention.k_proj.out_features // attention.head_dim
        x = inputs[index].view(2, 32, -1)
        distance = torch.zeros(heads, 32, dtype=torch.float64)
        for t in range(32):
            for s in range(1, t + 1):  # the first token is a sink and does not count
                distance[:, t - s] += weights[:, :, t, s].sum(0)
        torch.testing.assert_close(layer.distance, distance / distance.sum(-1, keepdim=True), rtol=1e-4, atol=1e-6)
        z = torch.einsum("bhts,bsx->bhtx", weights, x)
        averaged = torch.einsum("bhtx,bhty->xy", z, z) / (heads * 64)
        attended = torch.einsum("bhts,bsx,bsy->xy", weights, x, x) / (heads * 64)
        torch.testing.assert_close(layer.averaged, averaged, rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.averaged_mean, z.mean((0, 1, 2)), rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(layer.attended, attended, rtol=1e-4, atol=1e-6)
        value = (
            (x @ attention.v_proj.weight.double().T).unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2)
        )
        output = attention.o_proj.weight.double().unflatten(1, (heads, -1))
        through = torch.einsum("bshd,xhd->bhsx", value, output)  # O_h v_s
        spread = through[:, :, None] - torch.einsum("bhts,bhsx->bhtx", weights, through)[:, :, :, None]
        cost = (weights.square() * spread.square().sum(-1)).sum((0, 2, 3)) / 64
        torch.testing.assert_close(layer.logit_cost, cost, rtol=1e-4, atol=1e-6)
    seen = []
    handle = model.model.layers[0].self_attn.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    with torch.no_grad():
        model(rows)
    handle.remove()
    torch.testing.assert_close(
        statistics[0].output_mean_square, float(seen[0].square().sum(-1).mean()), rtol=1e-5, atol=0
    )


@pytest.mark.parametrize("batch_size", [1, 3, 4])
def test_a_share_of_the_queries_is_enough(batch_size: int) -> None:
    """Every fourth query, another fourth in every row: together they are all of them."""
    model = tiny_model()
    rows = windows(4)[0][:1].repeat(4, 1)
    (some,) = calibrate(model, rows.split(batch_size), length=32)[:1]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("transmla.convert.attention_moments.QUERY_STRIDE", 1)
        (every,) = calibrate(model, [rows], length=32)[:1]
    torch.testing.assert_close(some.averaged, every.averaged, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(some.attended, every.attended, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "gemma3_text"])
@pytest.mark.parametrize("together", [2, 3, 100])
def test_rows_together(family: str, together: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As a GPU takes rows of small models, whose kernels would else be done before the next one is launched."""
    model = tiny_model(family)
    batches = torch.cat(windows())[:13].split(11)  # the second begins amid a round of four
    one_by_one = calibrate(model, batches, length=32)
    monkeypatch.setattr(AttentionMoments, "_together", lambda *_: together)
    for layer, expected in zip(calibrate(model, batches, length=32), one_by_one, strict=True):
        for name, value in vars(expected).items():
            torch.testing.assert_close(getattr(layer, name), value, rtol=1e-6, atol=1e-7, msg=name)


def test_no_text_is_an_error() -> None:
    with pytest.raises(ValueError, match="calibration.data"):
        calibrate(tiny_model(), [], length=32)


def test_moments_do_not_outlive_the_calibration() -> None:
    """Neither sums nor the source hang on in a registry: for a large model they are tens of gigabytes."""
    model = tiny_model("qwen3")
    calibrate(model, [windows(4)[0]], length=32)
    module = weakref.ref(model.model.layers[0].self_attn)
    del model
    gc.collect()
    assert module() is None
    assert not [thing for thing in gc.get_objects() if type(thing).__name__ == "_Accumulator"]
