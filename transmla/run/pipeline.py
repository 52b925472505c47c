"""The order of the stages: what is current is skipped, what is not is made again, nothing is half there."""

from __future__ import annotations

from collections.abc import Callable

from transmla.process.siblings import watch_others
from transmla.run.context import Run
from transmla.run.convert import convert, convert_where_needed
from transmla.run.evaluate import evaluate
from transmla.run.export import export, verify
from transmla.run.lineage import arrange
from transmla.run.preconditions import check_before_weights
from transmla.run.record import record
from transmla.run.recover import ask_for_rows, recover
from transmla.run.text_preconditions import check_calibration, check_evaluation_text, check_writing
from transmla.run.write import write, write_where_needed

Stage = Callable[[Run], None]

# What each verb of the command line does, in order.
PIPELINES: dict[str, list[Stage]] = {
    "recover": [
        arrange,
        check_before_weights,
        ask_for_rows,
        write_where_needed,
        ask_for_rows,  # of what was written
        convert_where_needed,
        recover,
        export,
        evaluate,
    ],
    "write": [arrange, check_writing, write],
    "convert": [arrange, check_calibration, convert],
    "record": [arrange, record],
    "export": [arrange, export],
    "verify": [arrange, verify],
    "evaluate": [arrange, check_evaluation_text, evaluate],
}


def run_verb(run: Run, verb: str) -> None:
    """Run the stages of a verb; every process calls this.

    Raises:
        RecipeError: a stage cannot run.
    """
    for stage in PIPELINES[verb]:
        stage(run)
    run.state.wait_for_everyone()
    watch_others([])  # the others may end before this one does, but not before it has ceased to watch them
    run.state.wait_for_everyone()
    run.state.destroy_process_group()  # gloo's threads may abort a process that ends without it
