"""Paths of a machine in a plain tree: found, told apart, and replaced by names."""

from __future__ import annotations

import pytest

from transmla.recipe.local_paths import paths_in, short_names, shortened, shortened_tree, standing_in

TREE = {
    "output_dir": "/tmp/out/",
    "data": ["/a/b/test.jsonl", "/a/c/test.jsonl", "relative/held.jsonl", "sample_train", "~/mine.jsonl"],
    "quality": {"/x/y.yaml": 1.0},
    "evaluate": {"prompts": ["/think of the sea"], "tasks": [{"path": "/q/tasks.jsonl"}]},
    "problems": {"think": "/no_think"},
    "continuations": {"exported": {"/a prompt": "/a reply"}},
    "text": ["/", "//", "~", "~ten", "${oc.env:TEXTS}/held.jsonl", "/two\n/lines", None, 7],
}
NAMES = {
    "/tmp/out": "out",
    "/a/b/test.jsonl": "b/test.jsonl",
    "/a/c/test.jsonl": "c/test.jsonl",
    "~/mine.jsonl": "mine.jsonl",
    "/x/y.yaml": "y.yaml",
    "/q/tasks.jsonl": "tasks.jsonl",
}


def test_what_is_a_path() -> None:
    assert paths_in(TREE) == set(NAMES)


def test_names_tell_paths_apart() -> None:
    assert short_names(NAMES) == NAMES
    assert short_names(["/a/b", "/b"]) == {"/a/b": "a/b", "/b": "b"}


@pytest.mark.parametrize(
    "text, expected",
    [
        ("kl on /a/b/test.jsonl <= 1", "kl on b/test.jsonl <= 1"),
        ("(/tmp/out/exported)", "(out/exported)"),
        ("/tmp/out.", "out."),
        ("/tmp/outer, /var/tmp/out, https://host/tmp/out", "/tmp/outer, /var/tmp/out, https://host/tmp/out"),
    ],
)
def test_replaced_in_text(text: str, expected: str) -> None:
    assert shortened(text, short_names(NAMES)) == expected


def test_a_folder_within_another() -> None:
    """The longer path first, whatever the order they come in."""
    names = short_names(["/w", "/w/run", "/w/run/exported"])
    assert shortened("/w/run/exported /w/run/a /w/b", names) == "exported run/a w/b"


def test_replaced_in_a_tree() -> None:
    found = shortened_tree(TREE, short_names(NAMES))
    assert found["data"][:2] == ["b/test.jsonl", "c/test.jsonl"] and found["quality"] == {"y.yaml": 1.0}
    assert found["evaluate"]["prompts"] == TREE["evaluate"]["prompts"] and found["text"] == TREE["text"]
    assert not any(standing_in(str(found), path) for path in NAMES)
    assert shortened_tree({"a": r"/x\1/y"}, {"/x\\1": r"b\1"}) == {"a": r"b\1/y"}
