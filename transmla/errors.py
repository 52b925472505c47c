"""The one exception for a user's mistake: the command line turns it into a single line and exit code 2."""


class RecipeError(ValueError):
    """A recipe that cannot run. The message names the recipe key and the fix, on one line.

    Args:
        key: dotted recipe key, for example `convert.kv_lora_rank`.
        problem: what is wrong and how to mend it.
    """

    def __init__(self, key: str, problem: str) -> None:
        super().__init__(f"{key}: {problem}")
        self.key, self.problem = key, problem
