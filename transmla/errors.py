"""The one exception for a user's mistake: the command line turns it into a single line and exit code 2."""

from __future__ import annotations

import re

# Credentials in front of a URL's host, and the forms of well-known services' tokens.
CREDENTIALS = re.compile(r"(?<=://)[^\s/@]+(?=@)")
TOKEN = re.compile(
    r"\b(hf_[A-Za-z0-9]{12,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w-]{16,}|sk-(?:proj-)?[A-Za-z0-9]{20,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w-]{10,})"
)


def masked(text: str) -> str:
    """The text with credentials of URLs and tokens replaced by `***`."""
    return TOKEN.sub("***", CREDENTIALS.sub("***", text))


class RecipeError(ValueError):
    """A recipe that cannot run. The message names the recipe key and the fix, on one line and without secrets.

    Args:
        key: dotted recipe key, for example `convert.kv_lora_rank`.
        problem: what is wrong and how to mend it.
    """

    def __init__(self, key: str, problem: str) -> None:
        self.key, self.problem = masked(key), " ".join(masked(problem).splitlines())
        super().__init__(f"{self.key}: {self.problem}")

    def __reduce__(self) -> tuple[type[RecipeError], tuple[str, str]]:
        """What a worker process sends of it."""
        return type(self), (self.key, self.problem)
