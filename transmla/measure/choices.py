"""Log-likelihoods of continuations, as lm-eval-harness defines them, in few and cheap forward passes.

Every class of model in a run works, because only its trunk and its head's weight are used. Pairs whose inputs are the
same tokens share a row: all choices of one token (yes and no) cost one forward pass of their context. The head is
applied to the continuations' positions alone, with float32 products, so that bfloat16 models are not compared by
rounded logits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm

from transmla.measure.perplexity import CHUNK, full_float32
from transmla.modeling.config_facts import final_softcap
from transmla.modeling.kernels.eager import cap

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class Row:
    """One input and what is read from it: pairs by number, with the tokens that its last positions must predict."""

    tokens: tuple[int, ...]
    targets: list[tuple[int, list[int]]] = field(default_factory=list)


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> list[tuple[list[int], list[int]]]:
    """Tokens of contexts and of what follows them: each whole is tokenised and split after its context's tokens.

    As in the harness, spaces at a context's end go to the continuation, and an empty context is the begin token, or the
    end token where there is none. Where the split would leave the continuation nothing, because its letters merge into
    the context's last token, the two are tokenised apart.
    """
    stripped = [context.rstrip() for context, _ in pairs]
    after = [context[len(bare) :] + continuation for bare, (context, continuation) in zip(stripped, pairs, strict=True)]
    # Many texts at a time: a fast tokenizer uses all cores.
    unlike = list(dict.fromkeys(bare for bare in stripped if bare))
    contexts = dict(zip(unlike, _ids(tokenizer, unlike), strict=True))
    wholes = _ids(tokenizer, [bare + rest for bare, rest in zip(stripped, after, strict=True)])
    found = []
    for bare, rest, whole in zip(stripped, after, wholes, strict=True):
        before = contexts.get(bare, [])
        split = whole[len(before) :]
        if not bare or not split:
            alone = tokenizer(rest, add_special_tokens=False, verbose=False)["input_ids"]
            if not bare:
                prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
                before, alone = (alone[:1], alone[1:]) if alone[0] == prefix and len(alone) > 1 else ([prefix], alone)
            split = alone
        found.append((before, split))
    return found


def _ids(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    return tokenizer(texts, verbose=False)["input_ids"] if texts else []


def rows_of(pairs: Sequence[tuple[list[int], list[int]]], limit: int) -> list[Row]:
    """Inputs of at most `limit` tokens, cut on the left, each once; the longest first."""
    rows: dict[tuple[int, ...], Row] = {}
    for index, (before, after) in enumerate(pairs):
        tokens = (before + after)[-(limit + 1) :]
        inputs = tuple(tokens[:-1])
        rows.setdefault(inputs, Row(inputs)).targets.append((index, after[-limit:]))
    return sorted(rows.values(), key=lambda row: -len(row.tokens))


def batches(rows: list[Row], budget: int) -> Iterator[list[Row]]:
    """Groups of rows, longest first, that padded to their longest have at most `budget` tokens, or are one row."""
    start = 0
    while start < len(rows):
        count = max(1, budget // len(rows[start].tokens))
        yield rows[start : start + count]
        start += count


@torch.no_grad()
def loglikelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    *,
    budget: int,
    label: str,
) -> list[tuple[float, bool]]:
    """For every (context, continuation): log p(continuation | context) in nats, and whether it is the greedy one.

    Args:
        budget: tokens of a batch, padding included.
        label: of the progress bar.
    """
    rows = rows_of(encode_pairs(tokenizer, pairs), model.config.max_position_embeddings)
    head = model.get_output_embeddings().weight.detach().float()
    softcap = final_softcap(model.config)
    sums = torch.zeros(len(pairs), dtype=torch.float64, device=head.device)
    misses = torch.zeros_like(sums)
    with tqdm(total=len(rows), desc=f"evaluate {label}", unit="row") as bar, full_float32():
        for batch in batches(rows, budget):
            hidden, target, pair = _read(model, batch)
            for part in torch.arange(len(target)).split(CHUNK):
                log_p = F.log_softmax(cap(hidden[part].to(head.device).float() @ head.T, softcap), dim=-1)
                wanted, owner = target[part].to(head.device), pair[part].to(head.device)
                sums.index_add_(0, owner, log_p.gather(1, wanted[:, None]).squeeze(1).double())
                misses.index_add_(0, owner, (log_p.argmax(-1) != wanted).double())
            bar.update(len(batch))
    return list(zip(sums.tolist(), (misses == 0).tolist(), strict=True))


def _read(model: PreTrainedModel, batch: list[Row]) -> tuple[Tensor, Tensor, Tensor]:
    """One forward pass: hidden states [P, D] of the positions that predict, their targets [P] and pairs [P].

    Rows are padded on the right, where a causal model's earlier positions cannot see, so that no mask is needed.
    """
    tokens = torch.zeros(len(batch), len(batch[0].tokens), dtype=torch.long)
    where: list[int] = []
    target: list[int] = []
    pair: list[int] = []
    for number, row in enumerate(batch):
        tokens[number, : len(row.tokens)] = torch.tensor(row.tokens)
        for index, after in row.targets:
            end = number * tokens.shape[1] + len(row.tokens)
            where += range(end - len(after), end)
            target += after
            pair += [index] * len(after)
    hidden = model.model(input_ids=tokens.to(model.device), use_cache=False).last_hidden_state.flatten(0, 1)
    return hidden[torch.tensor(where, device=hidden.device)], torch.tensor(target), torch.tensor(pair)
