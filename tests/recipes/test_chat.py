"""`transmla chat` in a pseudo-terminal and with other input: what is said, what a key does, how it ends."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.source_folder import edit_json, make_source
from transmla.cli import main

ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from transmla.cli import main; sys.exit(main())", "chat"]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
CTRL_C, CTRL_D = b"\x03", b"\x04"
PATIENCE = 120.0  # seconds


def speaking(folder: Path) -> Path:
    """A model of letters that never ends a reply by itself."""
    make_source(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    others = [number for number in range(260) if not re.fullmatch("[a-z]", tokenizer.decode([number]))]
    settings = {"eos_token_id": None, "pad_token_id": 0, "suppress_tokens": others}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return speaking(tmp_path_factory.mktemp("chat") / "plain")


@pytest.fixture(scope="module")
def templated(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = Path(shutil.copytree(plain, tmp_path_factory.mktemp("chat") / "templated"))
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def environment() -> dict[str, str]:
    return dict(os.environ) | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TERM": "dumb", "HF_HUB_OFFLINE": "1"}


class Terminal:
    """A command in a pseudo-terminal."""

    def __init__(self, *words: str) -> None:
        self.pid, self.descriptor = pty.fork()
        if self.pid == 0:
            os.execve(COMMAND[0], [*COMMAND, *words], environment())
        self.printed = ""
        self.seen = 0

    def wait_for(self, text: str) -> str:
        """What is printed until a text comes."""
        until = time.monotonic() + PATIENCE
        while text not in self.printed[self.seen :]:
            assert time.monotonic() < until and self._read(), f"{text!r} did not come after {self.printed!r}"
        start, self.seen = self.seen, self.printed.index(text, self.seen) + len(text)
        return self.printed[start : self.seen]

    def type(self, keys: bytes) -> None:
        os.write(self.descriptor, keys)

    def code(self) -> int:
        """The exit code, once the command has ended."""
        until = time.monotonic() + PATIENCE
        while time.monotonic() < until and self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        if select.select([self.descriptor], [], [], 1.0)[0]:
            try:
                more = os.read(self.descriptor, 4096)
            except OSError:  # the other end is closed
                return False
            self.printed += more.decode(errors="replace")
            return bool(more)
        return True

    def close(self) -> None:
        try:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        except (ProcessLookupError, ChildProcessError):
            pass
        os.close(self.descriptor)


@pytest.fixture
def open_terminal() -> Iterator[type]:
    opened: list[Terminal] = []

    class Kept(Terminal):
        def __init__(self, *words: str) -> None:
            super().__init__(*words)
            opened.append(self)

    yield Kept
    for terminal in opened:
        terminal.close()


def test_keys_of_a_terminal(tmp_path: Path, open_terminal: type[Terminal]) -> None:
    """Ctrl-C ends a reply of a hundred thousand letters and nothing else, then a line; Ctrl-D ends the program."""
    endless = speaking(tmp_path / "endless")
    edit_json(endless / "config.json", max_position_embeddings=200_000)
    terminal = open_terminal(str(endless), "--max-new-tokens", "100000", "--temperature", "0")
    assert "no chat template, it continues your text; Ctrl-C ends a reply" in terminal.wait_for("\n> ")
    for line in (b"one\n", b"two\n"):
        terminal.type(line)
        terminal.wait_for("\r\n")
        time.sleep(1.0)
        terminal.type(CTRL_C)
        assert len(terminal.wait_for("\n> ")) < 50_000
    time.sleep(1.0)  # the line is being read
    terminal.type(b"half a li" + CTRL_C)
    assert "/exit ends, /reset begins anew" in terminal.wait_for("\n> ")
    terminal.type(CTRL_D)
    assert terminal.code() == 0 and "Traceback" not in terminal.printed


def expected(folder: Path, prompts: list[str], length: int) -> list[str]:
    """Greedy replies by transformers alone, each to the whole text before it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    replies: list[str] = []
    for prompt in prompts:
        tokens = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            found = model.generate(tokens, max_new_tokens=length, do_sample=False)
        replies.append(tokenizer.decode(found[0, tokens.shape[1] :], skip_special_tokens=True))
    return replies


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., tuple[str, str]]:
    """What is printed on stdout and stderr for lines that no terminal sends."""

    def ask(folder: Path, lines: str, *words: str) -> tuple[str, str]:
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        capsys.readouterr()
        assert main(["chat", str(folder), "--device", "cpu", "--dtype", "float32", *words]) == 0
        return capsys.readouterr()

    return ask


def test_with_a_template(templated: Path, said) -> None:
    """Every turn holds the turns before it, until /reset; what is not typed by a person gets no prompt."""
    printed, _ = said(
        templated, "one\ntwo\n/reset\none\n/exit\nnever\n", "--max-new-tokens", "12", "--temperature", "0"
    )
    (first,) = expected(templated, ["<user>one\n<assistant>"], 12)
    (second,) = expected(templated, [f"<user>one\n<assistant>{first}\n<user>two\n<assistant>"], 12)
    assert printed == f"{first}\n{second}\n{first}\n" and first != second


def test_without_a_template(plain: Path, said) -> None:
    printed, _ = said(plain, "one\n\ntwo\n", "--max-new-tokens", "12", "--temperature", "0")
    (first,) = expected(plain, ["one"], 12)
    (second,) = expected(plain, [f"one{first}\ntwo"], 12)
    assert printed == f"{first}\n{second}\n" and first != second


def test_a_conversation_that_no_longer_fits(plain: Path, said) -> None:
    """The last reply is as long as the positions allow; then it says so and goes on."""
    lines = f"{'a' * 500}\nmore\n/reset\nb\n"
    printed, problem = said(plain, lines, "--max-new-tokens", "20", "--temperature", "0")
    assert "517 tokens leave no room in the model's 512 positions; /reset begins anew" in problem
    first, last = expected(plain, ["a" * 500], 12)[0], expected(plain, ["b"], 20)[0]
    assert printed == f"{first}\n{last}\n"


def test_sampling(plain: Path, said) -> None:
    """Above 0 replies differ; without a temperature the files' own settings count, here none."""
    lines = "x\n/reset\nx\n"
    same = said(plain, lines, "--max-new-tokens", "30")[0].split()
    other = said(plain, lines, "--max-new-tokens", "30", "--temperature", "2")[0].split()
    assert same == expected(plain, ["x"], 30) * 2
    assert len(set(other)) == 2 and same[0] not in other


def test_a_template_that_refuses(templated: Path, tmp_path: Path, said) -> None:
    folder = Path(shutil.copytree(templated, tmp_path / "strict"))
    (folder / "chat_template.jinja").write_text("{{ raise_exception('one turn alone') }}")
    printed, problem = said(folder, "one\ntwo\n")
    assert printed == "" and problem.count("the chat template refuses this: one turn alone") == 2


def test_the_result_of_a_run(plain: Path, tmp_path: Path, said) -> None:
    """Of an output directory the export, not the student before it."""
    shutil.copytree(plain, tmp_path / "exported")
    (tmp_path / "recovered").mkdir()
    (tmp_path / "recovered" / "config.json").write_text("{}")
    printed, _ = said(tmp_path, "one\n", "--max-new-tokens", "5", "--temperature", "0")
    assert printed == expected(plain, ["one"], 5)[0] + "\n"


@pytest.mark.parametrize(
    "words, reason",
    [
        (["none"], "none is no directory"),
        (["."], "has no model (config.json)"),
        (["MODEL", "--temperature", "-1"], "-1 is no temperature"),
        (["MODEL", "--temperature", "nan"], "nan is no temperature"),
        (["MODEL", "--max-new-tokens", "0"], "0 is no whole number from 1 on"),
        (["MODEL", "--dtype", "float16"], "invalid choice: 'float16'"),
        (["MODEL", "--device", "cuda"], "device: cuda was asked for, but no CUDA device is visible"),
        ([], "the following arguments are required: DIR"),
        (["BROKEN"], "model.safetensors"),
        (["BARE"], "has no tokenizer"),
    ],
)
def test_refused(plain: Path, tmp_path: Path, monkeypatch, capsys, words: list[str], reason: str) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name, gone in (("BROKEN", "model.safetensors"), ("BARE", "tokenizer.json")):
        shutil.copytree(plain, tmp_path / name)
        (tmp_path / name / gone).unlink()
    assert main(["chat", *(str(plain) if word == "MODEL" else word for word in words)]) == 2
    line = capsys.readouterr().err
    assert reason in line and re.fullmatch(r"error: (chat|device): .*\n", line)
