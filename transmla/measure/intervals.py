"""Standard errors and 95 % intervals: of means over windows, of accuracies, of differences on the same questions."""

from __future__ import annotations

import math
from collections.abc import Sequence

Z = 1.959964  # 97.5 % quantile of the normal distribution


def student_t(freedom: int) -> float:
    """The 97.5 % quantile of Student's distribution, to 1 % from three degrees of freedom on.

    Cornish and Fisher's expansion about the normal quantile (Abramowitz and Stegun, 26.7.5): windows are few, and the
    normal quantile would make their intervals too short.
    """
    z, v = Z, float(freedom)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return z + sum(term / v ** (power + 1) for power, term in enumerate(terms))


def mean(values: Sequence[float]) -> float:
    """The arithmetic mean of at least one value."""
    return math.fsum(values) / len(values)


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of the mean of independent values, from their own spread; None where there is only one."""
    if len(values) < 2:
        return None
    centre = mean(values)
    return math.sqrt(math.fsum((value - centre) ** 2 for value in values) / (len(values) - 1) / len(values))


def wilson(successes: float, count: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share; it stays within 0 and 1 and is not empty at either."""
    share, z2 = successes / count, Z**2
    centre = (share + z2 / (2 * count)) / (1 + z2 / count)
    half = Z * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return max(0.0, centre - half), min(1.0, centre + half)


def paired_difference(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float]:
    """Mean of ours − theirs on the same questions, and its standard error.

    The error comes from the spread of the differences themselves: questions that both answer right, or both wrong, add
    nothing to it, where two separate intervals would count each model's whole spread.
    """
    differences = [float(a) - float(b) for a, b in zip(ours, theirs, strict=True)]
    return mean(differences), standard_error(differences) or 0.0


def around(centre: float, error: float) -> tuple[float, float]:
    """The normal 95 % interval of a mean with this standard error."""
    return centre - Z * error, centre + Z * error


def average(errors: Sequence[float]) -> float:
    """Standard error of the plain mean of independent means (the tasks themselves are taken as given, not as drawn)."""
    return math.sqrt(math.fsum(error**2 for error in errors)) / len(errors)
