"""`transmla push DIR ORG/NAME`: an export, with its card and a manifest, as a commit of a repository of the hub."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, RepositoryNotFoundError
from huggingface_hub.utils import validate_repo_id

from transmla import __version__
from transmla.errors import RecipeError, masked
from transmla.run.artifacts import METADATA
from transmla.run.release import KEY, Release, prepare_release

WEIGHTS = ("*.safetensors", "*.bin", "*.gguf", "*.pt", "*.pth")
# What belongs to a model that was there before: beside new weights, a loader could take it for theirs.
REPLACED = ("*.safetensors", "*.json", "*.jinja", "*.model", "vocab.txt", "merges.txt", "figures/*", "recipe.yaml")


def push(
    folder: Path, repository: str, *, public: bool = False, dry_run: bool = False, revision: str | None = None
) -> str:
    """Publish an export; returns what was, or would be, done, for the terminal.

    Args:
        folder: output directory of a finished recipe, or the exported folder. repository: ORG/NAME.
        public: whether a repository that is made can be read by everybody. dry_run: check all and upload nothing.
        revision: a branch, made where it is missing.

    Raises:
        RecipeError: what `prepare_release` refuses, a name that cannot be one, no token, or what the hub refuses.
    """
    _check_name(repository)
    if not dry_run and constants.HF_HUB_OFFLINE:
        raise RecipeError(KEY, "HF_HUB_OFFLINE is set; unset it, or add --dry-run")
    token = get_token()
    if not dry_run and token is None:
        raise RecipeError(KEY, "there is no token of the hub; run `hf auth login`, or set HF_TOKEN")
    release = prepare_release(folder, repository)
    if dry_run:
        where = f"{repository}, {'public' if public else 'private'}, revision {revision or constants.DEFAULT_REVISION}"
        missing = (
            [] if token else ["There is no token of the hub: `hf auth login` or HF_TOKEN comes before the upload."]
        )
        return "\n".join([*listing(release), f"Nothing was uploaded. It would go to {where}.", *missing])
    try:
        return "\n".join([*listing(release), _upload(HfApi(token=token), release, repository, public, revision)])
    except RecipeError:
        raise
    except Exception as error:  # of the hub's client, and of whatever library it speaks HTTP with
        raise _refusal(error, repository) from None


def listing(release: Release) -> list[str]:
    """Every file with its size in bytes and its digest."""
    width = max(len(f"{file.bytes:,}") for file in release.files)
    lines = [f"{file.bytes:>{width},}  {file.sha256}  {file.name}" for file in release.files]
    lines += [f"left out: {name}" for name in release.left_out]
    return [*lines, f"{len(release.files)} files, {sum(file.bytes for file in release.files):,} bytes"]


def _check_name(repository: str) -> None:
    try:
        validate_repo_id(repository)
    except HFValidationError as error:
        raise RecipeError(KEY, f"{repository!r} cannot be a repository: {' '.join(str(error).split())}") from None
    if "/" not in repository:
        raise RecipeError(KEY, f"{repository!r} names no owner; give ORG/NAME, or USER/NAME")


def _upload(api: HfApi, release: Release, repository: str, public: bool, revision: str | None) -> str:
    try:
        known = api.model_info(repository)
    except RepositoryNotFoundError:
        known = None
        api.create_repo(repository, private=not public)
    if known is not None:
        if bool(known.private) == public:
            state, way = ("private", "make it public on its page, or leave --public out")
            if not known.private:
                state, way = ("public", "add --public, make it private on its page, or name another")
            raise RecipeError(KEY, f"{repository} is there and {state}; {way}")
        there = [sibling.rfilename for sibling in known.siblings or []]
        if METADATA not in there and any(_matches(name, WEIGHTS) for name in there):
            raise RecipeError(
                KEY, f"{repository} holds another model, which this would replace; name another repository"
            )
    if revision is not None and revision != constants.DEFAULT_REVISION:
        api.create_branch(repository, branch=revision, exist_ok=True)
    names = {file.name for file in release.files}
    before = api.list_repo_files(repository, revision=revision)
    stale = [name for name in before if name not in names and _matches(name, REPLACED)]
    commit = api.create_commit(
        repository,
        [
            *(CommitOperationAdd(file.name, file.content) for file in release.files),
            *(CommitOperationDelete(name) for name in stale),
        ],
        commit_message=f"{release.recipe}, exported by TransMLA {__version__}",
        revision=revision,
    )
    removed = f"; removed {', '.join(stale)}" if stale else ""
    return f"{api.endpoint}/{repository} ({'public' if public else 'private'}), commit {commit.oid}{removed}"


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    """Whether a file in the repository's own folder, or in `figures`, is of one of the kinds."""
    return any(fnmatch(name, pattern) and name.count("/") == pattern.count("/") for pattern in patterns)


def _refusal(error: Exception, repository: str) -> RecipeError:
    status = error.response.status_code if isinstance(error, HfHubHTTPError) and error.response is not None else None
    reason = masked(" ".join(str(error).split()))[:300].rstrip(".") or type(error).__name__
    if status in (401, 403):
        return RecipeError(
            KEY, f"the token may not write to {repository}: {reason}; use a token with write access to that name"
        )
    return RecipeError(KEY, f"cannot upload to {repository}: {reason}; the same command goes on with what is missing")
