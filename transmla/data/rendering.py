"""Conversations as text, by a tokenizer's chat template, with nothing left out.

Templates of reasoning models drop the thoughts of an answer: all of them (DeepSeek-R1-Distill), or those of earlier
turns (Qwen3). That is right for a prompt, and wrong for text to learn from. Such a template looks for a tag, as
`'</think>' in content`. In the turns that would lose something the tags are put to the template as letters that it does
not know, and are put back afterwards. What is still missing then is refused: no turn is ever lost without a word.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import jinja2
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from transmla.data.conversations import Turn

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a turn that some templates know

# Strings that a template's code compares contents with: 'x' in content, content.split('x'), content.startswith('x').
_SOUGHT = re.compile(r"""(["'])(?P<one>[^"'\n{}]+)\1\s+in\s|\.\w+\(\s*(["'])(?P<other>[^"'\n{}]+)\3""")

_CLOSING = re.compile(r"</[^>]*(think|thought|reason)[^>]*>")

_UNKNOWN = 0xF0000  # first of the private letters that take a tag's place, as many as the tag has

_ANYWHERE = ("system", "developer")  # roles whose text a template may put before, or after, all others


@dataclass(frozen=True)
class Rendered:
    """A conversation as text. kept: the template alone would have left a part of it out. spans: first and last letter
    of what the assistant says, where marks were asked for."""

    text: str
    kept: bool
    spans: list[tuple[int, int]]


class Template:
    """A tokenizer's chat template, used for text to learn from.

    Args:
        tokenizer: with a chat template.
        marks: a template that marks what the assistant says, used instead; None: the tokenizer's own.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, marks: str | None = None) -> None:
        self.tokenizer, self.marks = tokenizer, marks

    def render(self, turns: list[Turn], tools: list[dict[str, Any]]) -> Rendered:
        """A whole conversation.

        Raises:
            ValueError: the template refuses it, or leaves a part of it out.
        """
        return self._whole(turns, tools)[0]

    def put(self, prompt: list[Turn], tools: list[dict[str, Any]]) -> str:
        """A prompt as it is put to a model that shall answer it, which does not see earlier thoughts if its template
        drops them.

        Raises:
            ValueError: the template refuses it.
        """
        return self._apply(prompt, tools, prompt=True)[0]

    def render_pair(
        self, prompt: list[Turn], completion: list[Turn], tools: list[dict[str, Any]]
    ) -> tuple[str, Rendered]:
        """A prompt as it is put to a model, and with its completion.

        Raises:
            ValueError: as `render`.
        """
        whole, put = self._whole([*prompt, *completion], tools)
        if not prompt:
            return "", whole
        text, _ = self._apply(put[: len(prompt)], tools, prompt=True)
        return self._restored(text), whole

    def _whole(self, turns: list[Turn], tools: list[dict[str, Any]]) -> tuple[Rendered, list[Turn]]:
        """The conversation, and its turns as they were put to the template."""
        text, spans = self._apply(turns, tools)
        missing = missing_parts(turns, text)
        put = turns
        if missing:
            put = [self._hidden(turn) if index in missing else turn for index, turn in enumerate(turns)]
            text, spans = self._apply(put, tools)
            text = self._restored(text)
            lost = missing_parts(turns, text) or self._doubled(missing, put, text)
            if lost:
                index = min(lost)
                mend = "use text or another template"
                if lost[index] in THOUGHTS:
                    mend = "write the thoughts into the content, as <think>...</think>"
                raise ValueError(
                    f"the chat template leaves out the {lost[index]} of turn {index + 1} ({turns[index]['role']}); "
                    f"{mend}, or leave such rows out"
                )
        for tool in tools:
            name = tool.get("function", tool).get("name") if isinstance(tool.get("function", tool), dict) else None
            if isinstance(name, str) and name not in text:
                raise ValueError(
                    f"the chat template leaves out the tools ({name}); leave them out of the data (tools: null in its "
                    f"definition), or leave such rows out"
                )
        return Rendered(text, bool(missing), spans), put

    def _apply(
        self, turns: list[Turn], tools: list[dict[str, Any]], *, prompt: bool = False
    ) -> tuple[str, list[tuple[int, int]]]:
        words: dict[str, Any] = {"tools": tools} if tools else {}
        if prompt:
            words["add_generation_prompt"] = True
        try:
            if self.marks is None:
                return str(self.tokenizer.apply_chat_template(turns, tokenize=False, **words)), []
            found: Any = render_jinja_template(
                conversations=[turns],
                chat_template=self.marks,
                return_assistant_tokens_mask=not prompt,
                **(dict(self.tokenizer.special_tokens_map) | words),
            )
            texts, spans = found
            return texts[0], spans[0] if spans else []
        # A template is a program of its own: it raises what it likes, and what Python raises in it.
        except (jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            if self.tokenizer.chat_template is None:
                raise ValueError("it is a conversation, and the tokenizer has no chat template; use text") from None
            reason = " ".join(str(error).split())[:120] or type(error).__name__
            raise ValueError(f"the chat template refuses it: {reason}; mend the row, or use text") from None

    @cached_property
    def _sought(self) -> list[str]:
        """The strings that the template looks for, the longest first."""
        template = self.marks or self.tokenizer.chat_template or ""
        texts = list(template.values()) if isinstance(template, dict) else [template]
        found = {match["one"] or match["other"] for text in texts for match in _SOUGHT.finditer(text)}
        found |= {text.replace("\\n", "\n") for text in found}
        return sorted((text for text in found if len(text) > 1), key=lambda text: (-len(text), text))

    def _hidden(self, turn: Turn) -> Turn:
        """A turn whose tags the template does not know, with its thoughts in its content."""
        content, rest = turn.get("content"), dict(turn)
        closing = next((tag for tag in self._sought if _CLOSING.fullmatch(tag)), None)
        key = next((key for key in THOUGHTS if isinstance(turn.get(key), str)), None)
        if key is not None and closing is not None and isinstance(content, str | None):
            content = f"{closing.replace('/', '', 1)}\n{rest.pop(key)}\n{closing}\n\n{content or ''}"
        if isinstance(content, str):
            for number, tag in enumerate(self._sought):
                content = content.replace(tag, chr(_UNKNOWN + number) * len(tag))
        return rest | {"content": content}

    def _doubled(self, hidden: dict[int, str], put: list[Turn], text: str) -> dict[int, str]:
        """Turns before which the template writes a thought of its own because it does not see theirs."""
        closing = tuple(tag for tag in self._sought if _CLOSING.fullmatch(tag))
        squeezed = _squeezed(text)
        found = {}
        for index, name in hidden.items():
            content = put[index].get("content")
            if isinstance(content, str) and squeezed.partition(_squeezed(self._restored(content)))[0].endswith(closing):
                found[index] = name
        return found

    def _restored(self, text: str) -> str:
        for number, tag in enumerate(self._sought):
            text = text.replace(chr(_UNKNOWN + number) * len(tag), tag)
        return text


def missing_parts(turns: list[Turn], text: str) -> dict[int, str]:
    """What of a conversation is not in its rendered text: by turn, in words. White space does not count.

    The turns must stand in their order; a system message may stand anywhere.
    """
    if not _missing(turns, text, str.strip):
        return {}
    return _missing(turns, _squeezed(text), _squeezed)


def _missing(turns: list[Turn], text: str, form: Any) -> dict[int, str]:
    found: dict[int, str] = {}
    place = 0
    for index, turn in enumerate(turns):
        start = end = 0 if turn["role"] in _ANYWHERE else place
        for name, part in _parts(turn):
            way = form(part)
            at = text.find(way, start)
            if at < 0:  # a tool's result or argument may stand there as JSON writes it
                way = form(json.dumps(part, ensure_ascii=False)[1:-1])
                at = text.find(way, start)
            if at < 0:
                found.setdefault(index, name)
            else:
                end = max(end, at + len(way))
        place = max(place, end) if turn["role"] not in _ANYWHERE else place
    return found


def _squeezed(text: str) -> str:
    return "".join(text.split())


def _parts(turn: Turn) -> Iterator[tuple[str, str]]:
    """The texts of a turn that must be found again, with what they are."""
    for key in THOUGHTS:
        if isinstance(turn.get(key), str):
            yield key, turn[key]
    content = turn.get("content")
    if isinstance(content, str):
        yield "content", content
    elif isinstance(content, list):
        for part in content:
            text = part.get("text") if isinstance(part, dict) else part
            yield "content in parts", text if isinstance(text, str) else json.dumps(part, ensure_ascii=False)
    calls = turn.get("tool_calls")
    for call in calls if isinstance(calls, list) else []:
        function = call.get("function", call) if isinstance(call, dict) else {}
        name = function.get("name") if isinstance(function, dict) else None
        if not isinstance(name, str):
            raise ValueError("a tool call has no function with a name; mend the row")
        yield f"tool call {name}", name
        for leaf in _leaves(function.get("arguments")):
            yield f"argument of the tool call {name}", leaf


def _leaves(value: Any) -> Iterator[str]:
    """The keys and texts in a tool call's arguments."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
