"""Angle laws: the spectrum of a start with constant angles, compared with uniform ones.

A reader of the paper asked which angles are better, with figures. Appendix G trains with two
constant angles; this experiment measures seven at the start. At 90 degrees every rotation is a
transposition: the matrix stays a signed permutation, and no density above one non-zero in each row
is reached.

Command: python -m experiments sweep angle_laws
Hardware: two CPU cores. Time: minutes.
Expected: singular values of a linear network are 1 for every law; with tanh, small angles keep the
matrix close to the identity.
"""

from __future__ import annotations

from experiments.config import Spectrum
from experiments.reporting.grids import NAMES, Items, Rows, product
from experiments.reporting.tables import Table, Value

ANGLES = ("uniform", "1", "10", "30", "45", "60", "80")


def get_config() -> Spectrum:
    """Return MLP-7 with uniform angles."""
    return Spectrum(experiment="angle_laws", activation="tanh", seeds=(1, 2, 3, 4, 5))


def sweep() -> list[Spectrum]:
    """Return all laws, densities and two activations."""
    return product(
        get_config(), activation=("identity", "tanh"), density=(0.05, 0.1, 0.3), angles=ANGLES
    )


def quick() -> list[Spectrum]:
    """Return a small perceptron with angles of 45 degrees, on synthetic data."""
    start = Spectrum(experiment="angle_laws", data="made", depth=3, width=20, density=0.3)
    return product(start, angles=("45",))


def report(rows: Rows) -> Items:
    """Tabulate mean, least and largest singular values with an activation."""
    linear = [row for row in rows if row["activation"] == "identity" and "spectrum_min" in row]
    ends = [abs(row[f"spectrum_{end}"] - 1) for row in linear for end in ("min", "max")]
    law = f" Without an activation every value is 1 to {max(ends):.0e}." if ends else ""
    table = Table(
        "angle_laws",
        "Angles of the rotations and the spectrum at the start",
        "MLP-7 at the start, EOI on ERK densities, 128 MNIST images, seeds 1 to 5." + law,
        [row for row in rows if row["activation"] != "identity"],
        (
            Value("spectrum_mean", "mean", fmt=".3f"),
            Value("spectrum_min", "smallest", fmt=".3f"),
            Value("spectrum_max", "largest", fmt=".3f"),
        ),
        ("activation", "density", "angles"),
        names={**NAMES, **{angle: f"{angle}°" for angle in ANGLES[1:]}},
    )
    return [table]
