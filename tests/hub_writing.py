"""What the tests' hub does with uploads: new repositories and branches, large files by Git LFS, commits.

The protocol is what huggingface_hub speaks without xet: `preupload` says which files are large, those go to the
addresses that the LFS batch names, and one `commit` of JSON lines has the small ones in it and the large ones' digests.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from urllib.parse import unquote

import yaml

from tests.hub_http import Answer
from tests.hub_repository import LFS_SIZE, LFS_SUFFIXES, Blob, Repository, digest_of

WRITES = re.compile(r"/api/models/([^/]+/[^/]+)/(preupload|commit|branch)/([^/]+)")
BATCH = re.compile(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch")
STORED = re.compile(r"/lfs/([0-9a-f]{64})")


class Uploads:
    """The writing half of a hub.

    repositories: by kind and name. allowed: owners in whose name the token may write.
    """

    def __init__(self, repositories: dict[tuple[str, str], Repository], allowed: set[str]) -> None:
        self.repositories, self.allowed = repositories, allowed
        self.endpoint = ""
        self.large: dict[str, bytes] = {}  # by SHA-256
        self.messages: list[str] = []  # of the commits, in order

    def answer(self, method: str, path: str, body: bytes, accepted: bool) -> Answer | None:
        """What a request of an upload gets; None: it is none."""
        if method == "PUT" and (stored := STORED.fullmatch(path)):
            if hashlib.sha256(body).hexdigest() != stored[1]:
                return Answer.error(400, "The content has another digest")
            self.large[stored[1]] = body
            return Answer(200)
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        routes: list[tuple[re.Match[str] | None, Callable[..., Answer]]] = [
            (re.fullmatch("/api/repos/create", path), self._create),
            (WRITES.fullmatch(path), self._write),
            (BATCH.fullmatch(path), self._batch),
        ]
        for match, act in routes:
            if match is not None and method == "POST":
                if not accepted:
                    return Answer.error(401, "Invalid username or password.", "RepoNotFound")
                return act(body, *match.groups())
        return None

    def _validate(self, content: str) -> Answer:
        try:
            card = yaml.safe_load(content.split("---")[1])
            wrong = [] if isinstance(card, dict) else [{"message": "no mapping"}]
        except (yaml.YAMLError, IndexError) as error:
            wrong = [{"message": str(error)}]
        answer = Answer.of({"errors": wrong, "warnings": []})
        answer.status = 400 if wrong else 200
        return answer

    def _create(self, body: bytes) -> Answer:
        asked = json.loads(body)
        name = f"{asked['organization']}/{asked['name']}"
        if asked["organization"] not in self.allowed:
            return Answer.error(403, f"You don't have the rights to create a model under {asked['organization']}")
        if ("models", name) in self.repositories:
            return Answer.error(409, "You already created this model repo")
        repository = Repository(name, private=asked.get("visibility") == "private")
        self.repositories["models", name] = repository
        self._commit(repository, "main", {})
        return Answer.of({"url": f"{self.endpoint}/{name}", "name": name})

    def _write(self, body: bytes, name: str, verb: str, branch: str) -> Answer:
        repository = self.repositories.get(("models", name))
        if repository is None:
            return Answer.error(404, "Repository not found", "RepoNotFound")
        if name.partition("/")[0] not in self.allowed:
            return Answer.error(403, f"You don't have the rights to write to {name}")
        branch = unquote(branch)
        if verb == "branch":
            if branch in repository.branches:
                return Answer.error(409, "Reference already exists")
            repository.branches[branch] = [repository.branches["main"][-1]]
            return Answer.of({})
        if branch not in repository.branches:
            return Answer.error(404, f"Invalid rev id: {branch}", "RevisionNotFound")
        if verb == "preupload":
            files = json.loads(body)["files"]
            modes = (
                "lfs" if file["size"] > LFS_SIZE or _suffix(file["path"]) in LFS_SUFFIXES else "regular"
                for file in files
            )
            return Answer.of(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
                        for file, mode in zip(files, modes, strict=True)
                    ]
                }
            )
        return self._apply(repository, branch, [json.loads(line) for line in body.splitlines() if line])

    def _apply(self, repository: Repository, branch: str, lines: list[dict]) -> Answer:
        files = dict(repository.commits[repository.branches[branch][-1]])
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                self.messages.append(value["summary"])
            elif line["key"] == "file":
                files[value["path"]] = Blob.of(value["path"], base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.large:
                    return Answer.error(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
                files[value["path"]] = Blob.of(value["path"], self.large[value["oid"]])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                return Answer.error(400, f"unknown key {line['key']}")
        commit = self._commit(repository, branch, files)
        return Answer.of(
            {"success": True, "commitOid": commit, "commitUrl": f"{self.endpoint}/{repository.name}/commit/{commit}"}
        )

    def _commit(self, repository: Repository, branch: str, files: dict[str, Blob]) -> str:
        lines = [f"{blob.oid} {file}" for file, blob in sorted(files.items())]
        commit = digest_of(iter([repository.name, *lines]))
        repository.commits[commit] = dict(sorted(files.items()))
        repository.branches.setdefault(branch, []).append(commit)
        return commit

    def _batch(self, body: bytes, name: str) -> Answer:
        objects = []
        for entry in json.loads(body)["objects"]:
            found = {"oid": entry["oid"], "size": entry["size"]}
            if entry["oid"] not in self.large:
                found["actions"] = {"upload": {"href": f"{self.endpoint}/lfs/{entry['oid']}"}}
            objects.append(found)
        return Answer.of({"transfer": "basic", "objects": objects})


def _suffix(path: str) -> str:
    return "." + path.rpartition(".")[2]
