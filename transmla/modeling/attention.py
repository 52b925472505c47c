"""Multi-head latent attention (DeepSeek-V2, arXiv:2405.04434, section 2.1), with or without the latent's norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.cache_utils import Cache
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3RMSNorm

from transmla.modeling.config_facts import sliding_window_of
from transmla.modeling.kernels.dispatch import attend
from transmla.modeling.kernels.eager import eager_attention
from transmla.modeling.kernels.one_query import ONE_QUERY
from transmla.modeling.latents import absorbed, is_plain, up_projection


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate pairs (l, l + P/2). x: [B, *, T, P]; cos, sin: [B, T, P]."""
    half = x.shape[-1] // 2
    turned = torch.cat((-x[..., half:], x[..., :half]), dim=-1)
    return x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)


class HeadLinear(nn.Module):
    """A linear map of its own for every head: [B, T, H, i] -> [B, T, H, o], weight [H, o, i]."""

    def __init__(self, heads: int, inputs: int, outputs: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(heads, outputs, inputs))
        nn.init.normal_(self.weight, std=inputs**-0.5)

    def forward(self, x: Tensor) -> Tensor:
        return torch.einsum("bthi,hoi->btho", x, self.weight)


class MLAAttention(nn.Module):
    """Attention that caches a latent c [R] and one rope key [P] per token.

        c = W_a x      k_h = [W_b,h^K c ; R_s k_rope]      q_h = [q_h,nope ; R_t q_h,rope]      v_h = W_b,h^V c

    With several latents c is cut into as many, each for its share of the heads; tied, a head's value is its latent and
    its k_nope the latent's first half (transmla.modeling.latents).

    Without `mla_latent_norm` the latent has no RMSNorm: the exported model's norm is made linear
    (transmla.export.deepseek_weights). With it, both have DeepSeek's own (eps 1e-6), and the normed one is cached.
    Rotary pairs are half-split, (m, m + P/2). Logits are divided by sqrt(nope + rope); conversion folds the source's
    scale into q.

    With a norm on the source's queries (`query_norm`) that norm is kept, over the source's d coordinates of a head,
    and a map of each head follows it:  [q_h,nope ; q_h,rope] = M_h norm(W_h^Q x).

    Reads from the configuration: hidden_size, num_attention_heads, qk_nope_head_dim, qk_rope_head_dim, v_head_dim,
    kv_lora_rank, q_lora_rank, mla_qkv_bias, mla_output_bias, mla_latent_norm, mla_latent_heads, mla_tied,
    attention_dropout, and layer types and sliding window where the family has them; rms_norm_eps and mla_query_norm_dim
    with `query_norm`.

    Args:
        query_norm: class of the queries' norm, made with (d, eps=...), or None.
        softcap: cap on the attention's logits, or None.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        layer_idx: int,
        *,
        query_norm: type[nn.Module] | None = None,
        softcap: float | None = None,
    ) -> None:
        super().__init__()
        self.config = config
        self.layer_idx = layer_idx
        self.num_heads = config.num_attention_heads
        self.qk_nope_head_dim = config.qk_nope_head_dim
        self.qk_rope_head_dim = config.qk_rope_head_dim
        self.v_head_dim = config.v_head_dim
        self.kv_lora_rank = config.kv_lora_rank
        self.q_lora_rank = config.q_lora_rank
        self.attention_dropout = config.attention_dropout or 0.0
        self.softcap = softcap
        self.sliding_window = sliding_window_of(config, layer_idx)
        self.is_causal = True
        self.num_key_value_groups = 1  # transformers' kernels ask for it
        qk_head_dim = self.qk_nope_head_dim + self.qk_rope_head_dim
        self.scaling = qk_head_dim**-0.5

        hidden, bias = config.hidden_size, config.mla_qkv_bias
        norm = DeepseekV3RMSNorm if getattr(config, "mla_latent_norm", False) else nn.Identity
        self.q_norm = None
        if query_norm is not None:
            assert self.q_lora_rank is None, "families with a norm on queries have no query rank"
            width = config.mla_query_norm_dim
            self.q_proj = nn.Linear(hidden, self.num_heads * width, bias=bias)
            self.q_norm = query_norm(width, eps=config.rms_norm_eps)
            self.q_mix = HeadLinear(self.num_heads, width, qk_head_dim)
        elif self.q_lora_rank is None:
            self.q_proj = nn.Linear(hidden, self.num_heads * qk_head_dim, bias=bias)
        else:
            self.q_a_proj = nn.Linear(hidden, self.q_lora_rank, bias=False)
            self.q_a_layernorm = norm(self.q_lora_rank)
            self.q_b_proj = nn.Linear(self.q_lora_rank, self.num_heads * qk_head_dim, bias=bias)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.kv_lora_rank + self.qk_rope_head_dim, bias=bias)
        self.kv_a_layernorm = norm(self.kv_lora_rank)
        self.kv_b_proj = up_projection(config, bias=bias)
        self.o_proj = nn.Linear(self.num_heads * self.v_head_dim, hidden, bias=config.mla_output_bias)

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        cache: Cache | None = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        """hidden_states: [B, T, D]; position_embeddings: cos and sin [B, T, P]. Returns ([B, T, D], weights).

        transformers 5.24 calls `cache` what earlier versions call `past_key_values`.
        """
        cache = past_key_values if cache is None else cache
        batch, length, _ = hidden_states.shape
        if self.q_lora_rank is None:
            query = self.q_proj(hidden_states)
        else:
            query = self.q_b_proj(self.q_a_layernorm(self.q_a_proj(hidden_states)))
        query = query.unflatten(-1, (self.num_heads, -1))
        if self.q_norm is not None:
            query = self.q_mix(self.q_norm(query))
        query = query.transpose(1, 2)
        q_nope, q_rope = query.split([self.qk_nope_head_dim, self.qk_rope_head_dim], dim=-1)
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_states).split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
        latent, k_rope = self.kv_a_layernorm(latent).unsqueeze(1), k_rope.unsqueeze(1)  # one head: what caches expect
        q_rope, k_rope = rotate(q_rope, *position_embeddings), rotate(k_rope, *position_embeddings)
        if cache is not None:
            latent, k_rope = cache.update(latent, k_rope, self.layer_idx)
            if length == 1 and self._absorbs:
                out = absorbed(self.kv_b_proj, q_nope, q_rope, latent, k_rope, attention_mask, self.scaling)
                return self.o_proj(out.reshape(batch, length, -1)), None

        expanded = self.kv_b_proj(latent.squeeze(1)).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
        k_nope, value = expanded.split([self.qk_nope_head_dim, self.v_head_dim], dim=-1)
        key = torch.cat((k_nope, k_rope.expand(-1, self.num_heads, -1, -1)), dim=-1)
        out, weights = attend(
            self,
            torch.cat((q_nope, q_rope), dim=-1),
            key,
            value,
            attention_mask,
            implementation=self.config._attn_implementation,
            scaling=self.scaling,
            dropout=self.attention_dropout if self.training else 0.0,
            softcap=self.softcap,
            sliding_window=self.sliding_window,
            eager=eager_attention,
            **kwargs,
        )
        return self.o_proj(out.reshape(batch, length, -1)), weights

    @property
    def _absorbs(self) -> bool:
        """Whether a single query may read the cached latent itself: kernels other than these have masks of their own,
        and a kv_b_proj that adapters wrap, or whose weight accelerate keeps elsewhere, has to be called."""
        kernel = self.config._attn_implementation in ("sdpa", "eager", ONE_QUERY)
        return kernel and is_plain(self.kv_b_proj) and not self.training and self.softcap is None
