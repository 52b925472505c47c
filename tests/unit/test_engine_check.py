"""`transmla verify DIR --engine`: the comparison, and what is said where an engine is not there or differs.

A stand-in for vLLM runs transformers, so that everything around the engine is what it is with vLLM itself.
"""

import json
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch

from tests.stock_checkpoint import byte_pairs, stock_checkpoint
from transmla.cli import main
from transmla.errors import RecipeError
from transmla.export import engine_process
from transmla.export.engine_comparison import distance, distance_of_likeliest, greedy_distance, prompts_of
from transmla.export.engines_asked import EngineError, ask

VLLM = """
import json, os, sys, types
from pathlib import Path
import torch
from transformers import AutoModelForCausalLM

class SamplingParams(types.SimpleNamespace):
    pass

class LLM:
    def __init__(self, model, **options):
        environment = {name: os.environ.get(name) for name in ("VLLM_MLA_DISABLE", "PYTHONPATH")}
        Path(__file__).with_name("options.json").write_text(json.dumps(options | {"environment": environment}))
        self.top = options["max_logprobs"]
        self.model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()

    def generate(self, prompts, params, use_tqdm):
        assert params.ignore_eos and params.temperature == 0
        return [self.reply(prompt["prompt_token_ids"], params) for prompt in prompts]

    @torch.no_grad()
    def reply(self, words, params):
        scores = self.model(torch.tensor([words])).logits[0].log_softmax(-1) + WRONG
        logprobs = None
        if getattr(params, "prompt_logprobs", None):
            logprobs = [None]
            for place in range(len(words) - 1):
                kept = {int(word) for word in scores[place].topk(params.prompt_logprobs).indices} | {words[place + 1]}
                logprobs.append({word: types.SimpleNamespace(logprob=float(scores[place, word])) for word in kept})
        reply = []
        for _ in range(params.max_tokens):
            reply.append(int(self.model(torch.tensor([words + reply])).logits[0, -1].argmax()))
        return types.SimpleNamespace(
            prompt_logprobs=logprobs, outputs=[types.SimpleNamespace(token_ids=tuple(reply))]
        )
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stock_checkpoint(tmp_path_factory.mktemp("made") / "it", byte_pairs())


def python_with(folder: Path, package: str, files: dict[str, str]) -> Path:
    """A Python of an environment that has the package."""
    for name, content in files.items():
        file = folder / "site" / package / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    program = folder / "python"
    program.write_text(f'#!/bin/sh\nPYTHONPATH={folder / "site"} exec {sys.executable} "$@"\n')
    program.chmod(0o755)
    return program


def stand_in(folder: Path, *, wrong: float = 0.0, cpu: bool = True) -> Path:
    platforms = f"import types\ncurrent_platform = types.SimpleNamespace(is_cpu=lambda: {cpu})\n"
    code = VLLM.replace("WRONG", str(wrong)) + "__version__ = '0.0'\n"
    return python_with(folder, "vllm", {"__init__.py": code, "platforms.py": platforms})


def verified(words: list[object], capsys) -> tuple[int, str, str]:
    capsys.readouterr()
    code = main(["verify", *map(str, words)])
    said = capsys.readouterr()
    errors = [line for line in said.err.splitlines() if line.startswith("error")]
    return code, said.out, "\n".join(errors)


def test_vllm(checkpoint: Path, tmp_path: Path, capsys) -> None:
    program = stand_in(tmp_path)
    code, out, _ = verified([checkpoint, "--engine", "vllm", "--python", program, "--prompts", 3], capsys)
    assert code == 0 and "256 words at each of 254 tokens" in out and "96 of 96 the same" in out
    options = json.loads((tmp_path / "site/vllm/options.json").read_text())
    assert options["compilation_config"] == {"custom_ops": ["-rotary_embedding"]}
    assert options["dtype"] == "float32" and options["max_logprobs"] == 256 and options["max_model_len"] == 256
    assert options["environment"]["VLLM_MLA_DISABLE"] == "1" and not options["trust_remote_code"]


def test_vllm_with_its_own_mla_on_a_gpu(tmp_path: Path, capsys) -> None:
    dimensions = dict(kv_lora_rank=512, qk_rope_head_dim=64, qk_nope_head_dim=32, v_head_dim=32)
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), dtype=torch.bfloat16, **dimensions)
    program = stand_in(tmp_path, cpu=False)
    assert verified([folder, "--engine", "vllm", "--python", program, "--new-tokens", 2], capsys)[0] == 0
    options = json.loads((tmp_path / "site/vllm/options.json").read_text())
    assert "compilation_config" not in options and options["environment"]["VLLM_MLA_DISABLE"] is None


def test_a_wrong_engine_is_a_miss(checkpoint: Path, tmp_path: Path, capsys) -> None:
    program = stand_in(tmp_path, wrong=0.01)
    code, out, _ = verified([checkpoint, "--engine", "vllm", "--python", program], capsys)
    missed = [line for line in out.splitlines() if "MISS" in line]
    assert code == 1 and len(missed) == 1 and missed[0].startswith("log-probabilities") and "1.00e-02" in missed[0]


def test_an_engine_that_fails_is_a_miss(checkpoint: Path, tmp_path: Path, capsys) -> None:
    program = python_with(tmp_path, "vllm", {"__init__.py": "", "platforms.py": ""})
    code, out, _ = verified([checkpoint, "--engine", "vllm", "--python", program], capsys)
    assert code == 1 and "it does not run the checkpoint: ImportError: cannot import name 'LLM'" in out


def test_stock_transformers(checkpoint: Path, capsys) -> None:
    code, out, _ = verified([checkpoint, "--engine", "transformers", "--new-tokens", 4, "--prompts", 2], capsys)
    assert code == 0 and "8 of 8 the same" in out and "512 words at each of 256 tokens" in out


def test_a_package_without_its_library_is_not_there(checkpoint: Path, tmp_path: Path, capsys) -> None:
    files = {"__init__.py": "raise ImportError('no library')\n"}
    program = python_with(tmp_path, "llama_cpp", files)
    code, _, line = verified([checkpoint, "--engine", "llama.cpp", "--python", program], capsys)
    assert code == 2 and "llama.cpp is not in" in line and "no library" in line and "pip install llama-cpp" in line


def own_class(checkpoint: Path, folder: Path) -> Path:
    """A checkpoint whose class transmla brings, as far as its configuration says."""
    shutil.copytree(checkpoint, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "mla_llama"}))
    return folder


def test_own_classes_need_an_installed_transmla(checkpoint: Path, tmp_path: Path, capsys) -> None:
    folder = own_class(checkpoint, tmp_path / "it")
    python_with(tmp_path, "transmla", {"__init__.py": "raise ImportError('no transmla')\n"})
    program = stand_in(tmp_path)
    code, _, line = verified([folder, "--engine", "vllm", "--python", program], capsys)
    assert code == 2 and "vllm with transmla is not in" in line and "pip install vllm transmla" in line
    code, _, line = verified([folder, "--engine", "llama.cpp", "--python", program], capsys)
    assert code == 2 and "this is a mla_llama" in line  # before anything is asked for


@pytest.mark.parametrize("plugins", [[], ["transmla"]])
def test_vllm_has_to_find_the_plugin(plugins: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    points = [SimpleNamespace(name=name) for name in ["lora", *plugins]]
    monkeypatch.setattr(engine_process, "entry_points", lambda group: points)
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    found = engine_process._missing("vllm", own_class=True)
    assert found == (None if plugins else "no installed transmla has an entry point in vllm.general_plugins")
    assert engine_process._missing("vllm", own_class=False) is None


def test_the_table_is_said_beside_what_is_measured(tmp_path: Path, capsys) -> None:
    rope = {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}
    folder = stock_checkpoint(tmp_path / "it", byte_pairs(), rope_parameters=rope)
    _, out, _ = verified([folder, "--engine", "vllm", "--python", stand_in(tmp_path), "--new-tokens", 2], capsys)
    assert "vllm would not read it rightly: linear scaling of the rotary embedding" in out
    _, out, _ = verified([folder, "--engine", "vllm-transformers", "--python", tmp_path / "python"], capsys)
    assert "rightly" not in out
    assert json.loads((tmp_path / "site/vllm/options.json").read_text())["model_impl"] == "transformers"


WORDS = {
    "an unknown engine": (["--engine", "sglang"], "invalid choice: 'sglang'"),
    "no such python": (["--engine", "vllm", "--python", "/nowhere/python"], "is no program that can be run"),
    "a folder as python": (["--engine", "vllm", "--python", "/tmp"], "is no program that can be run"),
    "a python without an engine": (["--python", sys.executable], "name it with --engine"),
    "a GGUF for vLLM": (["--engine", "vllm", "--gguf", "it.gguf"], "--gguf is what llama.cpp reads"),
    "a GGUF that is none": (["--engine", "llama.cpp", "--gguf", __file__], "is no GGUF that can be read"),
    "a lost GGUF": (["--engine", "llama.cpp", "--gguf", "nowhere.gguf"], "nowhere.gguf is not there"),
    "more tokens than positions": (["--engine", "transformers", "--new-tokens", "300"], "leave room for 240"),
    "no prompts": (["--engine", "transformers", "--prompts", "0"], "0 is no whole number from 1 on"),
}


@pytest.mark.parametrize("name", WORDS)
def test_words_that_are_wrong(name: str, checkpoint: Path, capsys) -> None:
    words, reason = WORDS[name]
    code, _, line = verified([checkpoint, *words], capsys)
    assert code == 2 and line.startswith("error: verify: ") and reason in line


def test_a_program_that_is_no_python(tmp_path: Path) -> None:
    (tmp_path / "python").write_bytes(b"\x7fELF")
    (tmp_path / "python").chmod(0o755)
    with pytest.raises(RecipeError, match="cannot be run: Exec format error"):
        ask("vllm", tmp_path / "python", "verify", do="probe")
    with pytest.raises(EngineError, match="no output"):
        ask("vllm", Path(shutil.which("false") or ""), "verify", do="probe")


def random_scores(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).log_softmax(-1)


def test_distances() -> None:
    own, other = random_scores(2, 5, 40), random_scores(2, 5, 40)
    whole = distance(own, other)
    expected = sum(
        float(own[n, t, v].exp() * (own[n, t, v] - other[n, t, v]))
        for n in range(2) for t in range(5) for v in range(40)
    ) / 10  # fmt: skip
    assert abs(whole.kl - expected) < 1e-9 and whole.tokens == 10 and whole.words == 40
    assert abs(whole.difference - float((own - other).abs().max())) < 1e-12
    top = other[:, :4].topk(39)
    part = distance_of_likeliest(own, top.indices, top.values)
    assert abs(part.kl - distance(own[:, :4], other[:, :4]).kl) < 1e-9  # the one word left over is one class
    few = other[:, :4].topk(8)
    assert 0 < distance_of_likeliest(own, few.indices, few.values).kl < part.kl


def test_a_reply_that_parts_is_judged_where_it_parts() -> None:
    expected = torch.tensor([[3, 1, 4], [2, 2, 2]])
    found = torch.tensor([[3, 5, 9], [2, 2, 2]])
    words = torch.tensor([[[3, 0], [1, 5], [4, 0]], [[2, 0]] * 3])
    values = torch.tensor([[[-0.1, -3.0], [-0.5, -0.75], [0.0, -9.0]], [[-0.1, -3.0]] * 3])
    near = greedy_distance(expected, words, values, found)
    assert (near.same, near.total, near.parted, near.gap) == (4, 6, 1, 0.25)
    far = greedy_distance(expected, words, values, torch.tensor([[3, 7, 4], [2, 2, 2]]))
    assert far.gap == math.inf  # none of the words that are kept
    assert far.same == 4  # the last word is the same by chance: it follows another text
    assert greedy_distance(expected, words, values, expected).gap == 0.0


def test_prompts_are_spread_over_the_text() -> None:
    text = torch.arange(100).view(2, 50)
    assert prompts_of(text, 3, 10)[:, 0].tolist() == [0, 45, 90]
    assert prompts_of(text[:1, :4], 2, 10).tolist() == [[0, 1, 2, 3]] * 2
