"""The rows of docs/serving.md: what the table says of an engine, what the exporter does when a recipe names it, and
what was measured agree."""

import re

import pytest
import torch

from tests.engine_rows import ROWS
from transmla.errors import RecipeError
from transmla.export.engines import engine_table
from transmla.plan.conversion_checks import check_conversion
from transmla.recipe.names import share
from transmla.run.engine_check import BOUNDS

MEASURED = re.compile(r"(?P<difference>\d\.\de-\d\d|0); (?P<same>[\d,]+)")  # largest difference, greedy tokens
TOKENS = 20 * 64


def reads(name: str, engine: str) -> bool:
    """Whether a recipe may name the engine; no weight is there that could be loaded."""
    words = [] if engine == "auto" else [f"export.engines=[{engine}]"]
    try:
        check_conversion(ROWS[name].planned(*words), torch.float32, exports=True)
    except RecipeError as refused:
        assert refused.key == "export.engines" and refused.problem.startswith(
            f"{engine} would not read this checkpoint"
        )
        return False
    return True


def measured() -> dict[str, dict[str, str]]:
    """Cells of the table of measurements in docs/serving.md, by row and engine."""
    page = (share("recipes").parent / "docs" / "serving.md").read_text(encoding="utf-8")
    lines = page[page.index("\n## Measured") :].splitlines()
    table = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    engines = [title.split()[0] for title in table[0][1:]]
    return {row[0]: dict(zip(engines, row[1:], strict=True)) for row in table[2:]}


@pytest.mark.parametrize("engine", engine_table()["engines"])
@pytest.mark.parametrize("name", ROWS)
def test_table_exporter_and_measurement_agree(name: str, engine: str) -> None:
    plan = check_conversion(ROWS[name].planned(), torch.float32, exports=True)
    assert reads(name, engine) == (engine in plan.export.readers)
    if engine == "sglang":
        return  # it was read, never run
    cell = measured()[name][engine]
    if cell == "not measured":
        pytest.skip("the row was not run in this engine yet")
    assert cell.startswith("**no**") != reads(name, engine)
    if reads(name, engine):
        found = MEASURED.fullmatch(cell)
        assert found is not None, cell
        assert float(found["difference"]) <= BOUNDS["float32"].difference
        assert int(found["same"].replace(",", "")) == TOKENS


def test_every_row_is_measured() -> None:
    assert list(measured()) == list(ROWS)
