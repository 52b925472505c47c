"""An export as transformers 4 reads it: the fields that it needs, and figures that it computed from such files."""

import json
from pathlib import Path

import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import (
    AutoTokenizer,
    CodeLlamaTokenizer,
    DeepseekV3ForCausalLM,
    LlamaTokenizer,
    PreTrainedTokenizerFast,
    Qwen2Tokenizer,
)

from tests.conftest import LLAMA3, settings, tiny_config
from tests.numerics.test_families import GEMMA3
from transmla.export.deepseek_config import deepseek_config
from transmla.export.older_readers import add_old_fields, old_rope_fields, save_tokenizer
from transmla.families import family_of
from transmla.families.student_config import student_config
from transmla.geometry import derive_geometry

BASE = {"rope_type": "default", "rope_theta": 1_000_000.0}
LINEAR = {"rope_type": "linear", "rope_theta": 10_000.0, "factor": 4.0}
LLAMA31 = LLAMA3 | {"rope_theta": 500_000.0}
SCALED = {name: value for name, value in LLAMA31.items() if name != "rope_theta"}

# By case: the source, what transformers 4 finds in config.json, and the log-probabilities of the words 1 to 4 behind
# TOKENS that transformers 4.57.6 with torch 2.13 computed from the files of `export`.
RECORDED = {
    "base": ("llama", BASE, {"rope_theta": 1e6, "rope_scaling": None}, [-4.216369, -3.938924, -4.173559, -4.771937]),
    "llama3": (
        "llama",
        LLAMA31,
        {"rope_theta": 5e5, "rope_scaling": SCALED | {"type": "llama3"}},
        [-4.252243, -3.98035, -4.178835, -4.722215],
    ),
    "linear": (
        "llama",
        LINEAR,
        {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}},
        [-4.337593, -4.076906, -4.196241, -4.620157],
    ),
    "biases": (
        "qwen2",
        BASE,
        {"rope_theta": 1e6, "rope_scaling": None, "attention_bias": True},
        [-6.309012, -4.152827, -3.212621, -4.082795],
    ),
}
TOKENS = torch.arange(1, 61)[None]


def wave(size: int, place: int) -> Tensor:
    """Numbers in -1 to 1 that are the same on every machine."""
    return (torch.arange(size, dtype=torch.float64) * 0.7 + place).sin()


def export(family: str, rope: dict, folder: Path) -> DeepseekV3ForCausalLM:
    """A stock checkpoint of a student with weights of a formula, saved as the exporter saves it."""
    source = tiny_config(family, rope_parameters=dict(rope))
    geometry = derive_geometry(source, settings(qk_rope_head_dim=8, kv_lora_rank=16, freqfold=2))
    student = student_config(source, geometry, family_of(source))
    model = DeepseekV3ForCausalLM(deepseek_config(student, "compact", torch.float32)).eval()
    for place, (name, parameter) in enumerate(sorted(model.named_parameters())):
        size = 0.1 if "norm" in name else 0.5
        nn.init.zeros_(parameter).data.add_(
            (size * wave(parameter.numel(), place) + ("norm" in name)).view_as(parameter)
        )
    model.save_pretrained(folder)
    add_old_fields(folder)
    return model


@torch.no_grad()
def scores(model: nn.Module) -> Tensor:
    return model(TOKENS).logits[0, -1].log_softmax(-1)


@pytest.mark.parametrize("case", RECORDED)
def test_version_4_computes_the_same(case: str, tmp_path: Path) -> None:
    family, rope, fields, recorded = RECORDED[case]
    own = scores(export(family, rope, tmp_path))
    config = json.loads((tmp_path / "config.json").read_text())
    assert {name: config[name] for name in fields} == fields and config["qk_rope_head_dim"] == config["head_dim"] == 8
    assert own[1:5].tolist() == pytest.approx(recorded, abs=1e-4)
    reloaded = DeepseekV3ForCausalLM.from_pretrained(tmp_path)
    assert (scores(reloaded) - own).abs().max() <= 1e-6
    expected = dict(rope) | ({} if rope is BASE else {"type": rope["rope_type"]})
    assert reloaded.config.rope_parameters == expected


def test_rotary_embeddings_by_layer_type() -> None:
    """Gemma 3's windowed layers have a base of their own."""
    nested = {"full_attention": LINEAR, "sliding_attention": {"rope_type": "default", "rope_theta": 5000.0}}
    fields = old_rope_fields(nested)
    scaling = {"rope_type": "linear", "type": "linear", "factor": 4.0}
    assert fields == {"rope_theta": 1e4, "rope_scaling": scaling, "rope_local_base_freq": 5000.0}
    both = tiny_config("gemma3_text", **GEMMA3, rope_parameters=json.loads(json.dumps(nested)), **fields)
    alone = tiny_config("gemma3_text", **GEMMA3, rope_parameters=json.loads(json.dumps(nested)))
    both.rope_parameters["full_attention"].pop("type")
    assert both.rope_parameters == alone.rope_parameters


TEXT = "A walk  through\n\n the first\trun, don't <think>you</think> 你好 héllo <s> </s> <|im_end|> <img> plain word ."
CHAT = [{"role": "user", "content": "Hi there?"}, {"role": "assistant", "content": " ok.\n"}]
TEMPLATE = "{% for m in messages %}<s>[{{ m.role }}] {{ m.content }}</s>{% endfor %}"


def vocabulary() -> dict[str, int]:
    letters = sorted({*pre_tokenizers.ByteLevel.alphabet(), "▁", *"abcdefghijklmnopqrstuvwxyz"})
    return {token: number for number, token in enumerate(["<unk>", "<s>", "</s>", *letters, "th", "un", "rst"])}


MERGES = [("t", "h"), ("u", "n"), ("s", "t"), ("r", "st")]


def qwen() -> PreTrainedTokenizerFast:
    vocab = vocabulary() | {"st": len(vocabulary())}
    marks = dict(unk_token="<unk>", eos_token="<|im_end|>", pad_token="</s>", extra_special_tokens=["<think>"])
    return Qwen2Tokenizer(vocab=vocab, merges=MERGES, **marks)


def llama() -> PreTrainedTokenizerFast:
    return LlamaTokenizer(vocab=vocabulary() | {"st": len(vocabulary())}, merges=MERGES, add_bos_token=True)


def general() -> PreTrainedTokenizerFast:
    """A start token by its post-processor, a space before the first word, named and nameless special tokens."""
    words = Tokenizer(models.BPE(vocabulary() | {"st": len(vocabulary())}, MERGES))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=True), decoders.ByteLevel()
    words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(
        tokenizer_object=words,
        bos_token="<s>",
        eos_token=AddedToken("</s>", lstrip=True, special=True),
        extra_special_tokens=["<think>", "</think>"],
        image_token="<img>",
        padding_side="left",
        clean_up_tokenization_spaces=True,
        model_max_length=128,
    )
    made.add_tokens(["plain"])
    return made


def facts(tokenizer: PreTrainedTokenizerFast) -> dict[str, object]:
    """Everything that a user of a tokenizer sees."""
    ids = tokenizer(TEXT)["input_ids"]
    return {
        "ids": ids,
        "bare": tokenizer(TEXT, add_special_tokens=False)["input_ids"],
        "text": [tokenizer.decode(ids), tokenizer.decode(ids, skip_special_tokens=True)],
        "chat": tokenizer.apply_chat_template(CHAT)["input_ids"],
        "special": [tokenizer.special_tokens_map, sorted(tokenizer.all_special_tokens)],
        "sides": [tokenizer.padding_side, tokenizer.truncation_side, tokenizer.model_max_length, len(tokenizer)],
    }


@pytest.mark.parametrize("make", [qwen, llama, general])
def test_tokenizers(make, tmp_path: Path) -> None:
    """Version 5 reads back what was saved; version 4 knows the class, and finds what it has other defaults for."""
    tokenizer = make()
    tokenizer.chat_template = TEMPLATE
    save_tokenizer(tokenizer, tmp_path)
    for model_type in ("deepseek_v3", "llama"):  # version 5 chooses a class by this, too
        (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
        assert facts(AutoTokenizer.from_pretrained(tmp_path)) == facts(tokenizer)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert saved["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert saved["model_input_names"] == ["input_ids", "attention_mask"]  # version 4 adds token_type_ids by default
    assert saved["add_prefix_space"] == (make is general)  # version 4 rewrites tokenizer.json's to this
    assert saved["clean_up_tokenization_spaces"] is False  # version 5 leaves byte pairs alone, version 4 would not
    assert "extra_special_tokens" not in saved  # version 4 ends in a traceback at a list
    if make is general:
        assert saved["additional_special_tokens"] == ["<think>", "</think>", "<img>"]
        assert saved["image_token"] == "<img>"
        assert saved["padding_side"] == "left"


def test_a_class_with_behaviour_of_its_own_keeps_its_name(tmp_path: Path) -> None:
    """CodeLlama's fills in the middle of a text."""
    save_tokenizer(CodeLlamaTokenizer(vocab=vocabulary() | {"st": len(vocabulary())}, merges=MERGES), tmp_path)
    assert json.loads((tmp_path / "tokenizer_config.json").read_text())["tokenizer_class"] == "CodeLlamaTokenizer"
