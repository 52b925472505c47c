"""Batched sampling from vLLM, where that is installed."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from transmla.generate.sampler import Sample, end_tokens, until_the_end
from transmla.recipe.writing import Sampling
from transmla.sources.config import read_config
from transmla.sources.generation import read_generation


class VllmSampler:
    """Samples of a checkpoint that vLLM serves. It has no test here: the project's tests run without a GPU.

    A seed fixes the samples as far as vLLM's kernels repeat themselves; they are not those of `ModelSampler`.
    """

    def __init__(self, folder: Path, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype, max_length: int) -> None:
        from vllm import LLM

        self.llm = LLM(str(folder), dtype=str(dtype).removeprefix("torch."), max_model_len=max_length)
        generation = read_generation(folder, read_config(folder, "model.source"), "model.source")
        self.ends = sorted(end_tokens(generation, tokenizer))

    def __call__(self, prompts: Sequence[list[int]], settings: Sampling, seed: int) -> list[Sample]:
        from vllm import SamplingParams

        asked = [
            SamplingParams(
                temperature=settings.temperature,
                top_p=settings.top_p,
                max_tokens=settings.max_new_tokens,
                stop_token_ids=self.ends,
                seed=(seed + index) % 2**63,
                detokenize=False,
            )
            for index in range(len(prompts))
        ]
        found = self.llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], asked, use_tqdm=False)
        outputs = [reply.outputs[0] for reply in found]
        cut = [until_the_end(list(output.token_ids), set(self.ends)) for output in outputs]
        return [Sample(one.tokens, output.finish_reason == "stop") for one, output in zip(cut, outputs, strict=True)]
