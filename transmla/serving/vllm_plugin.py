"""The entry point `vllm.general_plugins`: vLLM calls `register` in each of its processes, before it reads a model.

A stock DeepSeek-V3 checkpoint needs none of this. A checkpoint of the student's own class (Gemma, Qwen3, Mixtral, a
sliding window) has an architecture that vLLM does not know; here it learns which class runs it.
"""

from __future__ import annotations

import logging

# Every student's architecture, as config.json names it, and the class that runs it. A table, because vLLM calls
# `register` for every model that it serves, and importing the families takes a second.
CLASSES = {
    "MLALlamaForCausalLM": "Student",
    "MLAQwen2ForCausalLM": "Student",
    "MLAQwen3ForCausalLM": "Student",
    "MLAMistralForCausalLM": "Student",
    "MLAMixtralForCausalLM": "StudentWithExperts",
    "MLAGemma2ForCausalLM": "Student",
    "MLAGemma3ForCausalLM": "Student",
    "MLAMiMoForCausalLM": "Student",
}

MODULE = "transmla.serving.vllm_classes"  # imported by vLLM when a model is one of these

logger = logging.getLogger(__name__)


def register() -> None:
    """Tell vLLM's registry about the students' classes; nothing but a warning where it has no such registry."""
    try:
        from vllm import ModelRegistry

        add = ModelRegistry.register_model
    except (ImportError, AttributeError) as missing:
        logger.warning("transmla: this vLLM has no ModelRegistry.register_model (%s); own classes are unknown", missing)
        return
    for architecture, name in CLASSES.items():
        add(architecture, f"{MODULE}:{name}")
