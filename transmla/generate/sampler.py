"""Batched sampling from any transformers causal model, or from vLLM where that is installed.

transformers' own `generate` is not used: it takes temperature, top-k, top-p and penalties that a recipe does not name
from the checkpoint's generation_config (Qwen's has top-k 20 and a repetition penalty), so that the text would not be of
the model's own distribution; it carries finished rows along until the last one ends; and it draws from the global
generator. Here rows that are done leave, from a cache that grows, or on a GPU between two CUDA graphs
(transmla.generate.decoding).
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from transformers import DynamicCache, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from transmla.generate.decoding import Decoder, has_fixed_size
from transmla.generate.prefill import next_logits, packs, read_packed, read_padded
from transmla.modeling.determinism import is_deterministic
from transmla.recipe.writing import Sampling

LOOK = 8  # steps between two looks at which rows are done: looking waits for the device. Part of what a seed means


@dataclass(frozen=True)
class Sample:
    """What a model wrote after a prompt: token ids without the end token. finished: it ended by itself."""

    tokens: list[int]
    finished: bool


class Sampler(Protocol):
    """Continues one batch of prompts; the same prompts, settings and seed give the same samples, in the same order."""

    def __call__(self, prompts: Sequence[list[int]], settings: Sampling, seed: int) -> list[Sample]: ...


def end_tokens(generation: GenerationConfig, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The tokens that end a text: the checkpoint's and the tokenizer's."""
    listed = generation.eos_token_id
    ends = set() if listed is None else {listed} if isinstance(listed, int) else set(listed)
    return ends | ({tokenizer.eos_token_id} if tokenizer.eos_token_id is not None else set())


def batches(lengths: Sequence[int], batch_size: int) -> list[list[int]]:
    """Indices of prompts by batch: like lengths together, the longest first, so that what does not fit fails at
    once."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def batch_seed(seed: int, name: str, batch: int) -> int:
    """The seed of a batch. Hashed, or batch 1 of seed 0 would repeat batch 0 of seed 1."""
    digest = hashlib.sha256(f"{seed} {name} {batch}".encode()).digest()
    return int.from_bytes(digest[:7], "big")


def choose(logits: Tensor, settings: Sampling, generator: torch.Generator) -> Tensor:
    """Draw one token a row. logits: [B, V] -> [B]. top_p: the fewest likeliest tokens that reach it together.

    Draws are exponential races, as torch.multinomial's are, which besides looks at the weights and so waits for the
    device: of times E / p with E exponential, the first is token i with probability p_i.
    """
    if settings.temperature == 0:
        return logits.argmax(-1)
    if settings.top_p == 1:
        race = _compiled_race if logits.is_cuda else _race
        times = torch.empty(logits.shape, device=logits.device).exponential_(generator=generator)
        return race(1.0 / settings.temperature)(logits, times)
    probabilities = torch.softmax(logits.float() / settings.temperature, dim=-1)
    ordered, tokens = probabilities.sort(dim=-1, descending=True)
    ordered.masked_fill_(_running_sum(ordered) - ordered >= settings.top_p, 0.0)
    times = torch.empty_like(ordered).exponential_(generator=generator)
    return tokens.gather(1, ordered.div_(times).argmax(-1, keepdim=True))[:, 0]


def _running_sum(probabilities: Tensor) -> Tensor:
    """Along the last dimension. Where sums must be reproducible, of integers: a GPU adds in any order."""
    if not is_deterministic():
        return probabilities.cumsum(-1)
    return ((probabilities.double() * 2**40).long().cumsum(-1).double() / 2**40).to(probabilities.dtype)


def _race(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Whose time over its weight exp(factor · logit) is least, by logarithms: from logits and times [B, V] to tokens
    [B]."""
    return lambda logits, times: (logits.float() * factor - times.log()).argmax(-1)


@functools.cache
def _compiled_race(factor: float) -> Callable[[Tensor, Tensor], Tensor]:
    """One pass over the logits of a large vocabulary, where a softmax and a quotient are seven."""
    return torch.compile(_race(factor), dynamic=True)


class ModelSampler:
    """Samples of a transformers causal model, teacher or student.

    fixed: decode on buffers of fixed size where the model allows it (transmla.generate.decoding); pays on a GPU,
        where they are replayed as graphs.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *, fixed: bool | None = None
    ) -> None:
        self.model = model
        self.fixed = model.device.type == "cuda" if fixed is None else fixed
        self.ends = torch.tensor(sorted(end_tokens(model.generation_config, tokenizer)), device=model.device)
        self.generator = torch.Generator(model.device)
        self.decoder: Decoder | None = None
        self.alike: tuple[float, float] | None = None  # temperature and top_p of the decoder

    @torch.no_grad()
    def __call__(self, prompts: Sequence[list[int]], settings: Sampling, seed: int) -> list[Sample]:
        """Continue one batch. Prompts are padded on the left and keep their own positions: padding changes nothing."""
        device = self.model.device
        generator = self.generator.manual_seed(seed)
        longest = max(len(prompt) for prompt in prompts)
        padded = any(len(prompt) != longest for prompt in prompts)
        pad = int(self.ends[0]) if len(self.ends) else 0
        tokens = torch.tensor([[pad] * (longest - len(prompt)) + prompt for prompt in prompts], device=device)
        lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
        places = torch.arange(longest, device=device)[None] - (longest - lengths)[:, None]
        mask, positions = (places >= 0).long(), places.clamp(min=0)
        cache = DynamicCache(config=self.model.config)
        if padded and packs(self.model, longest, cache):
            read = read_packed(self.model, prompts, cache)
        else:
            read = read_padded(self.model, tokens, mask if padded else None, positions, cache)
        first = choose(read, settings, generator)
        if self.fixed and has_fixed_size(self.model, cache):
            try:
                rest = self._decoder(settings).run(
                    cache, mask, first, positions[:, -1] + 1, settings.max_new_tokens - 1
                )
            except BaseException:  # what was interrupted, perhaps in a capture, must not serve another batch
                self.decoder, self.generator = None, torch.Generator(device)
                raise
            written = torch.cat([first[:, None], rest], dim=1)
        else:
            written = self._grown(first, mask, positions, cache, settings, generator, padded=padded)
        ends = set(self.ends.tolist())
        return [until_the_end(row, ends) for row in written.tolist()]

    def _decoder(self, settings: Sampling) -> Decoder:
        """The decoder of the batch before, where that was drawn alike: its graph draws by the settings that it was
        recorded with."""
        alike = (settings.temperature, settings.top_p)
        if self.decoder is None or self.alike != alike:
            self.decoder, self.alike = None, alike  # its buffers go before others are made
            pick = functools.partial(choose, settings=settings, generator=self.generator)
            self.decoder = Decoder(self.model, pick, self.ends, self.generator)
        return self.decoder

    def _grown(self, chosen, mask, positions, cache, settings, generator, *, padded: bool) -> Tensor:
        """[B, max_new_tokens] tokens, -1 after a row's last step, with a cache that grows."""
        written = torch.full((len(chosen), settings.max_new_tokens), -1, device=chosen.device)
        written[:, 0] = chosen
        done = torch.isin(chosen, self.ends)
        rows = torch.arange(len(chosen), device=chosen.device)  # of `written`, that are still in the batch
        tokens, positions = chosen[:, None], positions[:, -1:]
        for step in range(1, settings.max_new_tokens):
            if step % LOOK == 0:
                left = (~done[rows]).nonzero()[:, 0]
                if not len(left):
                    break
                if len(left) < len(rows):
                    rows, tokens, positions, mask = rows[left], tokens[left], positions[left], mask[left]
                    cache.batch_select_indices(left)
            positions = positions + 1
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            chosen = choose(
                next_logits(self.model, tokens, mask if padded else None, positions, cache), settings, generator
            )
            written[rows, step] = chosen
            done[rows] |= torch.isin(chosen, self.ends)
            tokens = chosen[:, None]
        return written


def until_the_end(row: list[int], ends: set[int]) -> Sample:
    """What stands before the first end token; a row is filled with -1 after its last step."""
    for place, token in enumerate(row):
        if token in ends:
            return Sample(row[:place], finished=True)
    return Sample([token for token in row if token >= 0], finished=False)
