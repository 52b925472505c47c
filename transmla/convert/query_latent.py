"""A query latent whose real RMSNorm stands in for the norms of all heads.

The norms divide each head's query by its own root mean square. Most of that spread over tokens is shared by the heads,
and DeepSeek's query latent has one norm: z = A x / rms(A x), with |A x|² the mean over heads of |W_h x|² / |W_h|².
"""

from __future__ import annotations

import torch
from torch import Tensor

from transmla.families.family import SourceAttention

EPS = 1e-6  # of DeepSeek's norms of latents


def query_latent(source: SourceAttention, rank: int) -> Tensor:
    """A: [R, D], the R leading directions of the heads' mean square; with R = D all of it."""
    maps = source.query[..., :-1]
    unit = maps / maps.flatten(1).norm(dim=1)[:, None, None]
    values, vectors = torch.linalg.eigh(torch.einsum("hwx,hwy->xy", unit, unit) / len(unit))
    return values[-rank:].clamp_min(0.0).sqrt()[:, None] * vectors[:, -rank:].mT * maps.shape[-1] ** 0.5


def normed_latent(latent: Tensor, x: Tensor) -> Tensor:
    """z of inputs x [n, D]: [n, R]."""
    z = x @ latent.mT
    return z * (z.square().mean(-1, keepdim=True) + EPS).rsqrt()
