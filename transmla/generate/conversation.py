"""A conversation in a terminal with a model in memory: lines in, replies word by word out."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, TextStreamer

RESET, EXIT = "/reset", "/exit"
LEAVE = "Ctrl-D or /exit ends, /reset begins anew"


@dataclass
class Conversation:
    """A model, and what was said.

    temperature: 0 takes the likeliest token; None leaves sampling to the model's generation configuration.
    messages: with a chat template. text: without one, what the model continues.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    max_new_tokens: int
    temperature: float | None = None
    messages: list[dict[str, str]] = field(default_factory=list)
    text: str = ""

    @property
    def templated(self) -> bool:
        """Whether the tokenizer has a chat template."""
        return self.tokenizer.chat_template is not None

    @property
    def positions(self) -> int | None:
        """Tokens that the model was made for."""
        return getattr(self.model.config, "max_position_embeddings", None)

    def reset(self) -> None:
        """Forget what was said."""
        self.messages, self.text = [], ""

    def reply(self, line: str) -> str | None:
        """Print the model's reply to a line while it is written, and remember both; Ctrl-C ends it early.

        Returns:
            None, or in a sentence why there is none; then the line is forgotten.
        """
        messages = [*self.messages, {"role": "user", "content": line}]
        text = f"{self.text}\n{line}" if self.text else line
        try:
            tokens = self._tokens(messages) if self.templated else self.tokenizer(text, return_tensors="pt").input_ids
        except TemplateError as error:
            return f"the chat template refuses this: {error}; {RESET} begins anew"
        length, room = tokens.shape[1], self.max_new_tokens
        if not length:
            return "there is nothing to continue; say something"
        if self.positions is not None:
            room = min(room, self.positions - length)
        if room < 1:
            return f"{length:,} tokens leave no room in the model's {self.positions:,} positions; {RESET} begins anew"
        with interruptible() as stopped:
            try:
                found = self._generate(tokens.to(self.model.device), room, stopped)
            except KeyboardInterrupt:
                return "stopped before the first word"
        said = self.tokenizer.decode(found[0, length:], skip_special_tokens=True)
        self.messages = [*messages, {"role": "assistant", "content": str(said)}]
        self.text = text + str(said)
        return None

    def _tokens(self, messages: list[dict[str, str]]) -> Tensor:
        """The conversation by the chat template, [1, T]."""
        options: dict[str, Any] = {"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"}
        rendered: Any = self.tokenizer.apply_chat_template(messages, **options)
        return rendered["input_ids"]

    @torch.no_grad()
    def _generate(self, tokens: Tensor, room: int, stopped: Callable[[], bool]) -> Tensor:
        """Prompt and reply, [1, T + reply], printed while it is written."""
        options: dict[str, Any] = {}
        if self.temperature == 0:
            options = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        elif self.temperature is not None:
            options = {"do_sample": True, "temperature": self.temperature}
        if self.model.generation_config.pad_token_id is None:  # said at every reply otherwise; a single row has none
            options["pad_token_id"] = self.tokenizer.eos_token_id or 0
        generate: Any = self.model.generate
        return generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=room,
            streamer=TextStreamer(self.tokenizer, skip_prompt=True, skip_special_tokens=True),
            stopping_criteria=[_Stopped(stopped)],
            **options,
        )


class _Stopped(StoppingCriteria):
    """Ends a reply after the token during which somebody asked for its end."""

    def __init__(self, stopped: Callable[[], bool]) -> None:
        self.stopped = stopped

    def __call__(self, input_ids: Tensor, scores: Tensor, **_: Any) -> Any:
        return torch.full((input_ids.shape[0],), self.stopped(), dtype=torch.bool, device=input_ids.device)


@contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C is remembered, and what is yielded says so; the second raises KeyboardInterrupt."""
    pressed: list[int] = []

    def on_signal(number: int, frame: object) -> None:
        if pressed:
            raise KeyboardInterrupt
        pressed.append(number)

    before = signal.signal(signal.SIGINT, on_signal)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, before)


def talk(conversation: Conversation) -> None:
    """Read lines and answer them until the input or the user ends it.

    A terminal gets a prompt, and history by its arrow keys; other input is answered line by line.
    """
    terminal = sys.stdin.isatty()
    if terminal:
        with suppress(ImportError):
            import readline  # noqa: F401  # input() uses it where it is loaded
        kind = "chat template" if conversation.templated else "no chat template, it continues your text"
        print(f"{kind}; Ctrl-C ends a reply, {LEAVE}", flush=True)
    while True:
        try:
            line = input("> " if terminal else "")
        except EOFError:
            if terminal:
                print()
            return
        except KeyboardInterrupt:
            print(f"\n{LEAVE}", flush=True)
            continue
        if line.strip() == EXIT:
            return
        if line.strip() == RESET:
            conversation.reset()
        elif line.strip():
            problem = conversation.reply(line)
            if problem is not None:
                print(problem, file=sys.stderr, flush=True)
