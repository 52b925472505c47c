"""The sampler against a plain loop without batch, padding or cache; a drawing that was interrupted."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate import PartialState
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from tests.conftest import VOCAB, settings, tiny_model
from transmla.convert.conversion import convert_model
from transmla.generate import decoding, prefill
from transmla.generate.decoding import has_fixed_size
from transmla.generate.prompts import TextPrompts, decoded, piece
from transmla.generate.sampler import ModelSampler, Sample, batch_seed, batches, choose
from transmla.generate.text_rows import TextRows
from transmla.recipe.writing import Sampling, Text
from transmla.run.sampled_batches import Place, SampledBatches, all_of, enough, sample_missing, until
from transmla.run.written_rows import WrittenRows

GREEDY = Sampling(max_new_tokens=24, temperature=0, batch_size=4)


class Ends:
    """All that a sampler asks of a tokenizer."""

    eos_token_id = 0


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in (3, 11, 1, 7, 11)]


def plain(model, prompt: list[int], steps: int, ends: set[int]) -> Sample:
    tokens = list(prompt)
    with torch.no_grad():
        for _ in range(steps):
            chosen = int(model(torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
            if chosen in ends:
                return Sample(tokens[len(prompt) :], True)
            tokens.append(chosen)
    return Sample(tokens[len(prompt) :], False)


def model_that_ends(family: str, **fields):
    """A model whose greedy texts end at different places: an end token is one that two of them reach, not all."""
    model = tiny_model(family, initializer_range=0.3, **fields)
    texts = [plain(model, prompt, 24, set()).tokens for prompt in prompts()]
    reached = {token: sum(token in text for text in texts) for text in texts for token in text}
    end = max((token for token, count in reached.items() if count < len(texts)), key=lambda token: reached[token])
    model.generation_config.eos_token_id = [end]
    # What a checkpoint may suggest to `generate` must not change what is drawn.
    model.generation_config.repetition_penalty, model.generation_config.top_k = 1.3, 2
    return model, end


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gemma2", "gemma3_text"])
def test_greedy_equals_a_plain_loop(family: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SEGMENT", 5)  # several segments, between which rows leave
    fields = {"sliding_window": 8} if family.startswith("gemma") else {}
    model, end = model_that_ends(family, **fields)
    kernel = model.config._attn_implementation
    wanted = [plain(model, prompt, GREEDY.max_new_tokens, {0, end}) for prompt in prompts()]
    assert ModelSampler(model, Ends(), fixed=fixed)(prompts(), GREEDY, 0) == wanted
    assert model.config._attn_implementation == kernel
    assert {sample.finished for sample in wanted} == {True, False}
    assert len({len(sample.tokens) for sample in wanted}) > 1


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
@pytest.mark.parametrize("fixed", [True, False])
def test_prompts_are_read_a_few_rows_at_a_time(family: str, fixed: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not where a layer keeps a window alone."""
    model, end = model_that_ends(family, **({"sliding_window": 8} if family.startswith("gemma") else {}))
    wanted = [plain(model, prompt, GREEDY.max_new_tokens, {0, end}) for prompt in prompts()]
    monkeypatch.setattr(prefill, "READ", 2 * max(len(prompt) for prompt in prompts()))
    sizes, logits = [], prefill.next_logits

    def counted(model, tokens, *rest):
        sizes.append(tokens.shape)
        return logits(model, tokens, *rest)

    monkeypatch.setattr(prefill, "next_logits", counted)
    assert ModelSampler(model, Ends(), fixed=fixed)(prompts(), GREEDY, 0) == wanted
    assert len(prompts()) > 2 and (sizes[0][0] == 2) is (family == "llama")


@pytest.mark.parametrize("student", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "mixtral"])
@pytest.mark.parametrize("read", [13, 1000])
def test_prompts_are_read_as_packed_documents(
    read: int, family: str, student: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The logits and the padded cache are those of padded prompts; no mask is made."""
    model = tiny_model(family)
    if student:
        model = convert_model(
            model, settings(qk_rope_head_dim=8, kv_lora_rank=24, freqfold=2), torch.randint(VOCAB, (4, 16))
        ).student.eval()
    longest = max(map(len, prompts()))
    lengths = torch.tensor([len(prompt) for prompt in prompts()])
    places = torch.arange(longest)[None] - (longest - lengths)[:, None]
    tokens = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in prompts()])
    wanted, cache = DynamicCache(config=model.config), DynamicCache(config=model.config)
    monkeypatch.setattr(prefill, "READ", read)
    with torch.no_grad():
        expected = prefill.read_padded(model, tokens, (places >= 0).long(), places.clamp(min=0), wanted)
        monkeypatch.setattr(prefill, "next_logits", None)
        found = prefill.read_packed(model, prompts(), cache)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert model.config._attn_implementation == "sdpa"
    for one, other in zip(cache.layers, wanted.layers, strict=True):
        for states, padded in ((one.keys, other.keys), (one.values, other.values)):
            there = (places >= 0)[:, None, :, None]
            torch.testing.assert_close(states, padded * there, rtol=1e-4, atol=1e-5)


def test_padding_keeps_positions() -> None:
    """Rotary models see distances alone; one with learned positions tells whether a prompt begins at its own zero."""
    torch.manual_seed(2)
    config = GPT2Config(vocab_size=VOCAB, n_positions=64, n_embd=32, n_layer=2, n_head=2, initializer_range=0.4)
    model = GPT2LMHeadModel(config).eval()
    model.generation_config.eos_token_id = 0
    wanted = [plain(model, prompt, GREEDY.max_new_tokens, {0}) for prompt in prompts()]
    assert ModelSampler(model, Ends())(prompts(), GREEDY, 0) == wanted


def test_rows_that_are_done_leave_between_segments(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "SEGMENT", 5)
    model, end = model_that_ends("llama")
    texts = [plain(model, prompt, GREEDY.max_new_tokens, {0, end}).tokens for prompt in prompts()]
    sizes, segment = [], decoding.Decoder._steps

    def counted(self, count: int) -> None:
        sizes.append(len(self.tokens))
        segment(self, count)

    monkeypatch.setattr(decoding.Decoder, "_steps", counted)
    ModelSampler(model, Ends(), fixed=True)(prompts(), GREEDY, 0)
    # Token number n + 1, counted from 0, is the end; the first comes with the prompt, then five to a segment.
    wanted = [sum(len(text) > start for text in texts) for start in range(0, GREEDY.max_new_tokens - 1, 5)]
    assert sizes == [size for size in wanted if size] and sizes[0] > sizes[-1]


@pytest.mark.parametrize("student", [False, True])
def test_buffers_that_serve_several_batches(student: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is short is written on the buffers of the batch before, whose leftovers must not be seen, whatever its
    prompts were."""
    model, end = model_that_ends("llama")
    if student:
        windows = torch.randint(1, VOCAB, (8, 32))
        model = convert_model(model, settings(qk_rope_head_dim=8, kv_lora_rank=24, freqfold=2), windows).student
        model.generation_config.eos_token_id = [end]
    made, start = [], decoding.Decoder._start
    monkeypatch.setattr(decoding.Decoder, "_start", lambda *args: (made.append(args[0]), start(*args))[1])
    sampler = ModelSampler(model, Ends(), fixed=True)
    generator = torch.Generator().manual_seed(8)
    other = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in (5, 2, 9, 13, 1)]
    for asked in (prompts(), other, prompts(), [prompt[:4] for prompt in other]):
        wanted = [plain(model, prompt, GREEDY.max_new_tokens, {0, end}) for prompt in asked]
        assert sampler(asked, GREEDY, 0) == wanted
    assert len(made) == 2  # 35 and 36 columns are both given 64; 27 have 32
    warm = Sampling(max_new_tokens=12, temperature=1.0, batch_size=4)
    fresh = ModelSampler(model, Ends(), fixed=True)(other, warm, 5)
    assert [sampler(asked, warm, 5) for asked in (prompts(), other)][1] == fresh
    cool = warm.model_copy(update={"temperature": 0.1})
    assert sampler(other, cool, 5) == ModelSampler(model, Ends(), fixed=True)(other, cool, 5) != fresh
    assert ModelSampler(model, Ends(), fixed=True)(other, Sampling(max_new_tokens=1, temperature=0), 5) == [
        plain(model, prompt, 1, {0, end}) for prompt in other
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("student", [False, True])
def test_graphs_that_serve_several_batches(student: bool) -> None:
    """On a GPU: greedy texts of a replayed graph are those of a growing cache, seeded ones do not depend on what came
    before."""
    model, end = model_that_ends("llama")
    if student:
        windows = torch.randint(1, VOCAB, (8, 32))
        model = convert_model(model, settings(qk_rope_head_dim=8, kv_lora_rank=24, freqfold=2), windows).student
        model.generation_config.eos_token_id = [end]
    model = model.cuda()
    sampler, plainly = ModelSampler(model, Ends(), fixed=True), ModelSampler(model, Ends(), fixed=False)
    generator = torch.Generator().manual_seed(8)
    other = [torch.randint(1, VOCAB, (length,), generator=generator).tolist() for length in (5, 2, 9, 13, 1)]
    long = Sampling(max_new_tokens=decoding.SEGMENT + 40, temperature=0, batch_size=5)
    for asked in (prompts(), other, prompts(), other[:3], prompts()):
        assert sampler(asked, GREEDY, 0) == plainly(asked, GREEDY, 0)
        assert sampler(asked, long, 0) == plainly(asked, long, 0)
    warm = Sampling(max_new_tokens=12, temperature=0.9, batch_size=5)
    fresh = [
        ModelSampler(model, Ends(), fixed=True)(asked, warm, seed) for seed, asked in enumerate((prompts(), other))
    ]
    assert [sampler(asked, warm, seed) for seed, asked in enumerate((prompts(), other))] == fresh
    assert sampler(prompts(), warm, 0) == fresh[0] != sampler(prompts(), warm, 1)


@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_a_student_writes_too(family: str, fixed: bool) -> None:
    model = tiny_model(family)
    windows = torch.randint(1, VOCAB, (8, 32))
    student = convert_model(model, settings(qk_rope_head_dim=8, kv_lora_rank=24, freqfold=2), windows).student
    wanted = [plain(student, prompt, GREEDY.max_new_tokens, {0}) for prompt in prompts()]
    assert ModelSampler(student, Ends(), fixed=fixed)(prompts(), GREEDY, 0) == wanted


@pytest.mark.parametrize("fixed", [False, True])
def test_an_exported_checkpoint_writes_too(fixed: bool) -> None:
    """transformers' own DeepSeek class, whose cache is the latent and whose attention has more key width than value
    width."""
    ranks = dict(q_lora_rank=None, kv_lora_rank=24, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=12)
    experts = dict(n_routed_experts=2, n_group=1, topk_group=1, num_experts_per_tok=1, n_shared_experts=1)
    model = tiny_model(
        "deepseek_v3", groups=4, first_k_dense_replace=2, initializer_range=0.3, head_dim=8, **ranks, **experts
    )
    wanted = [plain(model, prompt, GREEDY.max_new_tokens, {0}) for prompt in prompts()]
    assert ModelSampler(model, Ends(), fixed=fixed)(prompts(), GREEDY, 0) == wanted


def test_windows_and_caps_decode_with_a_growing_cache() -> None:
    experts = {"num_local_experts": 2, "num_experts_per_tok": 1, "sliding_window": None}
    for family, fields, allowed in (
        ("llama", {}, True),
        ("qwen2", {}, True),
        ("gemma2", {"sliding_window": 8}, False),
        ("gemma3_text", {"sliding_window": 8}, False),
        ("mixtral", experts, False),
    ):
        model = tiny_model(family, **fields)
        cache = DynamicCache(config=model.config)
        model(input_ids=torch.ones(1, 3, dtype=torch.long), past_key_values=cache, use_cache=True)
        assert has_fixed_size(model, cache) == allowed


@pytest.mark.parametrize("fixed", [False, True])
def test_a_seed_means_a_text(fixed: bool) -> None:
    sampler = ModelSampler(tiny_model(), Ends(), fixed=fixed)
    warm = Sampling(max_new_tokens=12, temperature=1.0, batch_size=4)
    assert sampler(prompts(), warm, 5) == sampler(prompts(), warm, 5)
    assert sampler(prompts(), warm, 5) != sampler(prompts(), warm, 6)
    assert batch_seed(0, "a", 1) != batch_seed(1, "a", 0)


def test_draws_follow_the_distribution() -> None:
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().expand(20_000, 4)
    generator = torch.Generator().manual_seed(0)

    def shares(**fields) -> list[float]:
        drawn = choose(logits.clone(), Sampling(**fields), generator)
        return (torch.bincount(drawn, minlength=4) / len(drawn)).tolist()

    assert shares() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.015)
    assert shares(top_p=0.79) == pytest.approx([0.625, 0.375, 0, 0], abs=0.015)  # two reach 0.8
    assert shares(top_p=0.81) == pytest.approx([0.526, 0.316, 0.158, 0], abs=0.015)
    assert shares(temperature=0.5) == pytest.approx([0.685, 0.247, 0.062, 0.007], abs=0.015)


def test_batches_of_like_length() -> None:
    lengths = [3, 9, 1, 7, 9, 2]
    plan = batches(lengths, 2)
    assert [[lengths[index] for index in batch] for batch in plan] == [[9, 9], [7, 3], [2, 1]]


class Counting:
    """A sampler of few tokens that follow from the seed, and that dies after so many batches."""

    def __init__(self, lives: int = 10**6) -> None:
        self.lives, self.calls = lives, 0

    def __call__(self, asked, settings, seed):
        if self.calls == self.lives:
            raise KeyboardInterrupt
        self.calls += 1
        return [Sample([seed % 1000, *prompt], bool(prompt[0] % 2)) for prompt in asked]


def run(folder, sampler, missing, digest: str = "d") -> SampledBatches:
    parts = SampledBatches(folder, digest)
    draw(parts, sampler, missing)
    return parts


def draw(parts: SampledBatches, sampler, missing, stored=None) -> None:
    sample_missing(
        parts,
        lambda: sampler,
        Starts.prompts_of,
        missing,
        GREEDY,
        seed=1,
        name="x",
        state=PartialState(cpu=True),
        stored=stored,
    )


def test_an_interrupted_drawing_goes_on(tmp_path) -> None:
    straight = run(tmp_path / "straight", Counting(), all_of(7))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "broken", Counting(lives=3), all_of(7))
    with (tmp_path / "broken" / "000.jsonl").open("a") as file:
        file.write('{"batch": 3, "samp')  # a crash in the middle of a line
    rest = Counting()
    broken = run(tmp_path / "broken", rest, all_of(7))
    assert rest.calls == 4
    assert [broken.samples(batch) for batch in range(7)] == [straight.samples(batch) for batch in range(7)]
    assert len({broken.samples(batch)[0].tokens[0] for batch in range(7)}) == 7  # every batch has its own seed
    again = Counting()
    run(tmp_path / "broken", again, all_of(7))
    assert again.calls == 0
    run(tmp_path / "broken", again, all_of(7), digest="other settings")
    assert again.calls == 7


def test_a_changed_token_is_drawn_again(tmp_path) -> None:
    run(tmp_path, Counting(), all_of(3))
    file = tmp_path / "000.jsonl"
    before = file.read_bytes()
    lines = before.splitlines(keepends=True)
    lines[1] = lines[1].replace(b",101,7]", b",101,8]")
    assert b"".join(lines) != before
    file.write_bytes(b"".join(lines))
    again = Counting()
    parts = run(tmp_path, again, all_of(3))
    assert again.calls == 1 and parts.samples(1)[1].tokens[1:] == [101, 7]


def test_text_is_drawn_until_it_suffices(tmp_path) -> None:
    parts = run(tmp_path, Counting(), until(24, 1))  # 5 tokens a batch, and 2 end tokens where its number is odd
    assert enough(parts.index(), 24) == 4 and len(parts.index()) == 4
    assert enough(parts.index(), 25) is None
    assert parts.index() == SampledBatches(tmp_path, "d").index()  # what was noted while writing is what is read
    ahead = SampledBatches(tmp_path, "d")
    ahead.append(1, 5, [Sample([1] * 50, True)])  # another process was faster with a later batch
    assert enough(ahead.index(), 25) is None and until(25, 2)(ahead.index()) == [4, 6]


class Numbered(Counting):
    """`Counting` that notes, when it is called, how many rows there are already."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.file = file

    def __call__(self, asked, settings, seed):
        until = time.monotonic() + 20
        while self.calls > 1 and not self.there() >= 2 * (self.calls - 1) and time.monotonic() < until:
            time.sleep(0.01)
        assert self.there() >= 2 * (self.calls - 1) or not self.calls  # all but those of the last batch
        return super().__call__(asked, settings, seed)

    def there(self) -> int:
        return len(self.file.read_text().splitlines()) if self.file.exists() else 0


class Starts:
    """What rows need of `TextPrompts`: prompts by batch."""

    class tokenizer:
        @staticmethod
        def decode(tokens, **_):
            return " ".join(map(str, tokens))

    @staticmethod
    def prompts_of(batch: int) -> list[list[int]]:
        return [[batch], [batch + 100, 7]]

    @staticmethod
    def without_start(tokens: list[int]) -> list[int]:
        return tokens


def test_rows_are_put_together_while_others_are_sampled(tmp_path) -> None:
    """Whatever was there before, how far the rows had come, and however many processes sampled them."""
    tokens = 40  # 5 or 7 a batch

    def written(folder: Path, sampler, name: str) -> Path:
        parts = SampledBatches(folder, "d")
        with WrittenRows(tmp_path / name, TextRows(Starts), parts, tokens) as rows:
            draw(parts, sampler, until(tokens, 1), rows.follow)
            return rows.finish()

    sampler = Numbered(tmp_path / "straight.jsonl")
    straight = written(tmp_path / "straight", sampler, "straight.jsonl").read_text()
    assert sampler.calls > 6 and len(straight.splitlines()) == 2 * sampler.calls
    with pytest.raises(KeyboardInterrupt):
        written(tmp_path / "broken", Counting(lives=3), "broken.jsonl")
    assert written(tmp_path / "broken", Counting(), "again.jsonl").read_text() == straight
    assert written(tmp_path / "broken", Counting(lives=0), "nothing missing.jsonl").read_text() == straight

    more = SampledBatches(tmp_path / "both", "d")  # by two processes, one of which is ahead and has sampled too much
    more.open()
    one = SampledBatches(tmp_path / "straight", "d")
    for batch in reversed(one.index()):
        more.append(batch % 2, batch, one.samples(batch))
    more.append(1, sampler.calls, [Sample([1], True), Sample([2], True)])
    with WrittenRows(tmp_path / "two", TextRows(Starts), SampledBatches(tmp_path / "both", "d"), tokens) as rows:
        assert rows.finish().read_text() == straight


def test_a_text_that_came_in_an_earlier_batch_is_left_out(tmp_path) -> None:
    parts = SampledBatches(tmp_path, "d")
    parts.open()
    for batch, samples in enumerate([[[1], [2]], [[3], [1]], [[2], [4]]]):
        parts.append(0, batch, [Sample(tokens, tokens == [1]) for tokens in samples])
    same = SimpleNamespace(
        prompts_of=lambda _: [[9], [9]], without_start=Starts.without_start, tokenizer=Starts.tokenizer
    )
    with WrittenRows(tmp_path / "rows", TextRows(same), parts, 7) as rows:
        found = [json.loads(line)["text"] for line in rows.finish().read_text().splitlines()]
    assert found == ["9 1", "9 2", "9 3", "9 4"]
    assert rows.rows.counts == {"written": 6, "finished": 2, "duplicates": 2, "kept": 4, "tokens": 5}


def test_rows_do_not_keep_a_run_that_is_to_end(tmp_path) -> None:
    parts = SampledBatches(tmp_path, "d")
    parts.open()
    for batch in range(50):
        parts.append(0, batch, [Sample([batch], True), Sample([batch], True)])

    class Slow(TextRows):
        def of(self, batch, samples):
            time.sleep(0.05)
            return super().of(batch, samples)

    with WrittenRows(tmp_path / "rows", Slow(Starts), parts, 200) as rows:
        rows.follow()
        time.sleep(0.1)
    assert 0 < len((tmp_path / "rows").read_text().splitlines()) < 20


def test_rows_that_cannot_be_written_end_the_sampling(tmp_path) -> None:
    parts = SampledBatches(tmp_path / "x", "d")
    with (
        WrittenRows(tmp_path / "no" / "rows", TextRows(Starts), parts, 40) as rows,
        pytest.raises(FileNotFoundError),
    ):
        draw(parts, Counting(), until(40, 1), rows.follow)
        rows.finish()


def test_rounds_grow_with_what_is_known() -> None:
    """One short batch must not make hundreds of the rest, and no process of several waits for another's second
    batch."""

    def drawn(count: int) -> dict[int, Place]:
        return {batch: Place(Path("x"), 0, 10, 0.0) for batch in range(count)}

    rounds = [len(until(10_000, 1)(drawn(count))) for count in (0, 1, 3, 9, 400, 990, 999)]
    assert rounds == [1, 2, 6, 18, 600, 10, 1]
    assert [len(until(10_000, 8)(drawn(count))) for count in (0, 8, 24, 985, 999)] == [8, 16, 48, 8, 8]
    assert until(10_000, 1)(drawn(1000)) == []


def test_what_was_interrupted_serves_no_other_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    model, end = model_that_ends("llama")
    wanted = [plain(model, prompt, GREEDY.max_new_tokens, {0, end}) for prompt in prompts()]
    sampler, step, left = ModelSampler(model, Ends(), fixed=True), decoding.Decoder._step, [30]

    def dying(self) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        step(self)

    monkeypatch.setattr(decoding.Decoder, "_step", dying)
    assert sampler(prompts(), GREEDY, 0) == wanted
    first, generator = sampler.decoder, sampler.generator
    with pytest.raises(KeyboardInterrupt):
        sampler(prompts(), GREEDY, 0)
    assert sampler(prompts(), GREEDY, 0) == wanted
    assert sampler.decoder is not first and sampler.generator is not generator


def test_leftovers_that_no_mask_hides_are_gone() -> None:
    model, end = model_that_ends("llama")
    sampler = ModelSampler(model, Ends(), fixed=True)
    wanted = sampler(prompts(), GREEDY, 0)
    for layer in sampler.decoder.buffers.layers:
        layer.keys.fill_(torch.nan), layer.values.fill_(torch.inf)
    assert sampler(prompts(), GREEDY, 0) == wanted


def test_a_prefix_begins_with_a_word_anywhere_in_the_text() -> None:
    text = " ".join(f"w{number:03d}" for number in range(200))
    generator = torch.Generator().manual_seed(0)
    pieces = [piece(text, 40, generator) for _ in range(300)]
    assert {len(one) for one in pieces} == {40}
    starts = [int(one[1:4]) for one in pieces if one[0] == "w"]
    assert len(starts) > 290 and min(starts) < 10 and max(starts) > 185 and len(set(starts)) > 120
    assert piece("short", 40, generator) == "short"


def test_a_cue_follows_every_prefix(letters) -> None:
    cues = ["", "\nQ:", " so"]
    entry = Text(
        name="w",
        kind="text",
        tokens=9,
        prefix_data=["sample_train"],
        prefix_tokens=7,
        cues=cues,
        batch_size=60,
        max_new_tokens=4,
    )
    plain = TextPrompts(entry.model_copy(update={"cues": []}), letters, seed=3, key="write.0")
    starts = TextPrompts(entry, letters, seed=3, key="write.0")
    found, prefixes = decoded(starts.prompts_of(2), letters), decoded(plain.prompts_of(2), letters)
    assert all(text.startswith(prefix) for text, prefix in zip(found, prefixes, strict=True))
    drawn = [text[len(prefix) :] for text, prefix in zip(found, prefixes, strict=True)]
    assert {cue: drawn.count(cue) > 9 for cue in cues} == dict.fromkeys(cues, True) and len(drawn) == sum(
        map(drawn.count, cues)
    )
    again = TextPrompts(entry, letters, seed=3, key="write.0")
    assert starts.prompts_of(2) == again.prompts_of(2) != starts.prompts_of(1)


@pytest.mark.parametrize("few", [1, 2, 4, 6])
def test_of_a_text_no_more_is_tokenised_than_a_prefix_needs(few: int, letters, monkeypatch) -> None:
    """The prefixes are those of the whole pieces, also where what was tokenised first has too few tokens."""
    entry = Text(
        name="w",
        kind="text",
        tokens=9,
        prefix_data=["sample_train"],
        prefix_tokens=20,
        batch_size=60,
        max_new_tokens=4,
    )
    monkeypatch.setattr("transmla.generate.prompts.FEW", 16)
    whole = TextPrompts(entry, letters, seed=3, key="write.0").prompts_of(1)
    monkeypatch.setattr("transmla.generate.prompts.FEW", few)
    seen: list[int] = []
    original = TextPrompts._tokens
    monkeypatch.setattr(
        TextPrompts, "_tokens", lambda self, texts: (seen.append(sum(map(len, texts))), original(self, texts))[1]
    )
    assert TextPrompts(entry, letters, seed=3, key="write.0").prompts_of(1) == whole
    assert {len(prompt) for prompt in whole} == {20}
    assert seen[0] <= few * 20 * 60 and (seen[1] > seen[0]) == (few == 1)


def test_a_prefix_may_stand_in_a_cue(letters) -> None:
    """The words around it are tokenized with it, once; letters cut in two are not shown; other cues follow as
    before."""
    begins = letters.convert_tokens_to_ids("<|end|>")
    letters._tokenizer.post_processor = processors.TemplateProcessing(
        "<|end|> $A", special_tokens=[("<|end|>", begins)]
    )
    cues = ["Q: {}?\nA:", " so", "{} {}"]
    entry = Text(
        name="w",
        kind="text",
        tokens=9,
        prefix_data=["sample_train"],
        prefix_tokens=7,
        cues=cues,
        batch_size=90,
        max_new_tokens=4,
    )
    prompts = TextPrompts(entry, letters, seed=3, key="write.0").prompts_of(2)
    prefixes = TextPrompts(entry.model_copy(update={"cues": []}), letters, seed=3, key="write.0").prompts_of(2)
    assert all(prompt.count(begins) == 1 and prompt[0] == begins for prompt in prompts)
    plain = decoded([prefix[1:] for prefix in prefixes], letters)
    bare = [text.removesuffix("\ufffd") for text in plain]
    found = decoded([prompt[1:] for prompt in prompts], letters)
    drawn = [
        {f"Q: {text}?\nA:": 0, f"{raw} so": 1, f"{text} {text}": 2}[one]
        for raw, text, one in zip(plain, bare, found, strict=True)
    ]
    assert min(drawn.count(cue) for cue in range(3)) > 15
    cut = TextPrompts(entry.model_copy(update={"cues": ["<{}>"]}), letters, seed=3, key="write.0")
    odd = letters("x\u00e9", add_special_tokens=False)["input_ids"]
    assert decoded(cut._cued([odd[:2], odd], 0), letters) == ["<|end|><x>", "<|end|><x\u00e9>"]


def test_many_texts_are_decoded_as_each_alone(letters) -> None:
    rows = [letters(text)["input_ids"] for text in ("one , two .", " \n", "", "don 't <|end|> é")]
    assert decoded(rows, letters) == [
        letters.decode(row, skip_special_tokens=False, clean_up_tokenization_spaces=False) for row in rows
    ]


@pytest.fixture
def letters() -> PreTrainedTokenizerFast:
    inner = Tokenizer(
        models.BPE(
            vocab={letter: place for place, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, merges=[]
        )
    )
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")
