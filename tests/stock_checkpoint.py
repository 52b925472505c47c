"""Tiny exported checkpoints: a stock DeepSeek-V3 model with random weights as the exporter writes it, tokenizers."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

from transmla.export.dimensions import EPS, LATENT_SCALE
from transmla.export.gguf_pre_tokenizers import QWEN2
from transmla.export.older_readers import add_old_fields

YARN = {
    "rope_type": "yarn",
    "rope_theta": 10000.0,
    "factor": 4.0,
    "original_max_position_embeddings": 64,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
}
STEPPED = YARN | {"beta_fast": 10.1, "beta_slow": 10.1}  # divides every frequency but the first, as for linear scaling
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
WORDS = ["th", "he", "the", "Ġthe", "in", "ing", "Ġa", "er", "re", "an", "and"]
# Pairs that a way of cutting text forbids or not: digits, spaces, line ends, apostrophes, signs, accents.
WORDS += [
    "12",
    "123",
    "1234",
    "00",
    "000",
    "ĠĠ",
    "ĠĠĠ",
    "ĊĊ",
    "ĊĊĉ",
    "čĊ",
    "'s",
    "'d",
    "'L",
    "Ġ(",
    "==",
    "Ġ&",
    "&&",
    "t's",
]
WORDS += ["Ã©", "lÃ©", "aĠ", "s,", "aä", "ä½", "â¦", ".1", "%Ġ", "HE", "eH", "eHE"]


def stock_checkpoint(folder: Path, tokenizer: PreTrainedTokenizerFast, **fields: object) -> Path:
    """A checkpoint whose latent norms are made linear, as the exporter's are."""
    torch.manual_seed(3)
    common = dict(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=96,
        moe_intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=256,
        initializer_range=0.2,
        rms_norm_eps=EPS,
        tie_word_embeddings=False,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        rope_interleave=True,
        attention_bias=False,
        q_lora_rank=None,
        kv_lora_rank=24,
        qk_nope_head_dim=16,
        qk_rope_head_dim=8,
        v_head_dim=20,
        first_k_dense_replace=2,
        n_routed_experts=2,
        n_shared_experts=1,
        num_experts_per_tok=1,
        n_group=1,
        topk_group=1,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
        dtype=torch.float32,
    )
    config = DeepseekV3Config(**(common | fields))  # type: ignore[arg-type]
    model = DeepseekV3ForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.uniform_(0.5, 1.5)
            if name.endswith("kv_a_proj_with_mqa.weight"):
                parameter[: config.kv_lora_rank] *= LATENT_SCALE
            if name.endswith("q_a_proj.weight"):
                parameter *= LATENT_SCALE
            if name.endswith(("kv_a_layernorm.weight", "q_a_layernorm.weight")):
                parameter.fill_(EPS**0.5 / LATENT_SCALE)
    model.to(config.dtype).save_pretrained(folder)
    add_old_fields(folder)
    tokenizer.save_pretrained(folder)
    return folder


def byte_pairs(
    first: str | None = None, patterns: tuple[str, ...] = (QWEN2,), *, ignore_merges: bool = False
) -> PreTrainedTokenizerFast:
    """Byte pairs. first: a token put before every text. patterns: where text is cut before pairs are merged."""
    merges, vocab = [], ["<|end|>", *BYTES]
    for word in WORDS:
        left, right = next((word[:cut], word[cut:]) for cut in range(len(word) - 1, 0, -1) if word[:cut] in vocab)
        merges.append((left, right))
        vocab.append(word)
    vocab.append("Ġbig")  # no merges lead to it
    tokenizer = Tokenizer(
        models.BPE({token: number for number, token in enumerate(vocab)}, merges=merges, ignore_merges=ignore_merges)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            *(pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True), AddedToken("<|turn|>", special=True)])
    tokenizer.add_tokens([AddedToken("<tool>", special=False, normalized=False)])
    if first is not None:
        number = tokenizer.token_to_id(first)
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", pair=f"{first} $A {first} $B", special_tokens=[(first, number)]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|end|>", bos_token=first, pad_token="<|end|>"
    )


def sentencepiece(*, complete: bool = True) -> PreTrainedTokenizerFast:
    """What transformers makes of a sentencepiece model such as Llama 2's. complete: a pair for every way to a token."""
    octets = [f"<0x{octet:02X}>" for octet in range(256)]
    letters = ["▁", *"abcdefghijklmnopqrstuvwxyzTHE.,'é"]
    words = ["▁t", "he", "▁the", "in", "▁a", "th", "an", "and", "er", "▁th", "▁▁", "the", "ing"]
    vocab = ["<unk>", "<s>", "</s>", *octets, *letters, *words]
    numbers = {token: number for number, token in enumerate(vocab)}
    ways = [(word[:cut], word[cut:]) for word in words for cut in range(1, len(word))]
    merges = [(left, right) for left, right in ways if left in numbers and right in numbers]
    if not complete:
        merges.remove(("▁th", "e"))
    tokenizer = Tokenizer(models.BPE(numbers, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in ("<unk>", "<s>", "</s>")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
