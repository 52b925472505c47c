"""How to serve an export, engine by engine, as lines of its card."""

from __future__ import annotations

from typing import Any

REPOSITORY = "ORG/NAME"  # stands for the folder, or for its id on the hub: an upload puts that in its place
ENGINES = {"transformers": "transformers", "vllm": "vLLM", "sglang": "SGLang", "llama.cpp": "llama.cpp"}

# bfloat16 is named because some engines choose float16 for weights in float32, which the linear latent norm forbids.
COMMANDS = {
    "vllm": [f"vllm serve {REPOSITORY} --dtype bfloat16"],
    "sglang": [f"python -m sglang.launch_server --model-path {REPOSITORY} --dtype bfloat16"],
    "llama.cpp": [
        f"hf download {REPOSITORY} --local-dir model",
        "transmla gguf model model.gguf --type bf16",
        "llama-server -m model.gguf",
    ],
}
AROUND = [f"vllm serve {REPOSITORY} --model-impl transformers --dtype bfloat16"]  # transformers' class within vLLM
UNCHECKED = "not checked with this checkpoint; compare its answers with those of transformers before you rely on it"


def serving_lines(metadata: dict[str, Any], *, chat: bool) -> list[str]:
    """The section of the card.

    Args:
        metadata: of the export; `engines`, where it is there, as transmla.export.engines describes them.
        chat: whether the tokenizer has a chat template.
    """
    stock = metadata["format"] == "deepseek_v3"
    known = metadata.get("engines")
    lines = [
        "## How to serve it",
        "",
        f"`{REPOSITORY}` stands for this repository, or for the folder of its files.",
        "",
    ]
    lines += ["### transformers", "", *_fenced("python", _snippet(stock, chat))]
    if not stock:
        lines += [
            "The model has a class of its own, which `import transmla` registers; no code of this repository runs.",
            "",
        ]
    for engine, title in ENGINES.items():
        if engine == "transformers":
            continue
        lines += [f"### {title}", ""]
        lines += _unknown(engine, stock) if known is None else _known(engine, known)
    return lines


def _known(engine: str, known: dict[str, Any]) -> list[str]:
    """What transmla.export.engines found of an engine, and where that does not read the checkpoint, of another way to
    run it."""
    entry = known[engine]
    texts = [*entry["why"], *entry["needs"], f"As known from: {entry['checked']}"]
    said = [f"- {_sentence(text)}" for text in texts]
    if entry["reads"]:
        return [*_fenced("bash", COMMANDS[engine]), *said, ""]
    around = known.get(f"{engine}-transformers", {})
    if around.get("reads"):
        return ["Not by its own class:", "", *said, "", "Through transformers' class:", "", *_fenced("bash", AROUND)]
    return ["Do not serve this checkpoint with it.", "", *said, ""]


def _unknown(engine: str, stock: bool) -> list[str]:
    """What holds of an engine that nobody has asked about this checkpoint."""
    if not stock:
        return ["It does not know the model's class.", ""]
    if engine == "vllm":
        return [f"Through transformers' class; vLLM's own was {UNCHECKED}.", "", *_fenced("bash", AROUND)]
    return [f"{_sentence(UNCHECKED)}", ""]


def _snippet(stock: bool, chat: bool) -> list[str]:
    messages = '[{"role": "user", "content": "What is a lighthouse?"}]'
    asked = (
        f"tokenizer.apply_chat_template(\n    {messages},\n    add_generation_prompt=True, return_dict=True, "
        'return_tensors="pt",\n)'
        if chat
        else 'tokenizer("A lighthouse is", return_tensors="pt")'
    )
    return [
        *([] if stock else ["import transmla  # registers the model's class"]),
        "from transformers import AutoModelForCausalLM, AutoTokenizer",
        "",
        f'model = AutoModelForCausalLM.from_pretrained("{REPOSITORY}", dtype="bfloat16")',
        f'tokenizer = AutoTokenizer.from_pretrained("{REPOSITORY}")',
        f"inputs = {asked}",
        "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=100)[0], skip_special_tokens=True))",
    ]


def _fenced(language: str, lines: list[str]) -> list[str]:
    return [f"```{language}", *lines, "```", ""]


def _sentence(text: str) -> str:
    return text[:1].upper() + text[1:].rstrip(".") + "."
