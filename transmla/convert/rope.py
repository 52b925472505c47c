"""Decoupling of RoPE: a few rotary channels shared by all heads; everything else loses its rotation.

Pair coordinate l of a head with l + d/2 into one complex number. With queries q at position t and keys k at s, the
source's logit is  Re sum_l conj(q_l) k_l exp(-i (t - s) w_l).  Within a band of `freqfold` neighbouring frequencies
any invertible complex matrix may mix the (head, frequency) components of the keys, its inverse the queries', exactly
as far as the frequencies of the band are equal (TransMLA, arXiv:2502.07864, section 4.2, mixes with real orthogonal
matrices). The leading components of a band (PCA of the keys) keep a rotation, at the frequencies `collapse * m`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from transmla.geometry.rotary import Band


@dataclass(frozen=True)
class DecoupledRope:
    """Maps of the augmented input [x; 1], D1 = D + 1; those of the queries may be maps of another n-dimensional input.

    q_nope: [H, d, n]. k_nope: [G, d, D1], without rotation. q_rope: [H, P, n]. k_rope: [P, D1]; pairs (m, m + P/2).
    """

    q_nope: Tensor
    k_nope: Tensor
    q_rope: Tensor
    k_rope: Tensor


def to_complex(maps: Tensor) -> Tensor:
    """[..., d, D1] real to [..., d/2, D1] complex: coordinate l is the real, l + d/2 the imaginary part."""
    real, imaginary = maps.chunk(2, dim=-2)
    return torch.complex(real, imaginary)


def to_real(maps: Tensor) -> Tensor:
    """Inverse of `to_complex`."""
    return torch.cat((maps.real, maps.imag), dim=-2)


def mean_rotation(distance: Tensor, frequencies: Tensor) -> Tensor:
    """E[exp(-i Δ w)] under a distribution of distances Δ = t - s.

    Args:
        distance: [H, L], rows sum to one.
        frequencies: [n], radians a position.

    Returns:
        [H, n] complex.
    """
    steps = torch.arange(distance.shape[-1], dtype=distance.dtype, device=distance.device)
    phase = torch.outer(steps, frequencies)
    return torch.complex(distance @ phase.cos(), -(distance @ phase.sin()))


def decouple_rope(
    query: Tensor,
    key: Tensor,
    second_moment: Tensor,
    frequencies: Tensor,
    *,
    bands: Sequence[Band],
    channels: int,
    distance: Tensor | None,
    mixing: str = "complex",
) -> DecoupledRope:
    """Split rotary attention into a shared rope head and parts without rotation.

    Exact when freqfold = collapse = 1 and there is one key head: then every component keeps its own rotation.

    Args:
        query, key: [H, d, n] and [G, d, D1], float64. The identity as query gives the maps that apply to a head's d
            coordinates.
        second_moment: E[x x^T] of the augmented input, [D1, D1].
        frequencies: [d/2], the source's rotary frequencies.
        bands: which frequencies share which channels of the rope head, N = P/2; those in none keep no rotation. A
            channel that no component is left for is zero.
        channels: N.
        distance: [H, L] distribution of attention distances; a lost rotation then becomes the phase of its mean under
            that distribution. None: it becomes 1. (The mean itself also shrinks the logits, as the best constant for
            their squared error does; measured, keeping their size is better: docs/experiments.md.)
        mixing: `complex` (unitary) or `real` (orthogonal, as TransMLA).
    """
    heads, groups = len(query), len(key)
    q, k = to_complex(query), to_complex(key)
    moment = second_moment.to(k.dtype)
    pairs = q.shape[1]
    group_of = torch.arange(heads, device=query.device) // (heads // groups)

    if distance is None:
        phase = torch.ones(heads, pairs, dtype=q.dtype, device=q.device)
    else:
        phase = torch.polar(torch.ones_like(frequencies), mean_rotation(distance, frequencies).angle())
    q_nope = phase.conj()[:, :, None] * q
    k_nope = k.clone()
    q_rope = q.new_zeros(heads, channels, q.shape[-1])
    k_rope = k.new_zeros(channels, k.shape[-1])
    for part in bands:
        band, width = slice(part.start, part.stop), part.stop - part.start
        into = list(part.channels)[: groups * width]
        keep = len(into)
        block = k[:, band].flatten(0, 1)  # [G*F, D1]
        gram = block @ moment @ block.mH
        if mixing == "real":
            gram = gram.real.to(gram.dtype)
        basis = torch.linalg.eigh(gram).eigenvectors.flip(-1)[:, :keep]  # k ≈ basis z
        kept = basis.mH @ block  # z: [keep, D1]
        k_nope[:, band] -= (basis @ kept).unflatten(0, (groups, width))
        k_rope[into] = kept
        mix = basis.unflatten(0, (groups, width))[group_of]  # [H, F, keep]
        q_rope[:, into] = torch.einsum("hfj,hfx->hjx", mix.conj(), q[:, band])
    return DecoupledRope(
        q_nope=to_real(q_nope),
        k_nope=to_real(k_nope),
        q_rope=to_real(q_rope),
        k_rope=to_real(k_rope),
    )
