"""Decoupling of RoPE against rotary attention written out in float64."""

import pytest
import torch

from transmla.convert.rope import decouple_rope, mean_rotation, to_complex, to_real
from transmla.geometry.rotary import natural_bands

HEADS, GROUPS, DIM, INPUT = 4, 2, 16, 24
FREQUENCIES = 10000.0 ** (-torch.arange(0, DIM, 2, dtype=torch.float64) / DIM)


def rotate(vector: torch.Tensor, position: int, frequencies: torch.Tensor) -> torch.Tensor:
    """RoPE as every implementation of Llama has it: pairs (l, l + d/2), angle position · frequency."""
    angle = position * torch.cat((frequencies, frequencies))
    half = len(vector) // 2
    turned = torch.cat((-vector[half:], vector[:half]))
    return vector * angle.cos() + turned * angle.sin()


def maps(groups: int = GROUPS) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    query = torch.randn(HEADS, DIM, INPUT, dtype=torch.float64)
    key = torch.randn(groups, DIM, INPUT, dtype=torch.float64)
    root = torch.randn(INPUT, INPUT, dtype=torch.float64)
    x = torch.randn(2, INPUT, dtype=torch.float64)
    return query, key, root @ root.T, x


def decoupled(*maps: torch.Tensor, freqfold: int = 1, collapse: int = 1, **options: object):
    """`decouple_rope` with every channel that the collapse leaves, and no distance unless one is given."""
    channels = DIM // 2 // collapse
    bands = natural_bands(freqfold, collapse, channels)
    return decouple_rope(*maps, FREQUENCIES, bands=bands, channels=channels, **({"distance": None} | options))


def test_complex_form_is_rope() -> None:
    """Re sum conj(q) k exp(-i Δ w) is the dot product of the rotated vectors."""
    q, k = torch.randn(2, DIM, 1, dtype=torch.float64)
    expected = rotate(q[:, 0], 9, FREQUENCIES) @ rotate(k[:, 0], 4, FREQUENCIES)
    phase = torch.polar(torch.ones(DIM // 2, dtype=torch.float64), -5 * FREQUENCIES)
    got = (to_complex(q)[:, 0].conj() * to_complex(k)[:, 0] * phase).sum().real
    torch.testing.assert_close(got, expected)
    torch.testing.assert_close(to_real(to_complex(q)), q)


@pytest.mark.parametrize("t,s", [(0, 0), (7, 2), (63, 5)])
def test_exact_with_one_key_head(t: int, s: int) -> None:
    query, key, moment, x = maps(groups=1)
    rope = decoupled(query, key, moment)
    for head in range(HEADS):
        expected = rotate(query[head] @ x[0], t, FREQUENCIES) @ rotate(key[0] @ x[1], s, FREQUENCIES)
        got = rotate(rope.q_rope[head] @ x[0], t, FREQUENCIES) @ rotate(rope.k_rope @ x[1], s, FREQUENCIES)
        got = got + (rope.q_nope[head] @ x[0]) @ (rope.k_nope[0] @ x[1])
        torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("mixing", ["complex", "real"])
def test_nothing_is_lost_but_rotations(mixing: str) -> None:
    """Kept and remaining parts, both given the true rotation, add up to the source's logit."""
    query, key, moment, x = maps()
    rope = decoupled(query, key, moment, mixing=mixing)
    t, s = 11, 3
    for head in range(HEADS):
        group = head // (HEADS // GROUPS)
        expected = rotate(query[head] @ x[0], t, FREQUENCIES) @ rotate(key[group] @ x[1], s, FREQUENCIES)
        kept = rotate(rope.q_rope[head] @ x[0], t, FREQUENCIES) @ rotate(rope.k_rope @ x[1], s, FREQUENCIES)
        rest = rotate(rope.q_nope[head] @ x[0], t, FREQUENCIES) @ rotate(rope.k_nope[group] @ x[1], s, FREQUENCIES)
        torch.testing.assert_close(kept + rest, expected)


@pytest.mark.parametrize("freqfold,collapse", [(2, 2), (4, 2), (8, 4)])
def test_bands_keep_the_frequencies_of_a_stock_rope(freqfold: int, collapse: int) -> None:
    """At distance zero no rotation matters: the parts add up exactly, and the rope head has d / collapse
    coordinates."""
    query, key, moment, x = maps()
    rope = decoupled(query, key, moment, freqfold=freqfold, collapse=collapse)
    assert rope.k_rope.shape == (DIM // collapse, INPUT)
    for head in range(HEADS):
        expected = (query[head] @ x[0]) @ (key[head // 2] @ x[1])
        got = (rope.q_rope[head] @ x[0]) @ (rope.k_rope @ x[1]) + (rope.q_nope[head] @ x[0]) @ (
            rope.k_nope[head // 2] @ x[1]
        )
        torch.testing.assert_close(got, expected)


def test_complex_mixing_keeps_at_least_the_energy_of_real_mixing() -> None:
    query, key, moment, _ = maps()
    energy = {}
    for mixing in ("complex", "real"):
        rope = decoupled(query, key, moment, freqfold=2, collapse=2, mixing=mixing)
        energy[mixing] = torch.einsum("px,xy,py->", rope.k_rope, moment, rope.k_rope)
    assert energy["complex"] > energy["real"] * 1.01


def test_mean_rotation_and_its_sign() -> None:
    """A head that always looks 3 back loses nothing when its lost rotation becomes the mean's phase."""
    distance = torch.zeros(HEADS, 8, dtype=torch.float64)
    distance[:, 3] = 1.0
    torch.testing.assert_close(
        mean_rotation(distance, FREQUENCIES)[0],
        torch.polar(torch.ones(DIM // 2, dtype=torch.float64), -3 * FREQUENCIES),
    )
    query, key, moment, x = maps()
    rope = decoupled(query, key, moment, distance=distance)
    t, s = 20, 17
    for head in range(HEADS):
        expected = rotate(query[head] @ x[0], t, FREQUENCIES) @ rotate(key[head // 2] @ x[1], s, FREQUENCIES)
        got = rotate(rope.q_rope[head] @ x[0], t, FREQUENCIES) @ rotate(rope.k_rope @ x[1], s, FREQUENCIES)
        got = got + (rope.q_nope[head] @ x[0]) @ (rope.k_nope[head // 2] @ x[1])
        torch.testing.assert_close(got, expected)


def test_mean_rotation_of_a_spread() -> None:
    distance = torch.rand(2, 5, dtype=torch.float64)
    distance /= distance.sum(-1, keepdim=True)
    expected = sum(
        distance[:, step, None] * torch.polar(torch.ones(8, dtype=torch.float64), -step * FREQUENCIES)
        for step in range(5)
    )
    torch.testing.assert_close(mean_rotation(distance, FREQUENCIES), expected)
