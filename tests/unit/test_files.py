"""Manifests, scratch folders and digests: what tells a whole folder from a damaged one, and a dead run's from a live
one's."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from transmla.files import MANIFEST, damage, remove, remove_abandoned, save_manifest, scratch_folder
from transmla.sources import file_digests


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 0x10
    file.write_bytes(content)


def half(file: Path) -> None:
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def empty(file: Path) -> None:
    file.write_bytes(b"")


def zeros(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


DAMAGES = [Path.unlink, empty, half, zeros, flip]


@pytest.mark.parametrize("change", DAMAGES)
@pytest.mark.parametrize("name", ["weights", "sub/config.json", MANIFEST])
def test_every_damage_is_named(name: str, change, tmp_path) -> None:
    (tmp_path / "sub").mkdir()
    (tmp_path / "weights").write_bytes(bytes(range(1, 200)))
    (tmp_path / "sub" / "config.json").write_text('{"layers": 12}')
    save_manifest(tmp_path)
    assert damage(tmp_path) is None
    (tmp_path / "notes").write_text("a file of the user's own does no harm")
    assert damage(tmp_path) is None
    change(tmp_path / name)
    found = damage(tmp_path)
    assert found is not None and (name in found or name == MANIFEST)


def test_a_link_is_removed_and_not_what_it_leads_to(tmp_path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "real" / "file").write_text("1")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    remove(tmp_path / "link")
    assert (tmp_path / "real" / "file").is_file() and not (tmp_path / "link").is_symlink()
    remove(tmp_path / "nothing")


def test_only_what_a_dead_process_left_is_cleared(tmp_path) -> None:
    dying = f"""
import os
from pathlib import Path
from transmla.files import scratch_folder
with scratch_folder(Path({str(tmp_path)!r}) / ".partial-dead") as folder:
    (folder / "half").write_text("1")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", dying]).returncode == 9
    assert (tmp_path / ".partial-dead" / "half").is_file()
    (tmp_path / "finished").mkdir()
    with scratch_folder(tmp_path / ".partial-alive"):
        remove_abandoned(tmp_path)
        assert sorted(path.name for path in tmp_path.iterdir()) == [".partial-alive", "finished"]
    assert [path.name for path in tmp_path.iterdir()] == ["finished"]


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TRANSMLA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(file_digests, "SETTLED", 0)
    monkeypatch.setattr(file_digests, "_seen", {})
    return tmp_path / "cache"


def test_an_unchanged_file_is_read_once(cache, tmp_path, monkeypatch) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("one")
    reads = []
    original = file_digests.sha256_of_all
    monkeypatch.setattr(file_digests, "sha256_of_all", lambda files: (reads.extend(files), original(files))[1])
    first = file_digests.known_digests([file])
    for _ in range(2):
        assert file_digests.known_digests([file]) == first and reads == [file]
        file_digests._seen.clear()
    assert file_digests.read_digests([file]) == file_digests.read_digests([file]) == first
    assert reads == [file, file]


def test_the_content_counts_and_not_the_time(cache, tmp_path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("one")
    os.utime(file, (1.7e9, 1.7e9))
    first = file_digests.known_digests([file])
    os.utime(file, (1.8e9, 1.8e9))
    assert file_digests.known_digests([file]) == first
    file.write_text("two")
    os.utime(file, (1.8e9, 1.8e9))  # same size, same time
    assert file_digests.known_digests([file]) != first


def test_a_broken_cache_costs_time_alone(cache, tmp_path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("one")
    first = file_digests.known_digests([file])
    (kept,) = (cache / "digests").iterdir()
    whole = kept.read_text()
    for content in ("", "[]", '{"files": {}}', whole[:-9], whole.replace(first[0][:4], "0000")):
        kept.write_text(content)
        file_digests._seen.clear()
        assert file_digests.known_digests([file]) == first
