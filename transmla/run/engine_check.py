"""`transmla verify DIR --engine ENGINE`: an exported checkpoint in an engine, beside the student it was made of."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGUFReader, LlamaFileType
from torch import Tensor
from transformers import AutoTokenizer, PretrainedConfig, PreTrainedTokenizerBase

from transmla.errors import RecipeError
from transmla.export.engine_comparison import distance, distance_of_likeliest, greedy_distance, prompts_of
from transmla.export.engine_process import greedy
from transmla.export.engines import reading_of
from transmla.export.engines_asked import Answers, EngineError, ask
from transmla.export.gguf_file import KINDS, check_folder, save_gguf
from transmla.export.reload_check import DEFAULT_TOLERANCE, MAX_KL, log_probabilities
from transmla.files import temporary_folder
from transmla.hardware import free_memory
from transmla.recipe.names import share
from transmla.run.finished_folder import Finding, digests_of, kept_recipe, kept_text, student_of
from transmla.sources.config import read_config
from transmla.sources.gguf_header import check_gguf
from transmla.sources.local_model import load_model

KEY = "verify"
TOP = 256  # words that vLLM is asked for at every token
PROMPT = 16  # tokens
SAMPLE = 256  # tokens, where no evaluated text is kept
TEXT = (
    "I'd   say it's 12345 times as big,\n\n\tsaid  Zoë (the élève): «Ça va ?» 你好，世界 a你好b 🦙🦙 theHEre x==y "
    "&& z!=0\r\nShe'LL RE-read it... 3.14159 % of 2,000,000!"
)


@dataclass(frozen=True)
class Bound:
    """What an engine may differ by.

    difference: of a log-probability, nats; None: whatever. kl: the mean, nats per token. tie: by how much the student
    may prefer its own word to the one that the engine's greedy reply has instead, nats.
    """

    difference: float | None
    kl: float
    tie: float


# By how the weights are stored, finer ones first. Quantised weights are other weights: their distance is stated, and
# bounded where more than the format's own error must be the reason.
BOUNDS = {
    "float32": Bound(DEFAULT_TOLERANCE[torch.float32], 1e-5, 4e-3),
    "bfloat16": Bound(DEFAULT_TOLERANCE[torch.bfloat16], MAX_KL, 0.25),
    "q8_0": Bound(None, 2e-2, 0.5),
    "q4_k_m": Bound(None, 0.5, 2.0),
}
STORED = {"f32": "float32", "bf16": "bfloat16"}


@dataclass(frozen=True)
class Place:
    """exported: the checkpoint. student: the model that it was made of; None where it is not there."""

    exported: Path
    student: Path | None
    config: PretrainedConfig

    @property
    def own_class(self) -> bool:
        """Whether transmla brings the checkpoint's class."""
        return self.config.model_type != "deepseek_v3"


def check_engine(
    folder: Path,
    engine: str,
    *,
    python: Path | None = None,
    gguf: Path | None = None,
    prompts: int = 4,
    new_tokens: int = 32,
) -> list[Finding]:
    """Log-probabilities and greedy tokens of an engine, and for llama.cpp the tokens of text.

    Args:
        folder: a finished output directory, or an exported checkpoint alone, which is compared with stock transformers.
        python: of the environment that has the engine. gguf: what llama.cpp reads; None: made for the occasion.
        prompts: number of them. new_tokens: after each.

    Raises:
        RecipeError: there is no such engine, no checkpoint, or no memory for the comparison.
    """
    if gguf is not None and engine != "llama.cpp":
        raise RecipeError(KEY, f"--gguf is what llama.cpp reads, {engine} reads the directory; leave it out")
    place = _place(folder)
    if new_tokens > (room := place.config.max_position_embeddings - PROMPT):
        raise RecipeError(
            KEY, f"--new-tokens {new_tokens}: prompts of {PROMPT} tokens leave room for {room}; give fewer"
        )
    if gguf is not None:
        check_gguf(gguf, KEY)
    elif engine == "llama.cpp":
        check_folder(place.exported)
    ask(engine, python, KEY, own_class=place.own_class, do="probe")
    found = [digests_of(name, path) for name, path in _artifacts(folder, place)]
    if any(line.good is False for line in found):
        return [*found, Finding(engine, None, "not asked: files are missing or damaged")]
    if not (reading := reading_of(engine, place.config)).reads:
        found.append(Finding("engine table", None, f"{engine} would not read it rightly: {'; '.join(reading.why)}"))
    tokenizer = AutoTokenizer.from_pretrained(place.exported, trust_remote_code=False)
    text = _shipped_text(tokenizer)
    tokens = None if place.exported == folder else kept_text(folder, kept_recipe(folder))
    if tokens is None:
        tokens = text[None, : min(SAMPLE, place.config.max_position_embeddings)]
    _require_memory(place, tokens.numel())
    model = load_model(place.student or place.exported, torch.float32, "cpu")
    expected = log_probabilities(model, tokens)
    asked = prompts_of(text, prompts, PROMPT)
    own = greedy(model, asked, new_tokens)
    del model  # one model in memory at a time
    texts = [TEXT, *tokenizer.batch_decode(tokens)]
    request = {
        "tokens": tokens.tolist(),
        "prompts": asked.tolist(),
        "new_tokens": new_tokens,
        "texts": texts,
        "top": min(TOP, place.config.vocab_size),
        "own_class": place.own_class,
    }
    try:
        answers, kind = _answers(engine, python, place, gguf, request)
    except EngineError as error:
        return [*found, Finding(engine, False, f"it does not run the checkpoint: {error}")]
    # The student's weights were rounded once more when they were exported; a checkpoint alone is its own reference.
    coarser = max(kind, _stored(place.config), key=list(BOUNDS).index) if place.student else kind
    found += _compare(expected, own, answers, BOUNDS[coarser])
    if "tokenized" in answers.said:
        found.append(_tokenizers(tokenizer(texts)["input_ids"], answers.said["tokenized"]))
    title = f"{engine} {answers.said['version']}, weights in {kind}"
    return [
        *found,
        Finding(title, None, f"beside {'the student' if place.student else 'stock transformers'} in float32"),
    ]


def _answers(
    engine: str, python: Path | None, place: Place, gguf: Path | None, request: dict[str, Any]
) -> tuple[Answers, str]:
    """What an engine answers, and how the weights that it read are stored."""
    stored = _stored(place.config)
    if engine != "llama.cpp":
        return ask(engine, python, KEY, do="ask", model=str(place.exported), dtype=stored, **request), stored
    if gguf is not None:
        return ask(engine, python, KEY, do="ask", model=str(gguf), **request), _kind_of(gguf)
    kind = next(kind for kind, name in STORED.items() if name == stored)
    with temporary_folder() as scratch:
        file = scratch / "exported.gguf"
        save_gguf(place.exported, file, kind, say=lambda _: None)
        return ask(engine, python, KEY, do="ask", model=str(file), **request), stored


def _stored(config: PretrainedConfig) -> str:
    """How a checkpoint's weights are stored."""
    return str(config.dtype).removeprefix("torch.")


def _place(folder: Path) -> Place:
    """What is compared with what.

    Raises:
        RecipeError: there is no checkpoint.
    """
    exported = folder / "exported"
    if exported.is_dir():
        student = folder / student_of(folder)
        return Place(exported, student if student.is_dir() else None, read_config(exported, KEY))
    if not (folder / "config.json").is_file():
        raise RecipeError(KEY, f"{folder} has neither an exported checkpoint nor is it one; name an output directory")
    return Place(folder, None, read_config(folder, KEY))


def _shipped_text(tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """Tokens [L] of the text that is shipped and that nothing is trained on."""
    lines = (share("data") / "sample" / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    return torch.tensor(tokenizer("\n\n".join(json.loads(line)["text"] for line in lines[:20]))["input_ids"])


def _artifacts(folder: Path, place: Place) -> list[tuple[str, Path]]:
    """The folders that a manifest describes, by their names in the output directory."""
    if place.exported == folder:
        return []
    return [(path.name, path) for path in (place.exported, place.student) if path is not None]


def _require_memory(place: Place, tokens: int) -> None:
    """Check that a model in float32 fits into memory.

    Raises:
        RecipeError: it does not.
    """
    source = place.student or place.exported
    stored = sum(file.stat().st_size for file in source.glob("model*.safetensors"))
    needed = stored * 4 // getattr(torch, _stored(place.config)).itemsize
    needed += 4 * 3 * tokens * place.config.vocab_size
    if (free := free_memory(torch.device("cpu"))) < needed:
        raise RecipeError(
            KEY,
            f"the comparison takes {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free; run it on a "
            "machine with more, or transmla verify DIR, which reads weights when they are needed",
        )


def _compare(expected: Tensor, own: tuple[Tensor, Tensor, Tensor], answers: Answers, bound: Bound) -> list[Finding]:
    arrays = {name: torch.from_numpy(array) for name, array in answers.arrays.items()}
    if "scores" in arrays:
        far = distance(expected, arrays["scores"])
    else:
        far = distance_of_likeliest(expected, arrays["words"], arrays["values"])
    near = far.kl <= bound.kl and (bound.difference is None or far.difference <= bound.difference)
    limit = "" if bound.difference is None else f" (at most {bound.difference:g})"
    words = f"{far.words:,} words at each of {far.tokens} tokens"
    detail = f"largest difference {far.difference:.2e}{limit}, KL {far.kl:.2e} (at most {bound.kl:g}); {words}"
    same = greedy_distance(*own, arrays["greedy"])
    parted = (
        f", then {same.parted} of {len(arrays['greedy'])} replies part, where the reference prefers its word by "
        f"{same.gap:.2e} (at most {bound.tie:g})"
    )
    return [
        Finding("log-probabilities", near, detail),
        Finding(
            "greedy tokens", same.gap <= bound.tie, f"{same.same} of {same.total} the same{parted * bool(same.parted)}"
        ),
    ]


def _tokenizers(expected: list[list[int]], found: list[list[int]]) -> Finding:
    wrong = [place for place, (own, other) in enumerate(zip(expected, found, strict=True)) if own != other]
    count = sum(map(len, expected))
    detail = f"{len(expected) - len(wrong)} of {len(expected)} texts become the same {count} tokens"
    return Finding("tokens of text", not wrong, detail if not wrong else f"{detail}; first other one: text {wrong[0]}")


def _kind_of(gguf: Path) -> str:
    """How the weights of a GGUF are stored, as `BOUNDS` names it.

    Raises:
        RecipeError: in a way that has no bound, or it is no `deepseek2`.
    """
    fields = GGUFReader(gguf).fields
    if (name := str(fields["general.architecture"].contents())) != "deepseek2":
        raise RecipeError(KEY, f"{gguf} is a {name}, no GGUF of an exported checkpoint; make one with transmla gguf")
    number = fields["general.file_type"].contents() if "general.file_type" in fields else None
    kinds = {int(file_type): STORED.get(kind, kind) for kind, (_, file_type) in KINDS.items()}
    kinds |= {int(LlamaFileType.MOSTLY_BF16): "bfloat16", int(LlamaFileType.MOSTLY_Q4_K_M): "q4_k_m"}
    if number not in kinds:
        raise RecipeError(KEY, f"{gguf} is of another kind than {', '.join(KINDS)}; make one with transmla gguf")
    return kinds[number]
