"""The repositories that the tests' hub serves: files, commits and branches, and the facts that its answers state."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, Self

import yaml

Files = str | Path | Mapping[str, bytes | Path]

CHUNK = 1 << 20
LFS_SIZE = 10 << 20
LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".gz", ".model", ".npy", ".parquet", ".pt", ".pth", ".safetensors", ".zst"}
DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Blob:
    """A file of a repository: its bytes or the path that holds them, and the names of its content."""

    source: bytes | Path
    size: int
    oid: str  # git's SHA-1 of the file, or of the pointer that stands for an LFS file
    lfs: dict[str, Any] | None  # None: stored in git itself

    @classmethod
    def of(cls, name: str, source: bytes | Path) -> Self:
        """The blob of a file; weights, parquet and what is larger than 10 MiB are LFS files, as on the hub."""
        size = len(source) if isinstance(source, bytes) else source.stat().st_size
        if size <= LFS_SIZE and PurePosixPath(name).suffix not in LFS_SUFFIXES:
            return cls(source, size, git_oid(chunks(source, 0, size), size), None)
        digest = hashlib.sha256()
        for chunk in chunks(source, 0, size):
            digest.update(chunk)
        sha256 = digest.hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}
        return cls(source, size, git_oid(iter([pointer]), len(pointer)), lfs)

    @property
    def etag(self) -> str:
        return self.lfs["sha256"] if self.lfs else self.oid


@dataclass
class Repository:
    """The branches of a repository (commits, the newest last) and the files of every commit."""

    name: str
    branches: dict[str, list[str]] = field(default_factory=dict)
    commits: dict[str, dict[str, Blob]] = field(default_factory=dict)
    private: bool = False
    gated: bool = False

    def resolve(self, revision: str) -> str | None:
        """The commit of a branch or of a full commit hash; None when there is no such revision."""
        if revision in self.branches:
            return self.branches[revision][-1]
        return revision if revision in self.commits else None


def folder_files(folder: Path) -> dict[str, bytes | Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def chunks(source: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        for offset in range(start, stop, CHUNK):
            yield source[offset : min(offset + CHUNK, stop)]
        return
    with source.open("rb") as stream:
        stream.seek(start)
        while start < stop and (chunk := stream.read(min(CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


def git_oid(chunks: Iterator[bytes], size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def digest_of(lines: Iterator[str]) -> str:
    return hashlib.sha1("\n".join(lines).encode()).hexdigest()


def files_below(files: Mapping[str, Blob], folder: str) -> list[str]:
    return [file for file in files if not folder or file.startswith(f"{folder}/")]


def is_set(query: Mapping[str, list[str]], key: str) -> bool:
    return query.get(key, ["false"])[0].lower() in ("true", "1")


def tree_entry(files: Mapping[str, Blob], path: str, commit: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
    """A line of a tree listing, as the hub writes it for a file or a folder."""
    last = {"lastCommit": {"id": commit, "title": "Upload", "date": DATE}} if is_set(query, "expand") else {}
    if path in files:
        blob = files[path]
        lfs = {"lfs": blob.lfs} if blob.lfs else {}
        return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs, **last}
    oid = digest_of(f"{files[file].oid} {file}" for file in files_below(files, path))
    return {"type": "directory", "path": path, "size": 0, "oid": oid, **last}


def references(repository: Repository) -> dict[str, list[dict[str, str]]]:
    refs: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for branch, history in repository.branches.items():
        group = {"refs/convert/": "converts", "refs/pr/": "pullRequests"}.get(branch[: branch.rfind("/") + 1])
        ref = branch if group else f"refs/heads/{branch}"
        name = branch.rpartition("/")[2] if group else branch
        refs[group or "branches"].append({"name": name, "ref": ref, "targetCommit": history[-1]})
    return refs


def repository_facts(repository: Repository, commit: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
    """The facts of a repository at a commit; `expand` picks some of them, `blobs` adds sizes and hashes of files."""
    files = repository.commits[commit]
    siblings: list[dict[str, Any]] = [{"rfilename": file} for file in files]
    if is_set(query, "blobs"):
        for sibling, blob in zip(siblings, files.values(), strict=True):
            sibling |= {"size": blob.size, "blobId": blob.oid} | ({"lfs": blob.lfs} if blob.lfs else {})
    card = read_card(files.get("README.md"))
    info = {
        "id": repository.name,
        "author": repository.name.rpartition("/")[0],
        "sha": commit,
        "createdAt": DATE,
        "lastModified": DATE,
        "private": repository.private,
        "gated": "manual" if repository.gated else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": list(card.get("tags") or []),
        "cardData": card,
        "siblings": siblings,
        "usedStorage": sum(blob.size for blob in files.values()),
    }
    wanted = query.get("expand")
    return {key: value for key, value in info.items() if key in ("id", *wanted)} if wanted else info


def read_card(readme: Blob | None) -> dict[str, Any]:
    """The YAML block that opens a README."""
    text = b"".join(chunks(readme.source, 0, readme.size)).decode() if readme else ""
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    card = yaml.safe_load(block[1]) if block else None
    return json.loads(json.dumps(card, default=str)) if isinstance(card, dict) else {}
