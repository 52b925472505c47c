"""Print the exactness table: `python -m tests.exactness`. Tiny random models, full rank, float32; the tests hold the
bound."""

import torch

from tests.numerics.test_exact import stock
from tests.numerics.test_families import CASES, TOKENS, convert, difference, make_source
from transmla.export.expressible import blocking_feature


def main() -> None:
    """One row a case: max |difference of logits| of student and source, and of both layouts of the stock export."""
    print("| source | std of logits | student vs source | export vs student, compact / padded |\n|---|---|---|---|")
    for case in CASES:
        source = make_source(case)
        student, _ = convert(source)
        reason = blocking_feature(student.config)
        exported = f"own class: {reason}"
        if reason is None:
            found = [difference(student, stock(student, layout, torch.float32)) for layout in ("compact", "padded")]
            exported = " / ".join(f"{value:.1e}" for value in found)
        with torch.no_grad():
            spread = float(source(TOKENS).logits.std())
        print(f"| {case} | {spread:.2f} | {difference(source, student):.1e} | {exported} |")


if __name__ == "__main__":
    main()
