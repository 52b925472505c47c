"""The order of the stages: what is current is skipped, what is not is made again, nothing is half there."""

from __future__ import annotations

from collections.abc import Callable

from transmla.run.context import Run
from transmla.run.convert import convert
from transmla.run.evaluate import evaluate
from transmla.run.export import export, verify
from transmla.run.preconditions import check_before_weights
from transmla.run.record import record
from transmla.run.recover import recover
from transmla.run.write import write

Stage = Callable[[Run], None]

# What each verb of the command line does, in order.
PIPELINES: dict[str, list[Stage]] = {
    "recover": [check_before_weights, write, convert, recover, export, evaluate],
    "write": [write],
    "convert": [convert],
    "record": [record],
    "export": [export],
    "verify": [verify],
    "evaluate": [evaluate],
}


def run_verb(run: Run, verb: str) -> None:
    """Run the stages of a verb; every process calls this.

    Raises:
        RecipeError: a stage cannot run.
    """
    for stage in PIPELINES[verb]:
        stage(run)
    run.state.wait_for_everyone()
    run.state.destroy_process_group()  # gloo's threads may abort a process that ends without it
