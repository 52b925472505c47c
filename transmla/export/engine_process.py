"""What an engine computes, asked in the engine's own environment: log-probabilities, greedy tokens, its tokenizer.

A script that imports nothing of this package, so that any Python runs it: `python engine_process.py REQUEST ANSWER`.
REQUEST is a JSON file. ANSWER is a folder for the arrays (`answer.npz`) and what is said beside them (`answer.json`).
It ends with exit code `ABSENT` where the engine is not installed there.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, entry_points, version
from pathlib import Path
from typing import Any

PR_SET_PDEATHSIG = 1
ABSENT = 69
PACKAGES = {
    "transformers": "transformers",
    "vllm": "vllm",
    "vllm-transformers": "vllm",
    "llama.cpp": "llama_cpp",
}
PLUGINS = "vllm.general_plugins"  # the group of entry points that vLLM calls in each of its processes
BLOCK = 128  # tokens: vLLM's blocks of a cache on a CPU; a GPU's are smaller
FAST_CPU_HEAD = 576  # latent and rotary values: the one size that vLLM's MLA kernel for CPUs takes, in 16 bits
Answer = tuple[dict[str, Any], dict[str, Any]]  # arrays by name; what is said beside them


def greedy(model: Any, prompts: Any, count: int, keep: int = 64) -> tuple[Any, Any, Any]:
    """The `count` tokens that a transformers model finds likeliest after each prompt, whatever they are.

    Args:
        prompts: [n, L]. keep: how many words' log-probabilities are kept of every step.

    Returns:
        Tokens [n, count]; numbers and log-probabilities of the likeliest words [n, count, keep].
    """
    import torch

    words, cache, taken, likeliest = prompts, None, [], []
    with torch.no_grad():
        for _ in range(count):
            out = model(words, past_key_values=cache, use_cache=True)
            scores, cache = out.logits[:, -1].float().log_softmax(-1), out.past_key_values
            words = scores.argmax(-1, keepdim=True)
            taken.append(words)
            likeliest.append(scores.topk(min(keep, scores.shape[-1])))
    tokens = torch.cat(taken, 1)
    return tokens, torch.stack([top.indices for top in likeliest], 1), torch.stack([top.values for top in likeliest], 1)


def normalised(logits: Any) -> Any:
    """Log-probabilities [L, V] of logits in float32, summed in float64; fresh_process.py has its twin in PyTorch."""
    import numpy as np

    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits, dtype=np.float64).sum(-1, keepdims=True)).astype(np.float32)


def ask_transformers(request: dict[str, Any]) -> Answer:
    """Every word's log-probability, products in float32."""
    import numpy as np
    import torch
    from transformers import AutoModelForCausalLM

    if request["own_class"]:
        import importlib

        importlib.import_module("transmla")
    model = AutoModelForCausalLM.from_pretrained(request["model"], dtype=torch.float32, trust_remote_code=False).eval()
    with torch.no_grad():
        rows = [normalised(model(torch.tensor([row])).logits[0].float().numpy()) for row in request["tokens"]]
    taken = greedy(model, torch.tensor(request["prompts"]), request["new_tokens"])[0]
    return {"scores": np.stack(rows), "greedy": taken.numpy()}, {"class": type(model).__module__}


def ask_vllm(request: dict[str, Any]) -> Answer:
    """The log-probabilities of the likeliest words; vLLM gives none of the others for the words of a prompt."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")  # no process that outlives this one
    config = json.loads((Path(request["model"]) / "config.json").read_text(encoding="utf-8"))
    size = config.get("kv_lora_rank", 0) + config.get("qk_rope_head_dim", 0)
    if size != FAST_CPU_HEAD or request["dtype"] == "float32":
        os.environ["VLLM_MLA_DISABLE"] = "1"  # read on import
    import numpy as np
    from vllm import LLM, SamplingParams
    from vllm.platforms import current_platform

    # A word is written after every row, so that one which fills all positions loses its last.
    rows = [row[: config["max_position_embeddings"] - 1] for row in request["tokens"]]
    prompts, top = request["prompts"], request["top"]
    options: dict[str, Any] = {}
    if request["engine"] == "vllm-transformers":
        options["model_impl"] = "transformers"
    if current_platform.is_cpu():  # its own rotary kernel is wrong on MLA's shapes
        options["compilation_config"] = {"custom_ops": ["-rotary_embedding"]}
    longest = max(max(map(len, rows)) + 1, max(map(len, prompts)) + request["new_tokens"])
    engine = LLM(
        model=request["model"],
        dtype=request["dtype"],
        max_model_len=longest,
        max_num_seqs=len(prompts),
        kv_cache_memory_bytes=_cache_bytes(config, rows, prompts, request["new_tokens"]),
        max_logprobs=top,
        enforce_eager=True,
        enable_prefix_caching=False,  # it would skip words whose log-probabilities are asked for
        trust_remote_code=False,
        **options,
    )
    once = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=top, ignore_eos=True)
    out = engine.generate([{"prompt_token_ids": row} for row in rows], once, use_tqdm=False)
    words, values = [], []
    for reply in out:
        for found in reply.prompt_logprobs[1:]:  # nothing stands before the first word
            best = sorted(found.items(), key=lambda item: -item[1].logprob)[:top]  # the word itself may come on top
            words.append([word for word, _ in best])
            values.append([entry.logprob for _, entry in best])
    shape = len(rows), -1, top
    on = SamplingParams(temperature=0.0, max_tokens=request["new_tokens"], ignore_eos=True)
    replies = engine.generate([{"prompt_token_ids": prompt} for prompt in prompts], on, use_tqdm=False)
    arrays = {
        "words": np.array(words, np.int64).reshape(shape),
        "values": np.array(values, np.float32).reshape(shape),
        "greedy": np.array([list(reply.outputs[0].token_ids) for reply in replies], np.int64),
    }
    return arrays, {"mla": os.environ.get("VLLM_MLA_DISABLE") != "1"}


def _cache_bytes(config: dict[str, Any], rows: list[list[int]], prompts: list[list[int]], new_tokens: int) -> int:
    """Room for all that is asked at once, with keys and values expanded in float32; by itself vLLM takes nearly all the
    memory there is."""
    row_blocks = sum(len(row) // BLOCK + 1 for row in rows)
    reply_blocks = sum((len(prompt) + new_tokens) // BLOCK + 1 for prompt in prompts)
    head = config["qk_nope_head_dim"] + config["qk_rope_head_dim"]
    token = 2 * 4 * config["num_hidden_layers"] * config["num_attention_heads"] * head
    return token * BLOCK * (max(row_blocks, reply_blocks) + 1)


def ask_llama_cpp(request: dict[str, Any]) -> Answer:
    """Every word's log-probability, with a cache in float32; the tokens that the file's tokenizer makes of texts."""
    import numpy as np
    from llama_cpp import GGML_TYPE_F32, Llama, llama_cpp

    rows, prompts, count = request["tokens"], request["prompts"], request["new_tokens"]
    longest = max(max(map(len, rows)), max(map(len, prompts)) + count)
    defaults = llama_cpp.llama_model_default_params

    def plain() -> Any:
        """Weights as the file has them: those repacked for AMX end in SIGILL on some virtual machines."""
        params = defaults()
        params.use_extra_bufts = False
        return params

    llama_cpp.llama_model_default_params = plain  # the package has no argument for it
    engine = Llama(
        model_path=request["model"],
        n_ctx=longest + 1,
        logits_all=True,
        type_k=GGML_TYPE_F32,
        type_v=GGML_TYPE_F32,
        yarn_attn_factor=-1.0,  # what the file says; the package has values of its own
        yarn_beta_fast=-1.0,
        yarn_beta_slow=-1.0,
        verbose=False,
    )

    def read(words: list[int]) -> Any:
        engine.eval(words)
        return engine.scores[engine.n_tokens - len(words) : engine.n_tokens]

    scores = []
    for row in rows:
        engine.reset()
        scores.append(normalised(read(row)))
    taken = []
    for prompt in prompts:
        engine.reset()
        words, reply = prompt, []
        for _ in range(count):
            words = [int(read(words)[-1].argmax())]
            reply += words
        taken.append(reply)
    made = [engine.tokenize(text.encode(), add_bos=True, special=True) for text in request["texts"]]
    return {"scores": np.stack(scores), "greedy": np.array(taken, np.int64)}, {"tokenized": made}


def quantise(request: dict[str, Any]) -> Answer:
    """A GGUF from another, by llama.cpp's own code."""
    from llama_cpp import llama_cpp as library

    kinds = library.llama_model_tensor_override * (len(request["kept"]) + 1)  # the last one is empty
    kept = kinds(*[(pattern.encode(), request["kept_type"]) for pattern in request["kept"]])
    params = library.llama_model_quantize_default_params()
    params.ftype = getattr(library, request["file_type"])
    params.nthread = len(os.sched_getaffinity(0))
    params.tt_overrides = ctypes.cast(kept, type(params.tt_overrides))
    code = library.llama_model_quantize(request["model"].encode(), request["out"].encode(), ctypes.byref(params))
    if code:
        raise RuntimeError(f"llama_model_quantize ended with {code}")
    return {}, {}


ASK: dict[str, Callable[[dict[str, Any]], Answer]] = {
    "transformers": ask_transformers,
    "vllm": ask_vllm,
    "vllm-transformers": ask_vllm,
    "llama.cpp": ask_llama_cpp,
}


def main(request_file: str, answer_folder: str) -> int:
    """Answer one request; the exit code."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # nobody waits for the answers of a killed run
    os.dup2(2, 1)  # what libraries print is for people
    request = json.loads(Path(request_file).read_text(encoding="utf-8"))
    package = PACKAGES[request["engine"]]
    if (missing := _missing(package, own_class=request["own_class"])) is not None:
        print(missing, file=sys.stderr)
        return ABSENT
    arrays, said = {"probe": lambda _: ({}, {}), "quantise": quantise, "ask": ASK[request["engine"]]}[request["do"]](
        request
    )
    said["version"] = _version(package)
    if arrays:
        import numpy as np

        np.savez(Path(answer_folder) / "answer.npz", **arrays)
    (Path(answer_folder) / "answer.json").write_text(json.dumps(said), encoding="utf-8")
    return 0


def _missing(package: str, *, own_class: bool) -> str | None:
    """What this environment lacks: the engine, and for a student in its own class what brings that class."""
    for name in (package, "transmla") if own_class else (package,):
        try:
            __import__(name)
        except ImportError as error:
            return f"{name} cannot be imported: {error}"
    if own_class and package == "vllm" and not any(plugin.name == "transmla" for plugin in entry_points(group=PLUGINS)):
        return f"no installed transmla has an entry point in {PLUGINS}"
    return None


def _version(package: str) -> str:
    for name in (package, f"{package}_python", f"{package}-cpu"):
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return str(getattr(sys.modules[package], "__version__", "of unknown version"))


if __name__ == "__main__":
    sys.path.pop(0)  # the folder of this file, which is no place to look for modules (-P needs Python 3.11)
    sys.exit(main(*sys.argv[1:]))
