"""A Hugging Face hub on the loopback address, for tests that must not reach the real one.

    with HubServer() as server:
        server.add_model("org/tiny", folder)
        subprocess.run([sys.executable, "-c", script], env=server.environment(tmp_path / "home"), check=True)
        assert "model.safetensors" in server.downloads("org/tiny")

It serves what huggingface_hub, transformers and datasets read: repository facts, file trees, and files with ranges.
It is read-only, and it has no xet storage, no search and no dataset viewer.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from email.message import Message
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path, PurePosixPath
from typing import Any, Self
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import yaml

Files = str | Path | Mapping[str, bytes | Path]

CHUNK = 1 << 20
LFS_SIZE = 10 << 20
LFS_SUFFIXES = {".arrow", ".bin", ".gguf", ".gz", ".model", ".npy", ".parquet", ".pt", ".pth", ".safetensors", ".zst"}
DATE = "2026-01-01T00:00:00.000Z"
VERBS = "revision|tree|paths-info|refs|commits|auth-check"
NAME = rf"[^/]+(?:/(?!(?:{VERBS})(?:/|$))[^/]+)?"
REVISION = "refs/(?:convert|pr)/[^/]+|[^/]+"
API = re.compile(rf"/api/(models|datasets)/({NAME})(?:/({VERBS})(?:/({REVISION}))?(?:/(.+))?)?")
FILE = re.compile(rf"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/({REVISION})/(.+)")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


@dataclass
class Request:
    """One request as the server saw it; it is logged before its first byte goes out."""

    method: str
    path: str  # quoted as it came, without the query
    status: int
    range: str | None  # the Range header
    authorized: bool  # whether it carried the server's token
    sent: int = 0  # bytes of the body


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
            return cls(source, size, _git_oid(_chunks(source, 0, size), size), None)
        digest = hashlib.sha256()
        for chunk in _chunks(source, 0, size):
            digest.update(chunk)
        sha256 = digest.hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()
        lfs = {"oid": sha256, "sha256": sha256, "size": size, "pointerSize": len(pointer)}
        return cls(source, size, _git_oid(iter([pointer]), len(pointer)), lfs)

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


@dataclass
class Answer:
    """A response: the body is bytes, or the range [start, stop) of a blob, of which at most `limit` bytes are sent."""

    status: int
    body: bytes | Path = b""
    headers: dict[str, str] = field(default_factory=dict)
    start: int = 0
    stop: int = 0
    limit: int | None = None

    @classmethod
    def of(cls, content: object, **headers: str) -> Self:
        body = json.dumps(content).encode()
        return cls(200, body, {"Content-Type": "application/json"} | headers, stop=len(body))

    @classmethod
    def error(cls, status: int, message: str, code: str | None = None, **headers: str) -> Self:
        """A refusal; the client picks its exception by the code, such as RepoNotFound or EntryNotFound."""
        body = json.dumps({"error": message}).encode()
        headers |= {"X-Error-Message": message} | ({"X-Error-Code": code} if code else {})
        return cls(status, body, {"Content-Type": "application/json"} | headers, stop=len(body))


class HubServer:
    """A hub that serves the repositories added to it while its `with` block is open.

    `endpoint` is its address, `token` the one token it accepts, `log` every request so far.
    A folder is served from where it lies and must not change; to publish new content, add the repository again: its
    branch moves to the new commit and the old commit stays reachable by its hash.
    """

    token = "hf_" + "a" * 34

    def __init__(self, *, page: int = 1000) -> None:
        self.page = page  # entries per page of a tree listing
        self.log: list[Request] = []
        self._repositories: dict[tuple[str, str], Repository] = {}
        self._renamed: dict[str, str] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._down = False
        self._listener = _Listener(("127.0.0.1", 0), partial(_Handler, self))
        self.endpoint = f"http://127.0.0.1:{self._listener.server_port}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._listener.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.down()
        self._listener.shutdown()
        self._listener.server_close()

    def add_model(self, name: str, files: Files, *, revisions: Mapping[str, Files] | None = None) -> str:
        """The commit of main, a hash of its content; `revisions` gives the files of more branches by branch name."""
        return self._add("models", name, {"main": files, **(revisions or {})})

    def add_dataset(self, name: str, files: Files, *, revisions: Mapping[str, Files] | None = None) -> str:
        """The commit of main, as for a model; "refs/convert/parquet" is the branch of the hub's parquet export."""
        return self._add("datasets", name, {"main": files, **(revisions or {})})

    def commit(self, name: str, revision: str = "main") -> str:
        """The commit that a branch points to."""
        commit = self._named(name)[0].resolve(revision)
        if commit is None:
            raise ValueError(f"{name} has no revision {revision}")
        return commit

    def environment(self, home: Path, *, token: str = "", offline: bool = False) -> dict[str, str]:
        """This process's environment, changed so that a new process uses this hub and keeps its caches under `home`."""
        caches = {"HF_HUB_CACHE": "hub", "HF_DATASETS_CACHE": "datasets", "HF_MODULES_CACHE": "modules"}
        off = {"HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE"}
        quiet = {"HF_HUB_DISABLE_XET", "HF_HUB_DISABLE_TELEMETRY", "HF_HUB_DISABLE_PROGRESS_BARS"}
        fixed = {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN_PATH": str(home / "token"),
            "HF_TOKEN": token,
            "HUGGING_FACE_HUB_TOKEN": "",
            "HUGGINGFACE_CO_STAGING": "0",
            "DISABLE_SAFETENSORS_CONVERSION": "1",
            "NO_PROXY": "127.0.0.1",
            "no_proxy": "127.0.0.1",
        }
        fixed |= {key: str(home / folder) for key, folder in caches.items()}
        fixed |= dict.fromkeys(off, str(int(offline))) | dict.fromkeys(quiet, "1")
        return dict(os.environ) | fixed

    def downloads(self, name: str) -> dict[str, int]:
        """Bytes sent of each file of a repository, over all requests; files that were only asked about are absent."""
        sent: dict[str, int] = {}
        for request in self.log:
            match = FILE.fullmatch(request.path)
            if match and match[2] == name and request.method == "GET" and request.status in (200, 206):
                sent[unquote(match[4])] = sent.get(unquote(match[4]), 0) + request.sent
        return sent

    def private(self, name: str) -> None:
        """From now on the repository answers 401 to requests without the token."""
        for repository in self._named(name):
            repository.private = True

    def gated(self, name: str) -> None:
        """From now on files are refused: 401 without a token, 403 with another token. The facts stay public."""
        for repository in self._named(name):
            repository.gated = True

    def rename(self, old: str, new: str) -> None:
        """The repository moves to the new name; requests for the old one are redirected."""
        for kind in ("models", "datasets"):
            if (kind, old) in self._repositories:
                self._repositories[kind, new] = self._repositories.pop((kind, old))
                self._repositories[kind, new].name = new
        self._named(new)
        self._renamed[old] = new

    def cut(self, name: str, file: str, *, after: int) -> None:
        """The next download of the file breaks off after that many bytes; later ones go through.

        huggingface_hub writes in steps of 10 MiB, so it resumes with a Range only when `after` is at least that.
        """
        self._named(name)
        self._cuts[name, file] = after

    def down(self) -> None:
        """From now on every request is answered with 503, until `up`."""
        self._down = True

    def up(self) -> None:
        self._down = False

    def accepts(self, headers: Message) -> bool:
        """Whether a request carries the token of this hub."""
        return headers.get("Authorization") == f"Bearer {self.token}"

    def answer(self, method: str, url: str, headers: Message, form: str) -> Answer:
        """What a request gets: refusals in the order down, renamed, missing, private, gated; then the content."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query) | parse_qs(form)
        if self._down:
            return Answer.error(503, "Service Unavailable", **{"Retry-After": "0"})
        if path == "/api/whoami-v2":
            return self._whoami(headers)
        match = FILE.fullmatch(path) or API.fullmatch(path)
        if match is None:
            return Answer.error(404, "Not served by this hub")
        kind, name = match[1] or "models", match[2]
        if name in self._renamed:
            return Answer(307, headers={"Location": url.replace(name, self._renamed[name], 1)})
        repository = self._repositories.get((kind, name))
        if repository is None:
            return Answer.error(404, "Repository not found", "RepoNotFound")
        if repository.private and not self.accepts(headers):
            return Answer.error(401, "Invalid username or password.", "RepoNotFound")
        reads = match.re is FILE or match[3] == "auth-check"
        if repository.gated and reads and not self.accepts(headers):
            status = 403 if headers.get("Authorization") else 401
            return Answer.error(status, f"Access to {kind} {name} is restricted.", "GatedRepo")
        if match.re is FILE:
            return self._file(repository, unquote(match[3]), unquote(match[4]), method, headers)
        verb, revision, folder = (unquote(part or "") for part in match.groups()[2:])
        if verb == "tree":
            return self._tree(repository, revision or "main", folder, path, query)
        return self._facts(repository, verb, revision or "main", query)

    def _add(self, kind: str, name: str, revisions: Mapping[str, Files]) -> str:
        repository = self._repositories.setdefault((kind, name), Repository(name))
        for branch, files in revisions.items():
            sources = files if isinstance(files, Mapping) else _folder(Path(files))
            blobs = {file: Blob.of(file, source) for file, source in sorted(sources.items())}
            commit = _digest(f"{blob.oid} {file}" for file, blob in blobs.items())
            repository.commits[commit] = blobs
            repository.branches.setdefault(branch, []).append(commit)
        return repository.branches["main"][-1]

    def _named(self, name: str) -> list[Repository]:
        found = [repository for (_, known), repository in self._repositories.items() if known == name]
        if not found:
            raise ValueError(f"{name} is not on this hub; add it first")
        return found

    def _whoami(self, headers: Message) -> Answer:
        if not self.accepts(headers):
            return Answer.error(401, "Invalid credentials in Authorization header")
        access = {"displayName": "tests", "role": "read", "createdAt": DATE}
        return Answer.of(
            {"type": "user", "name": "tester", "orgs": [], "auth": {"type": "access_token", "accessToken": access}}
        )

    def _facts(self, repository: Repository, verb: str, revision: str, query: Mapping[str, list[str]]) -> Answer:
        if verb == "auth-check":
            return Answer.of({})
        if verb == "refs":
            return Answer.of(_refs(repository))
        commit = repository.resolve(revision)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb == "commits":
            about = {"title": "Upload", "message": "", "date": DATE, "authors": [{"user": "tester"}]}
            history = repository.branches.get(revision, [commit])
            return Answer.of([{"id": commit, **about} for commit in reversed(history)])
        if verb == "paths-info":
            files = repository.commits[commit]
            paths = {path for path in query.get("paths", []) if path in files or _within(files, path)}
            return Answer.of([_entry(files, path, commit, query) for path in sorted(paths)])
        return Answer.of(_info(repository, commit, query))

    def _tree(
        self, repository: Repository, revision: str, folder: str, path: str, query: Mapping[str, list[str]]
    ) -> Answer:
        commit = repository.resolve(revision)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repository.commits[commit]
        within = _within(files, folder)
        if folder and not within:
            return Answer.error(404, f"{folder} does not exist on this revision", "EntryNotFound")
        depth = len(PurePosixPath(folder).parts)
        paths = set(within) | {str(parent) for file in within for parent in PurePosixPath(file).parents}
        if not _flag(query, "recursive"):
            paths = {"/".join(path.split("/")[: depth + 1]) for path in paths}
        listed = sorted(path for path in paths if path != "." and len(path.split("/")) > depth)
        start = int(query.get("cursor", ["0"])[0])
        page = [_entry(files, path, commit, query) for path in listed[start : start + self.page]]
        if start + self.page >= len(listed):
            return Answer.of(page)
        following = urlencode({**query, "cursor": [str(start + self.page)]}, doseq=True)
        return Answer.of(page, Link=f'<{self.endpoint}{path}?{following}>; rel="next"')

    def _file(self, repository: Repository, revision: str, file: str, method: str, headers: Message) -> Answer:
        commit = repository.resolve(revision)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        blob = repository.commits[commit].get(file)
        if blob is None:
            return Answer.error(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit})
        facts = {"X-Repo-Commit": commit, "ETag": f'"{blob.etag}"', "Accept-Ranges": "bytes"}
        facts["Content-Type"] = "application/octet-stream"
        if blob.lfs:
            facts |= {"X-Linked-Size": str(blob.size), "X-Linked-ETag": f'"{blob.etag}"'}
        answer = Answer(200, blob.source, facts, stop=blob.size)
        wanted = RANGE.fullmatch(headers.get("Range") or "")
        if wanted and (wanted[1] or wanted[2]):
            answer.start = int(wanted[1]) if wanted[1] else max(blob.size - int(wanted[2]), 0)
            answer.stop = min(int(wanted[2]) + 1, blob.size) if wanted[1] and wanted[2] else blob.size
            if answer.start >= answer.stop:
                return Answer.error(416, "Range not satisfiable", **{"Content-Range": f"bytes */{blob.size}"})
            answer.status = 206
            facts["Content-Range"] = f"bytes {answer.start}-{answer.stop - 1}/{blob.size}"
        if method == "GET":
            answer.limit = self._cuts.pop((repository.name, file), None)
        return answer


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64  # a snapshot opens eight connections at once; the default of five would delay some


class _Handler(BaseHTTPRequestHandler):
    """Reads a request from the socket, asks the hub for the answer and writes it."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, hub: HubServer, *arguments: Any) -> None:
        self.hub = hub
        super().__init__(*arguments)

    def handle(self) -> None:
        with suppress(ConnectionError):  # a client may leave in the middle of a file
            super().handle()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        answer = self.hub.answer(self.command, self.path, self.headers, body.decode(errors="replace"))
        path, authorized = urlsplit(self.path).path, self.hub.accepts(self.headers)
        request = Request(self.command, path, answer.status, self.headers.get("Range"), authorized)
        self.hub.log.append(request)
        self.send_response(answer.status)
        length = answer.stop - answer.start
        for header in {**answer.headers, "Content-Length": str(length)}.items():
            self.send_header(*header)
        self.end_headers()
        if self.command == "HEAD":
            return
        limit = length if answer.limit is None else min(answer.limit, length)
        self.close_connection = self.close_connection or limit < length
        for chunk in _chunks(answer.body, answer.start, answer.start + limit):
            request.sent += len(chunk)  # before the write, so that a client that has the file finds it in the log
            self.wfile.write(chunk)

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET


def _folder(folder: Path) -> dict[str, bytes | Path]:
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def _chunks(source: bytes | Path, start: int, stop: int) -> Iterator[bytes]:
    if isinstance(source, bytes):
        for offset in range(start, stop, CHUNK):
            yield source[offset : min(offset + CHUNK, stop)]
        return
    with source.open("rb") as stream:
        stream.seek(start)
        while start < stop and (chunk := stream.read(min(CHUNK, stop - start))):
            start += len(chunk)
            yield chunk


def _git_oid(chunks: Iterator[bytes], size: int) -> str:
    digest = hashlib.sha1(b"blob %d\0" % size)
    for chunk in chunks:
        digest.update(chunk)
    return digest.hexdigest()


def _digest(lines: Iterator[str]) -> str:
    return hashlib.sha1("\n".join(lines).encode()).hexdigest()


def _within(files: Mapping[str, Blob], folder: str) -> list[str]:
    return [file for file in files if not folder or file.startswith(f"{folder}/")]


def _flag(query: Mapping[str, list[str]], key: str) -> bool:
    return query.get(key, ["false"])[0].lower() in ("true", "1")


def _entry(files: Mapping[str, Blob], path: str, commit: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
    """A line of a tree listing, as the hub writes it for a file or a folder."""
    last = {"lastCommit": {"id": commit, "title": "Upload", "date": DATE}} if _flag(query, "expand") else {}
    if path in files:
        blob = files[path]
        lfs = {"lfs": blob.lfs} if blob.lfs else {}
        return {"type": "file", "path": path, "size": blob.size, "oid": blob.oid, **lfs, **last}
    oid = _digest(f"{files[file].oid} {file}" for file in _within(files, path))
    return {"type": "directory", "path": path, "size": 0, "oid": oid, **last}


def _refs(repository: Repository) -> dict[str, list[dict[str, str]]]:
    refs: dict[str, list[dict[str, str]]] = {"branches": [], "converts": [], "tags": [], "pullRequests": []}
    for branch, history in repository.branches.items():
        group = {"refs/convert/": "converts", "refs/pr/": "pullRequests"}.get(branch[: branch.rfind("/") + 1])
        ref = branch if group else f"refs/heads/{branch}"
        name = branch.rpartition("/")[2] if group else branch
        refs[group or "branches"].append({"name": name, "ref": ref, "targetCommit": history[-1]})
    return refs


def _info(repository: Repository, commit: str, query: Mapping[str, list[str]]) -> dict[str, Any]:
    """The facts of a repository at a commit; `expand` picks some of them, `blobs` adds sizes and hashes of files."""
    files = repository.commits[commit]
    siblings: list[dict[str, Any]] = [{"rfilename": file} for file in files]
    if _flag(query, "blobs"):
        for sibling, blob in zip(siblings, files.values(), strict=True):
            sibling |= {"size": blob.size, "blobId": blob.oid} | ({"lfs": blob.lfs} if blob.lfs else {})
    card = _card(files.get("README.md"))
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


def _card(readme: Blob | None) -> dict[str, Any]:
    """The YAML block that opens a README."""
    text = b"".join(_chunks(readme.source, 0, readme.size)).decode() if readme else ""
    block = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
    card = yaml.safe_load(block[1]) if block else None
    return json.loads(json.dumps(card, default=str)) if isinstance(card, dict) else {}
