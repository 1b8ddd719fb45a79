"""Aggregate scores of few runs, as rliable defines them.

Reference:
    Agarwal et al., "Deep Reinforcement Learning at the Edge of the Statistical Precipice", NeurIPS
    2021.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from eoi_jax._internal import checks

__all__ = ["bootstrap_interval", "interquartile_mean"]


def interquartile_mean(scores: Any) -> float:
    r"""Mean of the middle half of all scores.

    Of :math:`n` sorted scores the :math:`\lfloor n / 4 \rfloor` lowest and as many of the highest
    are left out: of five runs one at each end.

    Args:
        scores: Any array; all tasks and runs count alike.

    Returns:
        The mean; NaN if any score is.

    Raises:
        ValueError: If there are no scores.

    Example:
        >>> from experiments.rl import aggregates
        >>> aggregates.interquartile_mean([0.0, 2.0, 3.0, 4.0, 100.0])
        3.0
    """
    return float(_means(np.ravel(np.asarray(scores, np.float64))))


def bootstrap_interval(
    scores: Sequence[Sequence[float]],
    *,
    confidence: float = 0.95,
    num_samples: int = 2000,
    seed: int = 0,
) -> tuple[float, float]:
    r"""Percentile interval of the interquartile mean, from a stratified bootstrap.

    Each sample draws as many runs of each task as there are, with replacement; the interval is that
    between the quantiles :math:`(1 \mp c) / 2` of the samples' interquartile means.

    Args:
        scores: Runs of each task; tasks may have different numbers of them.
        confidence: The level :math:`c`, in (0, 1).
        num_samples: Samples to draw, 1 or more.
        seed: Seed of NumPy's generator.

    Returns:
        Lower and upper end; NaN if any score is.

    Raises:
        ValueError: If an argument is out of range, or a task has no runs.

    Example:
        >>> from experiments.rl import aggregates
        >>> low, high = aggregates.bootstrap_interval([[1.0, 2.0, 3.0, 4.0, 5.0]])
        >>> 1 <= low < 3 < high <= 5
        True
    """
    if not 0 < confidence < 1:
        raise checks.value_error("confidence", confidence, "is outside (0, 1)", "Give 0.95.")
    checks.integer(num_samples, low=1, name="num_samples")
    rng = np.random.default_rng(seed)
    tasks = [np.asarray(task, np.float64) for task in scores]
    if not tasks or not all(map(len, tasks)):
        raise checks.value_error("scores", scores, "has a task without runs", "Leave it out.")
    drawn = [task[rng.integers(len(task), size=(num_samples, len(task)))] for task in tasks]
    means = _means(np.concatenate(drawn, axis=1))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def _means(scores: np.ndarray) -> np.ndarray:
    """Return interquartile means over the last axis."""
    count = scores.shape[-1]
    if not count:
        raise ValueError("scores=() is empty: there is nothing to take a mean of.")
    cut = count // 4
    middle = np.sort(scores, axis=-1)[..., cut : count - cut].mean(axis=-1)
    return np.where(np.isnan(scores).any(axis=-1), np.nan, middle)
