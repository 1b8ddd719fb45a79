"""Free multiplicative powers of a law: the eigenvalues of products of many free matrices.

If ``x = w (w - 1 / G(w))^(L-1)`` with the Cauchy transform ``G`` of a law on [0, ∞), then the law's
``L``-th free power has ``x G_L(x) = w G(w)``. One angle on each half circle of ``w``, the root of a
monotone function, makes ``x`` real, so every point of the spectrum is found within a bracket.
"""

from __future__ import annotations

import math
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from scipy.optimize.elementwise import find_root

__all__ = ["power"]

Floats: TypeAlias = NDArray[np.float64]


def power(center: Floats, half: Floats, mass: Floats, depth: int) -> tuple[Floats, Floats, Floats]:
    """Free multiplicative power of a law of mean 1 that is made of uniform pieces.

    Returns rows of log x, density of log x and mass below x without atoms; atoms; their masses.
    """
    deviation = math.sqrt(mass @ ((center - 1) ** 2 + half**2 / 3))
    atoms, index = np.unique(center[half == 0], return_inverse=True)
    masses = np.bincount(index, mass[half == 0], atoms.size).astype(float)
    masses = np.where(atoms > 0, 1 - depth * (1 - masses), masses)
    atoms, masses = atoms[masses > 1e-12], masses[masses > 1e-12]
    if deviation < 1e-10:  # one value, as float64 goes
        atoms, masses = np.ones(1), np.ones(1)
    if masses.sum() > 1 - 1e-6:
        return np.empty((3, 0)), atoms**depth, masses

    # The ends of the spectrum are around values of the law, further away with depth.
    low, high, reach = center[center > 0].min(), center.max(), math.log(1e4 * depth)
    offsets = np.geomspace(deviation / 100, reach, 40)
    marks = np.log([low, high, 1.0, *atoms[atoms > 0]])[:, None] + np.append(offsets, -offsets)
    bottom = math.log(low) - (30 if 0 in atoms else reach)
    new = np.append(marks, np.linspace(bottom, marks.max(), 150))
    law, table = (center, half, mass, np.array(1e-8 * min(1.0, deviation))), np.empty((4, 0))
    for count in (100, 100, 200, 0):
        table = np.append(table, _on_real_axis(law, depth, np.unique(new)), axis=1)
        log_r, log_x, above, density = table = table[:, np.argsort(table[0])]
        below = 1 - above - (masses * (atoms < np.exp(log_r)[:, None])).sum(1)
        below = np.maximum.accumulate(below).clip(0, 1 - masses.sum())
        t = (np.arange(count) + 0.5) / max(count, 1)  # more points where the mass ends
        new = np.interp(below[-1] * t**3 * (10 - 15 * t + 6 * t**2), below, log_r)
        edges = np.flatnonzero(np.diff(density > 1e-8))
        new = np.append(new, np.linspace(log_r[edges], log_r[edges + 1], 22)[1:-1])
    first, *_, last = np.flatnonzero(density > 1e-8)
    return np.stack([log_x, density, below])[:, first : last + 1], atoms**depth, masses


def _on_real_axis(law: tuple[Floats, ...], depth: int, log_r: Floats) -> Floats:
    """For radii of w: log r, log x, mass above x, density of log x (0 outside the spectrum)."""
    center, half, mass, least = law

    def transform(angle: Floats, log_r: Floats) -> Any:
        w = np.exp(log_r + 1j * angle)
        v = w[:, None] - center
        y, near = half / v, np.abs(v) < 10 * half
        y2 = np.where(near, 0, y) ** 2
        ratio = 1 + y2 * (1 / 3 + y2 * (1 / 5 + y2 * (1 / 7 + y2 * (1 / 9 + y2 / 11))))
        ratio[near] = np.arctanh(y[near]) / y[near]
        g = (mass * ratio / v).sum(1)
        return v, y, ratio, w * g, w - 1 / g

    def excess(log_angle: Floats, log_r: Floats) -> Floats:
        f = transform(np.exp(log_angle), log_r)[-1]
        # Rounding may lift a negative f above the axis that it is on or below: hence the abs.
        return np.exp(log_angle) - (depth - 1) * np.arctan2(np.abs(f.imag), f.real)

    found = find_root(excess, (math.log(least), math.log(math.pi)), args=(log_r,))
    low = np.where(found.status == -1, least, np.exp(found.x))  # no root: outside the spectrum
    v, y, ratio, wg, f = transform(low, log_r)
    spread = (mass * (np.log(v) + np.log(1 - y**2) / 2 + ratio).imag).sum(1) - low
    above = depth * spread - (depth - 1) * np.arctan2(np.abs(wg.imag), wg.real)
    density = np.where((low > least) | (depth == 1), -wg.imag, 0.0)
    log_x = log_r + (depth - 1) * np.log(np.abs(f))
    return np.stack([log_r, log_x, above / math.pi, density / math.pi])
