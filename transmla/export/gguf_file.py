"""An exported checkpoint as one GGUF file for llama.cpp, written tensor by tensor."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
from gguf import (
    GGML_QUANT_VERSION,
    MODEL_ARCH,
    MODEL_ARCH_NAMES,
    ExpertGatingFuncType,
    GGMLQuantizationType,
    GGUFWriter,
    LlamaFileType,
    RopeScalingType,
)
from transformers import PretrainedConfig

from transmla.errors import RecipeError
from transmla.export.gguf_limits import unreadable
from transmla.export.gguf_tensors import entries, numbers
from transmla.export.gguf_tokenizer import Vocabulary, add_vocabulary, read_vocabulary
from transmla.export.k_quants import find_quantiser
from transmla.files import PARTIAL, scratch_folder
from transmla.geometry.rotary import context_for_fixed_betas
from transmla.hardware import require_disk
from transmla.sources.config import read_config
from transmla.sources.weight_files import read_headers
from transmla.sources.weights import check_weights

KEY = "gguf"
# The kinds of files, and what gguf-py makes each of: k-quants are llama.cpp's own work.
KINDS = {
    "f32": (GGMLQuantizationType.F32, LlamaFileType.ALL_F32),
    "bf16": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
    "q4_k_m": (GGMLQuantizationType.BF16, LlamaFileType.MOSTLY_BF16),
}


def save_gguf(
    folder: Path,
    out: Path,
    kind: str,
    *,
    pre: str | None = None,
    python: Path | None = None,
    say: Callable[[str], None] = print,
) -> None:
    """Write the GGUF of a stock `deepseek_v3` checkpoint; the file appears when it is whole.

    Args:
        kind: a key of `KINDS`. pre: llama.cpp's name for the way text is cut, where it cannot be found out.
        python: where llama-cpp-python is installed, which makes q4_k_m.

    Raises:
        RecipeError: llama.cpp would read the checkpoint wrongly, or something is missing; before weights are read.
    """
    config, vocabulary = check_folder(folder, pre)
    if out.is_dir():
        raise RecipeError(KEY, f"{out} is a directory; name the file to write")
    quantise = find_quantiser(kind, python, KEY) if kind == "q4_k_m" else None
    number_format, file_type = KINDS[kind]
    wanted = entries(config, read_headers(folder, KEY), number_format)
    size = sum(entry.bytes for entry in wanted)
    require_disk(out.parent, size * 3 // 2 if quantise else size, KEY)
    for note in vocabulary.notes:
        say(f"[gguf] note: {note}")
    with scratch_folder(out.parent / f"{PARTIAL}-{out.name}") as scratch:
        file = scratch / "whole.gguf"
        writer = GGUFWriter(file, MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2])
        _add_metadata(writer, config, out.stem, file_type)
        add_vocabulary(writer, vocabulary, folder)
        for entry in wanted:
            writer.add_tensor_info(entry.name, entry.shape, np.dtype(np.float32), entry.bytes, raw_dtype=entry.kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for content in numbers(folder, KEY, wanted):
            writer.write_tensor_data(content)
        writer.close()
        if quantise is not None:
            say("[gguf] llama.cpp quantises ...")
            made = scratch / "quantised.gguf"
            quantise(file, made)
            file = made
        os.replace(file, out)
    say(f"[gguf] {out}: {out.stat().st_size / 2**20:,.1f} MiB, {kind}, tokenizer {vocabulary.model} ({vocabulary.pre})")


def check_folder(folder: Path, pre: str | None = None) -> tuple[PretrainedConfig, Vocabulary]:
    """Configuration and vocabulary of a checkpoint that llama.cpp reads as it is; no weight is read.

    Raises:
        RecipeError: it is none.
    """
    if not folder.is_dir():
        raise RecipeError(KEY, f"{folder} is no directory; name an exported checkpoint")
    config = read_config(folder, KEY)
    if (reason := unreadable(config)) is not None:
        raise RecipeError(KEY, f"{folder}: {reason}")
    check_weights(folder, config, KEY)
    return config, read_vocabulary(folder, config.vocab_size, KEY, pre)


def _add_metadata(writer: GGUFWriter, config: PretrainedConfig, name: str, file_type: LlamaFileType) -> None:
    """What llama.cpp's loader of `deepseek2` asks for, with attention absorbed: one key head that holds the latent."""
    latent, rope = config.kv_lora_rank, config.qk_rope_head_dim
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(GGML_QUANT_VERSION)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_vocab_size(config.vocab_size)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(1)
    writer.add_q_lora_rank(config.q_lora_rank or 0)  # most depths refuse to load without the key
    writer.add_kv_lora_rank(latent)
    writer.add_key_length(latent + rope)
    writer.add_value_length(latent)
    writer.add_key_length_mla(config.qk_nope_head_dim + rope)
    writer.add_value_length_mla(config.v_head_dim)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_leading_dense_block_count(min(config.first_k_dense_replace, config.num_hidden_layers))
    writer.add_expert_feed_forward_length(config.moe_intermediate_size)  # asked for, also where no layer has experts
    _add_experts(writer, config)
    writer.add_rope_dimension_count(rope)
    parameters = config.rope_parameters
    writer.add_rope_freq_base(parameters["rope_theta"])
    if parameters["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(parameters["factor"])
        context = context_for_fixed_betas(parameters, rope)
        assert context is not None, "gguf_limits refuses it"
        writer.add_rope_scaling_orig_ctx_len(context)
        writer.add_rope_scaling_yarn_log_mul(0.1 * parameters["mscale_all_dim"])  # llama.cpp divides it by 0.1


def _add_experts(writer: GGUFWriter, config: PretrainedConfig) -> None:
    """How experts are chosen and weighed, where there are some (`gguf_limits` refuses other ways)."""
    if config.first_k_dense_replace >= config.num_hidden_layers:
        writer.add_expert_shared_count(0)
        return
    writer.add_expert_count(config.n_routed_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    writer.add_expert_shared_count(config.n_shared_experts)
    writer.add_expert_gating_func(ExpertGatingFuncType.SOFTMAX)
    writer.add_expert_weights_norm(True)
    writer.add_expert_weights_scale(config.routed_scaling_factor)
