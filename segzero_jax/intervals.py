"""Bootstrap confidence intervals over images, for ratios of sums over questions."""

from collections.abc import Mapping

import numpy as np

_RESAMPLES = 1000
_CONFIDENCE = 0.95


def bootstrap_interval(
    numerators_u: np.ndarray, denominators_u: np.ndarray | None = None, seed: int = 0
) -> tuple[float, float] | None:
    """Percentile bootstrap interval (95%) of a ratio of sums over units, from a fixed seed.

    Units are drawn with replacement, as many as there are, and the ratio is recomputed for each draw. A draw whose
    denominators are all 0 is left out. Units must be independent: all questions about an image are one unit.

    Args:
      numerators_u: one per unit.
      denominators_u: one per unit; without them each unit counts 1, and the ratio is the mean.

    Returns:
      None if fewer than two units count: one alone says nothing about others, and all draws would be the same.
    """
    count = len(numerators_u)
    denominators_u = np.ones(count) if denominators_u is None else denominators_u
    if np.count_nonzero(denominators_u) < 2:
        return None
    rng = np.random.default_rng(seed)
    ratios = []
    for _ in range(_RESAMPLES):
        drawn = rng.integers(0, count, count)
        below = denominators_u[drawn].sum()
        if below > 0:
            ratios.append(numerators_u[drawn].sum() / below)
    low, high = np.quantile(ratios, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def with_interval(numbers: Mapping[str, float | None], key: str) -> str:
    """A measured number for display: "0.412 [0.395, 0.430]", or without brackets if it has no interval."""
    low, high = numbers[f"{key}_low"], numbers[f"{key}_high"]
    return f"{numbers[key]:.3f}" if low is None else f"{numbers[key]:.3f} [{low:.3f}, {high:.3f}]"


def by_picture(values_q: np.ndarray, pictures_q: np.ndarray | None) -> np.ndarray:
    """Sums over the questions about each image, the images in the order of their first questions."""
    if pictures_q is None:
        return values_q
    places: dict[str, int] = {}
    index = [places.setdefault(picture, len(places)) for picture in pictures_q.tolist()]
    return np.bincount(index, weights=values_q)
