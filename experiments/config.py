"""What one experiment does, as a frozen dataclass: all that decides its numbers, nothing else.

Where a run is written, where data lies and how often it is logged are no part of it: they change
no number. The name of a run's folder is :func:`digest` of its config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Literal, TypeAlias

__all__ = ["Criterion", "Method", "Train", "digest", "to_dict"]

Criterion: TypeAlias = Literal[
    "uniform",
    "erdos_renyi",
    "erdos_renyi_kernel",
    "magnitude",
    "random",
    "snip",
    "grasp",
    "synflow",
]
Method: TypeAlias = Literal["dense", "base", "ai", "eoi", "eis", "sao"]


@dataclasses.dataclass(frozen=True)
class Train:
    """One network, trained from one kind of start with each of a few seeds.

    The seeds are trained at once, under :func:`jax.vmap`: give several for a small network, one
    for a large one.
    """

    experiment: str = "train"
    """Table or figure that the run belongs to; its folder is named after it."""

    model: str = "mlp7"
    """Network, by its name in experiments.models."""
    activation: str | None = None
    """Activation by name; default: the network's own."""
    depth: int | None = None
    """Layers; default: the network's own."""
    width: int | None = None
    """Units of a hidden layer, or channels of the first stage; default: the network's own."""

    attention: bool = False
    """Whether the heads of attention are pruned too, in a network that has them."""

    data: str = "mnist"
    """Data set, by its name in experiments.data; "made" needs no files."""

    method: Method = "eoi"
    """Start: dense, or sparse by masking (base), approximated isometry (ai), EOI, EIS or SAO."""
    criterion: Criterion = "erdos_renyi_kernel"
    """Where masks, or for EOI and EIS layer densities, come from. Dense and SAO have none."""
    density: float = 0.1
    """Fraction of the weights that are kept, in (0, 1]; 1 for dense."""
    init: Literal["orthogonal", "fan_in"] = "orthogonal"
    """Dense weights that are masked: orthogonal (convolutions delta-orthogonal), or the normal
    ones of the network's default, He's or LeCun's."""
    scale: float = 1.0
    """Gain of orthogonal weights."""
    bias_std: float = 0.0
    """Standard deviation of the biases at the start."""
    angles: str = "uniform"
    """Angles of EOI's rotations: "uniform", or degrees such as "80"."""
    ai_steps: int = 10_000
    """Steps of approximated isometry."""
    ai_objective: Literal["frobenius", "log_det"] = "frobenius"
    """Its objective: the published one, or the log-determinant."""
    dynamic: Literal["static", "set", "rigl"] = "static"
    """Whether the mask stays, or changes while the network trains by SET or RigL."""

    epochs: float = 1.0
    """Passes over the training images; may be a fraction."""
    batch_size: int = 128
    """Images of a step."""
    learning_rate: float = 0.01
    """Learning rate, divided by 10 at half and at three quarters of the steps."""
    momentum: float = 0.9
    """Nesterov momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters, added to the gradient."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of everything random, each in [0, 2**31)."""

    def __post_init__(self) -> None:
        for name, low in {"batch_size": 1, "ai_steps": 1}.items():
            if getattr(self, name) < low:
                raise _fail(self, name, f"[{low}, ...)")
        for name in ("epochs", "learning_rate", "scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise _fail(self, name, "(0, inf)")
        for name in ("bias_std", "weight_decay"):
            if not 0 <= getattr(self, name) < math.inf:
                raise _fail(self, name, "[0, inf)")
        if not 0 <= self.momentum < 1:
            raise _fail(self, "momentum", "[0, 1)")
        if not 0 < self.density <= 1:
            raise _fail(self, "density", "(0, 1]")
        if self.method == "dense" and self.density != 1:
            raise _fail(self, "density", "{1}, what a dense start has", "Give method another name.")
        if not self.seeds or not all(0 <= seed < 2**31 for seed in self.seeds):
            raise _fail(self, "seeds", "the non-empty tuples of numbers in [0, 2**31)")
        if len(set(self.seeds)) < len(self.seeds):
            raise _fail(self, "seeds", "the tuples without repetition")
        if self.angles != "uniform":
            try:
                degrees = float(self.angles)
            except ValueError:
                degrees = math.nan
            if not math.isfinite(degrees):
                raise _fail(self, "angles", "{'uniform'} and degrees such as '80'")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as a dictionary for JSON, the name of its class under ``"kind"``.

    Args:
        config: a frozen dataclass of numbers, strings and tuples of them.

    Returns:
        A new dictionary, its keys in the order of the fields.

    Example:
        >>> from experiments import config
        >>> own = config.to_dict(config.Train(seeds=(1, 2)))
        >>> own["kind"], own["model"], own["seeds"]
        ('Train', 'mlp7', [1, 2])
    """
    own: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return {"kind": type(config).__name__, **own}


def digest(config: Any) -> str:
    """Return twelve hexadecimal digits that stand for a config.

    They are those of SHA-256 of its fields in JSON: another value of any field gives another name,
    on every machine the same.

    Args:
        config: a frozen dataclass of numbers, strings and tuples of them.

    Returns:
        The digits.

    Example:
        >>> from experiments import config
        >>> config.digest(config.Train()) == config.digest(config.Train())
        True
        >>> config.digest(config.Train(density=0.05)) == config.digest(config.Train())
        False
    """
    text = json.dumps(to_dict(config), sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _fail(config: Train, name: str, allowed: str, remedy: str = "") -> ValueError:
    value = getattr(config, name)
    return ValueError(f"{name}={value!r} is outside {allowed}. {remedy or 'Give a value in it.'}")
