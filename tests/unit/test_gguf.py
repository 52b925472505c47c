"""The GGUF of an exported checkpoint: its numbers, its vocabulary, and what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from gguf import ExpertGatingFuncType, GGMLQuantizationType, GGUFReader, TokenType
from gguf.quants import dequantize
from safetensors.torch import load_file
from tokenizers import normalizers, pre_tokenizers
from transformers import AutoModelForCausalLM

from tests.conftest import VOCAB
from tests.mixtral_export import exported_mixtral
from tests.stock_checkpoint import YARN, byte_pairs, sentencepiece, stock_checkpoint
from transmla.cli import main
from transmla.errors import RecipeError
from transmla.export import gguf_file
from transmla.export.gguf_file import save_gguf
from transmla.export.gguf_pre_tokenizers import name_of
from transmla.files import PARTIAL


def written(folder: Path, out: Path, kind: str) -> tuple[dict[str, np.ndarray], GGUFReader]:
    """The tensors of the file in float64, and its reader."""
    save_gguf(folder, out, kind)
    reader = GGUFReader(out)
    found = {}
    for tensor in reader.tensors:
        shape = [int(size) for size in reversed(tensor.shape)]
        found[tensor.name] = dequantize(tensor.data, tensor.tensor_type).reshape(shape).astype(np.float64)
    return found, reader


def norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def feed_forward(h: np.ndarray, gate: np.ndarray, up: np.ndarray, down: np.ndarray) -> np.ndarray:
    opened = h @ gate.T
    return (opened / (1 + np.exp(-opened)) * (h @ up.T)) @ down.T


def mixture(h: np.ndarray, own: dict[str, np.ndarray], key: dict) -> np.ndarray:
    """Experts of the largest shares of a softmax over all, whose sum becomes one; the shared expert beside them."""
    assert key["expert_gating_func"] == ExpertGatingFuncType.SOFTMAX and key["expert_weights_norm"]
    assert key["expert_weights_scale"] == 1.0 and key["expert_shared_count"] == 1
    assert own["ffn_gate_inp.weight"].shape[0] == key["expert_count"]
    found = feed_forward(h, *(own[f"ffn_{name}_shexp.weight"] for name in ("gate", "up", "down")))
    scores = h @ own["ffn_gate_inp.weight"].T
    share = np.exp(scores - scores.max(-1, keepdims=True))
    least = np.sort(share, -1)[:, -key["expert_used_count"], None]
    share = np.where(share >= least, share, 0.0)
    share /= share.sum(-1, keepdims=True)
    for number in range(key["expert_count"]):
        each = feed_forward(h, *(own[f"ffn_{name}_exps.weight"][number] for name in ("gate", "up", "down")))
        found = found + share[:, number, None] * each
    return found


def logits(weights: dict[str, np.ndarray], reader: GGUFReader, tokens: list[int]) -> np.ndarray:
    """What llama.cpp's deepseek2 computes of a file, in float64: attention over latents, adjacent rotary pairs."""
    key = {name.removeprefix("deepseek2."): field.contents() for name, field in reader.fields.items()}
    heads, rope = key["attention.head_count"], key["rope.dimension_count"]
    width, eps, rank = (
        key["attention.key_length_mla"],
        key["attention.layer_norm_rms_epsilon"],
        key["attention.kv_lora_rank"],
    )
    assert key["attention.head_count_kv"] == 1 and key["attention.key_length"] == rank + rope
    nope, count = width - rope, len(tokens)
    angles = np.arange(count)[:, None] * key["rope.freq_base"] ** (-np.arange(0, rope, 2) / rope)
    turn = np.exp(1j * angles)

    def rotate(x: np.ndarray) -> np.ndarray:
        """[T, ..., P]: coordinates 2m and 2m + 1 turn together."""
        turned = (x[..., 0::2] + 1j * x[..., 1::2]) * turn.reshape(count, *[1] * (x.ndim - 2), -1)
        return np.stack((turned.real, turned.imag), -1).reshape(x.shape)

    x = weights["token_embd.weight"][tokens]
    for layer in range(key["block_count"]):
        own = {name.removeprefix(f"blk.{layer}."): value for name, value in weights.items()}
        h = norm(x, own["attn_norm.weight"], eps)
        if key["attention.q_lora_rank"]:
            q = norm(h @ own["attn_q_a.weight"].T, own["attn_q_a_norm.weight"], eps) @ own["attn_q_b.weight"].T
        else:
            q = h @ own["attn_q.weight"].T
        q = q.reshape(count, heads, width)
        joint = h @ own["attn_kv_a_mqa.weight"].T
        latent = norm(joint[:, :rank], own["attn_kv_a_norm.weight"], eps)
        absorbed = np.einsum("thn,hrn->thr", q[..., :nope], own["attn_k_b.weight"])
        scores = np.einsum("thr,sr->hts", absorbed, latent)
        scores += np.einsum("thp,sp->hts", rotate(q[..., nope:]), rotate(joint[:, rank:]))
        scores = np.where(np.tri(count, dtype=bool), scores / np.sqrt(width), -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        mixed = np.einsum("htr,hvr->thv", share @ latent, own["attn_v_b.weight"])
        x = x + mixed.reshape(count, -1) @ own["attn_output.weight"].T
        h = norm(x, own["ffn_norm.weight"], eps)
        if layer < key["leading_dense_block_count"]:
            x = x + feed_forward(h, *(own[f"ffn_{name}.weight"] for name in ("gate", "up", "down")))
        else:
            x = x + mixture(h, own, key)
    return norm(x, weights["output_norm.weight"], eps) @ weights.get("output.weight", weights["token_embd.weight"]).T


@pytest.mark.parametrize("fields", [{}, {"q_lora_rank": 32}, {"tie_word_embeddings": True}])
def test_its_numbers_are_the_checkpoints(fields: dict, tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), **fields)
    weights, reader = written(folder, tmp_path / "it.gguf", "f32")
    tokens = torch.randint(512, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64).eval()
    with torch.no_grad():
        expected = model(torch.tensor([tokens])).logits[0].numpy()
    # transformers makes cos and sin in float32 also where everything else is float64.
    assert np.abs(logits(weights, reader, tokens) - expected).max() < 1e-5 * np.abs(expected).max()
    assert ("output.weight" in weights) == ("tie_word_embeddings" not in fields)


def test_experts(tmp_path: Path) -> None:
    """The file is right whatever the shift is worth; the student has no shift at all."""
    student = exported_mixtral(tmp_path / "it").student
    weights, reader = written(tmp_path / "it", tmp_path / "it.gguf", "f32")
    tokens = torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(0)).tolist()
    with torch.no_grad():
        expected = student(torch.tensor([tokens])).logits[0].numpy()
    assert np.abs(logits(weights, reader, tokens) - expected).max() < 3e-5 * np.abs(expected).max()


@pytest.mark.parametrize("kind", ["bf16", "q8_0"])
def test_experts_are_stored_as_the_kind_says(kind: str, tmp_path: Path) -> None:
    exported_mixtral(tmp_path / "it", dtype=torch.bfloat16)
    weights, reader = written(tmp_path / "it", tmp_path / "it.gguf", kind)
    kinds = {tensor.name: tensor.tensor_type.name.lower() for tensor in reader.tensors}
    stored = load_file(tmp_path / "it" / "model.safetensors")
    for name in ("gate", "up", "down"):
        assert kinds[f"blk.1.ffn_{name}_exps.weight"] == kinds[f"blk.1.ffn_{name}_shexp.weight"] == kind
        assert not weights[f"blk.1.ffn_{name}_shexp.weight"].any()
        for number, found in enumerate(weights[f"blk.1.ffn_{name}_exps.weight"]):
            wanted = stored[f"model.layers.1.mlp.experts.{number}.{name}_proj.weight"].double().numpy()
            assert np.abs(found - wanted).max() <= (0 if kind == "bf16" else 0.01 * np.abs(wanted).max())
    assert kinds["blk.1.ffn_gate_inp.weight"] == "f32"
    assert (weights["blk.1.ffn_gate_inp.weight"] == stored["model.layers.1.mlp.gate.weight"].double().numpy()).all()


def test_what_is_quantised_and_what_is_not(tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=24)
    weights, reader = written(folder, tmp_path / "it.gguf", "q8_0")
    kinds = {tensor.name: tensor.tensor_type for tensor in reader.tensors}
    q8, bf16 = GGMLQuantizationType.Q8_0, GGMLQuantizationType.BF16
    for name in ("token_embd", "output", "blk.1.attn_q_b", "blk.1.attn_v_b", "blk.1.attn_output", "blk.0.ffn_up"):
        expected = bf16 if name == "blk.1.attn_output" and 80 % 32 else q8
        assert kinds[f"{name}.weight"] == expected, name
    for name in ("attn_kv_a_mqa", "attn_q_a", "attn_k_b"):  # scaled rows; rows of 24 numbers, no multiple of 32
        assert kinds[f"blk.1.{name}.weight"] == bf16, name
    assert kinds["blk.1.attn_kv_a_norm.weight"] == GGMLQuantizationType.F32
    source = load_file(folder / "model.safetensors")["model.layers.1.self_attn.kv_a_proj_with_mqa.weight"]
    latent = weights["blk.1.attn_kv_a_mqa.weight"][:32]
    assert np.allclose(latent, source[:32].double(), rtol=2**-8) and (latent != 0).all()


def test_bfloat16_is_stored_bit_by_bit(tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), dtype=torch.bfloat16)
    weights, _ = written(folder, tmp_path / "it.gguf", "bf16")
    source = load_file(folder / "model.safetensors")
    assert (weights["blk.0.ffn_down.weight"] == source["model.layers.0.mlp.down_proj.weight"].double().numpy()).all()


def test_byte_pairs(tmp_path: Path) -> None:
    tokenizer = byte_pairs("<|turn|>")
    tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    folder = stock_checkpoint(tmp_path / "it", tokenizer)
    (folder / "generation_config.json").write_text(
        json.dumps({"eos_token_id": [0, tokenizer("<tool>")["input_ids"][1]]})
    )
    _, reader = written(folder, tmp_path / "it.gguf", "f32")
    field = {name.removeprefix("tokenizer."): entry.contents() for name, entry in reader.fields.items()}
    tokens, kinds = field["ggml.tokens"], field["ggml.token_type"]
    assert field["ggml.model"] == "gpt2" and field["ggml.pre"] == "qwen2" and field["chat_template"]
    assert len(tokens) == len(set(tokens)) == 512 and field["ggml.merges"][0] == "t h"
    assert kinds[tokens.index("<|turn|>")] == TokenType.CONTROL and kinds[-1] == TokenType.UNUSED
    assert kinds[tokens.index("<tool>")] == TokenType.USER_DEFINED
    assert field["ggml.add_bos_token"] and not field["ggml.add_eos_token"]
    assert (field["ggml.bos_token_id"], field["ggml.eos_token_id"]) == (tokens.index("<|turn|>"), 0)
    assert field["ggml.eot_token_id"] == tokens.index("<tool>")


def test_sentencepiece_keeps_the_order_of_its_merges(tmp_path: Path) -> None:
    _, reader = written(stock_checkpoint(tmp_path / "it", sentencepiece()), tmp_path / "it.gguf", "f32")
    field = {name.removeprefix("tokenizer.ggml."): entry.contents() for name, entry in reader.fields.items()}
    score = dict(zip(field["tokens"], field["scores"], strict=True))
    kind = dict(zip(field["tokens"], field["token_type"], strict=True))
    assert score["▁t"] > score["he"] > score["▁the"] > score["in"] > score["ing"]
    assert field["model"] == "llama" and field["add_space_prefix"] and field["add_bos_token"]
    assert kind["<0x0A>"] == TokenType.BYTE and kind["<unk>"] == TokenType.UNKNOWN and kind["</s>"] == TokenType.CONTROL


LINEAR = {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}
SOFTMAX = {"first_k_dense_replace": 1, "scoring_func": "softmax", "topk_method": "greedy"}
REFUSED = {
    "biases": ({"attention_bias": True, "q_lora_rank": 32}, "biases on q_a_proj"),
    "llama3": (
        {"rope_parameters": LINEAR | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                                      "original_max_position_embeddings": 64}},
        "llama3 scaling",
    ),
    "linear": ({"rope_parameters": LINEAR}, "linear scaling"),
    "YaRN of another kind": ({"rope_parameters": YARN | {"mscale_all_dim": 0.5}}, "yarn with another mscale"),
    "YaRN without scales": (
        {"rope_parameters": {k: v for k, v in YARN.items() if not k.startswith("mscale")}}, "yarn with another mscale"
    ),
    "YaRN with another ramp": ({"rope_parameters": YARN | {"beta_slow": 1e-3}}, "beta_fast 32 and beta_slow 1"),
    "half-split": ({"rope_interleave": False}, "rotary pairs"),
    "activation": ({"hidden_act": "gelu"}, "an activation other than silu"),
    "eps": ({"rms_norm_eps": 1e-5}, "rms_norm_eps is 1e-05"),
    "experts": ({"first_k_dense_replace": 1}, "experts (from layer 1 on) that are not weighed by a softmax"),
    "experts without a sum of one": (SOFTMAX | {"norm_topk_prob": False}, "not weighed by a softmax"),
    "experts in groups": (SOFTMAX | {"n_routed_experts": 4, "n_group": 2}, "by groups"),
    "experts with a bias": (SOFTMAX | {"topk_method": "noaux_tc"}, "with a bias"),
    "experts here and there": (SOFTMAX | {"moe_layer_freq": 2}, "in some layers"),
    "26 layers with a query latent": (
        {"num_hidden_layers": 26, "first_k_dense_replace": 26, "q_lora_rank": 8}, "such depths for DeepSeek-V2-Lite"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_reads_wrongly_is_refused_before_weights(name: str, tmp_path: Path, monkeypatch, capsys) -> None:
    fields, reason = REFUSED[name]
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), **fields)
    monkeypatch.setattr(gguf_file, "numbers", None)
    capsys.readouterr()
    assert main(["gguf", str(folder), str(tmp_path / "it.gguf")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: gguf: ") and reason in line and line.count("\n") == 1
    assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(f"{PARTIAL}*"))


def without(name: str, folder: Path) -> None:
    (folder / name).unlink()


def changed(folder: Path, change) -> None:
    content = json.loads((folder / "tokenizer.json").read_text())
    change(content)
    (folder / "tokenizer.json").write_text(json.dumps(content))


def stepped(step) -> object:
    return lambda folder: changed(folder, lambda content: content.update(step))


OWN = [{"type": "Punctuation", "behavior": "Contiguous"}]
NFKC = json.loads(normalizers.NFKC().__getstate__())
LEVEL = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=False).__getstate__())
SPACED = json.loads(pre_tokenizers.ByteLevel(add_prefix_space=True).__getstate__())
BROKEN = {
    "no tokenizer": (lambda folder: without("tokenizer.json", folder), "no tokenizer (tokenizer.json)"),
    "no weights": (lambda folder: without("model.safetensors", folder), "model.safetensors"),
    "a way of cutting of its own": (
        stepped({"pre_tokenizer": {"type": "Sequence", "pretokenizers": [*OWN, LEVEL]}}),
        "--pre NAME",
    ),
    "a space before text": (stepped({"pre_tokenizer": SPACED}), "--pre NAME"),
    "normalised text": (stepped({"normalizer": NFKC}), "normalises text (NFKC)"),
    "unigrams": (
        stepped({"model": {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0]]}}), "is a Unigram"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_missing_or_another_tokenizer_is_refused(name: str, tmp_path: Path, capsys) -> None:
    damage, reason = BROKEN[name]
    folder = stock_checkpoint(tmp_path / "it", byte_pairs())
    damage(folder)
    capsys.readouterr()
    assert main(["gguf", str(folder), str(tmp_path / "it.gguf")]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: gguf: ") and reason in line and line.count("\n") == 1


def test_a_name_by_the_user_takes_the_place_of_an_unknown_way(tmp_path: Path, capsys) -> None:
    folder = stock_checkpoint(tmp_path / "it", byte_pairs())
    stepped(
        {
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [*OWN, LEVEL],
            }
        }
    )(folder)  # type: ignore[operator]
    assert main(["gguf", str(folder), str(tmp_path / "it.gguf"), "--pre", "falcon"]) == 0
    assert GGUFReader(tmp_path / "it.gguf").fields["tokenizer.ggml.pre"].contents() == "falcon"


def test_a_sentencepiece_that_llama_cpp_would_merge_otherwise_is_refused(tmp_path: Path) -> None:
    folder = stock_checkpoint(tmp_path / "it", sentencepiece(complete=False))
    with pytest.raises(RecipeError, match="does not merge '▁th' and 'e' into '▁the'"):
        save_gguf(folder, tmp_path / "it.gguf", "f32")


def test_own_classes_are_refused(tmp_path: Path) -> None:
    from tests.conftest import tiny_model

    tiny_model().save_pretrained(tmp_path / "it")
    with pytest.raises(RecipeError, match="this is a llama; export the model as a stock checkpoint"):
        save_gguf(tmp_path / "it", tmp_path / "it.gguf", "f32")


def test_k_quants_without_llama_cpp_are_refused_before_weights(tmp_path: Path, monkeypatch, capsys) -> None:
    folder = stock_checkpoint(tmp_path / "it", byte_pairs())
    (tmp_path / "python").write_text("#!/bin/sh\nexit 1\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(gguf_file, "numbers", None)
    capsys.readouterr()
    words = ["gguf", str(folder), str(tmp_path / "it.gguf"), "--type", "q4_k_m", "--python", str(tmp_path / "python")]
    assert main(words) == 2
    line = capsys.readouterr().err
    assert "llama-quantize --tensor-type 'attn_kv_a_mqa\\.weight=bf16'" in line and line.count("\n") == 1


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ([], "required: DIR, OUT"),
        (["nowhere", "out.gguf"], "nowhere is no directory"),
        (["nowhere", "out.gguf", "--type", "q5"], "invalid choice: 'q5'"),
        (["nowhere", "out.gguf", "--typo"], "unrecognized arguments: --typo"),
    ],
)
def test_words_that_are_wrong(words: list[str], reason: str, capsys) -> None:
    assert main(["gguf", *words]) == 2
    line = capsys.readouterr().err
    assert line.startswith("error: gguf: ") and reason in line and line.count("\n") == 1


def test_the_names_of_ways_to_cut_are_those_of_the_libraries() -> None:
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    cut = {"type": "Split", "pattern": {"Regex": PRETOKENIZE_REGEX}, "behavior": "Isolated", "invert": False}
    after = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    assert name_of({"type": "Sequence", "pretokenizers": [cut, after]}, False) == "qwen2"
    assert name_of({"type": "Sequence", "pretokenizers": [cut, after]}, True) is None
    digits = {"type": "Digits", "individual_digits": True}
    assert name_of({"type": "Sequence", "pretokenizers": [digits, LEVEL]}, False) == "smollm"
    assert name_of(LEVEL, False) == "gpt-2" and name_of(None, False) is None
