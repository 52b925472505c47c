"""A Hugging Face hub on the loopback address, for tests that must not reach the real one.

    with HubServer() as server:
        server.add_model("org/tiny", folder)
        subprocess.run([sys.executable, "-c", script], env=server.environment(tmp_path / "home"), check=True)
        assert "model.safetensors" in server.downloads("org/tiny")

It serves what huggingface_hub, transformers and datasets read: repository facts, file trees, and files with ranges.
It takes uploads in the name of the owners in `allowed`, and it has no xet storage, no search and no dataset viewer.
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Mapping
from email.message import Message
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Self
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

from tests.hub_http import Answer, Handler, Listener, Request
from tests.hub_repository import (
    DATE,
    Blob,
    Files,
    Repository,
    digest_of,
    files_below,
    folder_files,
    is_set,
    references,
    repository_facts,
    tree_entry,
)
from tests.hub_writing import Uploads

VERBS = "revision|tree|paths-info|refs|commits|auth-check"
NAME = rf"[^/]+(?:/(?!(?:{VERBS})(?:/|$))[^/]+)?"
REVISION = "refs/(?:convert|pr)/[^/]+|[^/]+"
API = re.compile(rf"/api/(models|datasets)/({NAME})(?:/({VERBS})(?:/({REVISION}))?(?:/(.+))?)?")
FILE = re.compile(rf"/(?:(datasets)/)?([^/]+(?:/[^/]+)?)/resolve/({REVISION})/(.+)")
RANGE = re.compile(r"bytes=(\d*)-(\d*)")


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
        self.allowed: set[str] = set()  # owners in whose name the token may write
        self.uploads = Uploads(self._repositories, self.allowed)
        self._renamed: dict[str, str] = {}
        self._cuts: dict[tuple[str, str], int] = {}
        self._down = False
        self._listener = Listener(("127.0.0.1", 0), partial(Handler, self))
        self.uploads.endpoint = self.endpoint = f"http://127.0.0.1:{self._listener.server_port}"

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

    def answer(self, method: str, url: str, headers: Message, body: bytes) -> Answer:
        """What a request gets: refusals in the order down, renamed, missing, private, gated; then the content."""
        path, query = urlsplit(url).path, parse_qs(urlsplit(url).query)
        if self._down:
            return Answer.error(503, "Service Unavailable", **{"Retry-After": "0"})
        if (written := self.uploads.answer(method, path, body, self.accepts(headers))) is not None:
            return written
        query |= parse_qs(body.decode(errors="replace"))
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
            sources = files if isinstance(files, Mapping) else folder_files(Path(files))
            blobs = {file: Blob.of(file, source) for file, source in sorted(sources.items())}
            commit = digest_of(f"{blob.oid} {file}" for file, blob in blobs.items())
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
            return Answer.of(references(repository))
        commit = repository.resolve(revision)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        if verb == "commits":
            about = {"title": "Upload", "message": "", "date": DATE, "authors": [{"user": "tester"}]}
            history = repository.branches.get(revision, [commit])
            return Answer.of([{"id": commit, **about} for commit in reversed(history)])
        if verb == "paths-info":
            files = repository.commits[commit]
            paths = {path for path in query.get("paths", []) if path in files or files_below(files, path)}
            return Answer.of([tree_entry(files, path, commit, query) for path in sorted(paths)])
        return Answer.of(repository_facts(repository, commit, query))

    def _tree(
        self, repository: Repository, revision: str, folder: str, path: str, query: Mapping[str, list[str]]
    ) -> Answer:
        commit = repository.resolve(revision)
        if commit is None:
            return Answer.error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        files = repository.commits[commit]
        within = files_below(files, folder)
        if folder and not within:
            return Answer.error(404, f"{folder} does not exist on this revision", "EntryNotFound")
        depth = len(PurePosixPath(folder).parts)
        paths = set(within) | {str(parent) for file in within for parent in PurePosixPath(file).parents}
        if not is_set(query, "recursive"):
            paths = {"/".join(path.split("/")[: depth + 1]) for path in paths}
        listed = sorted(path for path in paths if path != "." and len(path.split("/")) > depth)
        start = int(query.get("cursor", ["0"])[0])
        page = [tree_entry(files, path, commit, query) for path in listed[start : start + self.page]]
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
