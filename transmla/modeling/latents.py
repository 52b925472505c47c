"""From cached latents to keys and values, where there are several latents or keys and values are tied.

A cached latent of R numbers is cut into n of R/n, each for H/n neighbouring heads (GLA, arXiv:2505.21523). One latent
for all heads goes through a plain linear layer instead.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from transmla.modeling.config_facts import is_tied, latent_heads
from transmla.modeling.kernels.one_query import one_latent_query


class LatentBlocks(nn.ModuleList):
    """Every latent's own linear layer to the keys and values of its heads: the blocks of a block-diagonal `kv_b`.

    What is between the blocks is no weight, so that no optimizer, adapter or checkpoint can fill it.
    """

    def forward(self, latent: Tensor) -> Tensor:
        """[..., R] -> [..., H·(N + V)]."""
        parts = latent.chunk(len(self), dim=-1)
        return torch.cat([up(part) for up, part in zip(self, parts, strict=True)], dim=-1)


class TiedLatents(nn.Module):
    """Values that are the latents, keys that are their first halves (GTA, arXiv:2505.21523); there is no weight."""

    def __init__(self, *, latents: int, heads: int, key_width: int) -> None:
        super().__init__()
        self.latents, self.heads, self.key_width = latents, heads, key_width

    def forward(self, latent: Tensor) -> Tensor:
        """[..., R] -> [..., H·(N + V)], V = R/n."""
        parts = latent.unflatten(-1, (self.latents, -1))
        both = torch.cat((parts[..., : self.key_width], parts), dim=-1)
        return both.repeat_interleave(self.heads // self.latents, dim=-2).flatten(-2)


def up_projection(config: PretrainedConfig, *, bias: bool) -> nn.Module:
    """What makes keys without rotation and values of the latents, [..., R] -> [..., H·(N + V)]."""
    latents, heads = latent_heads(config), config.num_attention_heads
    if is_tied(config):
        return TiedLatents(latents=latents, heads=heads, key_width=config.qk_nope_head_dim)
    width = config.qk_nope_head_dim + config.v_head_dim
    if latents == 1:
        return nn.Linear(config.kv_lora_rank, heads * width, bias=bias)
    size = config.kv_lora_rank // latents
    return LatentBlocks(nn.Linear(size, heads // latents * width, bias=bias) for _ in range(latents))


def is_plain(up: nn.Module) -> bool:
    """Whether the weights of an up-projection may be read: adapters wrap it, and accelerate may keep them elsewhere."""
    if isinstance(up, TiedLatents):
        return True
    layers = list(up) if isinstance(up, LatentBlocks) else [up]
    return all(type(layer) is nn.Linear and "_hf_hook" not in vars(layer) for layer in layers)


def absorbed(
    up: nn.Module,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """Attention of one query without expanding the cache: kv_b is absorbed into query and output (DeepSeek-V2, 2.1.2).

        logits = (W_b^K^T q_nope) . c + q_rope . k_rope          out = W_b^V (sum of a c)

    A bias of the keys adds one number to all logits of a query, which softmax does not see; one of the values is added
    once, since attention's weights sum to one.

    Args:
        up: of `up_projection`. q_nope, q_rope: [B, H, 1, N] and [B, H, 1, P]. latent, k_rope: [B, 1, S, R] and
            [B, 1, S, P].

    Returns:
        [B, H, 1, V].
    """
    layers: list[Any] = [up]
    if isinstance(up, TiedLatents):
        layers = [None] * up.latents
    elif isinstance(up, LatentBlocks):
        layers = list(up)
    count = len(layers)
    shares = zip(layers, q_nope.chunk(count, 1), q_rope.chunk(count, 1), latent.chunk(count, -1), strict=True)
    found = [_absorbed_into(*share, k_rope, mask, scaling) for share in shares]
    return found[0] if count == 1 else torch.cat(found, dim=1)


def _absorbed_into(
    up: nn.Linear | None,
    q_nope: Tensor,
    q_rope: Tensor,
    latent: Tensor,
    k_rope: Tensor,
    mask: Tensor | None,
    scaling: float,
) -> Tensor:
    """`absorbed` for the heads of one latent; up: None where they are tied."""
    if up is None:
        query = F.pad(q_nope, (0, latent.shape[-1] - q_nope.shape[-1]))
        return one_latent_query(query, q_rope, latent, k_rope, mask, scaling)
    heads, width = q_nope.shape[1], q_nope.shape[-1]
    weight = up.weight.unflatten(0, (heads, -1))
    up_key, up_value = weight[:, :width], weight[:, width:]
    query = torch.einsum("bhtn,hnr->bhtr", q_nope, up_key)
    summed = one_latent_query(query, q_rope, latent, k_rope, mask, scaling)
    out = torch.einsum("bhtr,hvr->bhtv", summed, up_value)
    if up.bias is not None:
        out = out + up.bias.unflatten(0, (heads, -1))[:, None, width:]
    return out
