"""The configs of experiments: frozen dataclasses with everything that decides a run's numbers.

Settings that change no network are not part of a config: the folders of runs and data, and how
often a run is logged. The name of a run's folder is :func:`digest` of its config.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from typing import Any, Literal, TypeAlias

__all__ = [
    "WITHOUT_CRITERION",
    "Counts",
    "Criterion",
    "Kernel",
    "Method",
    "Ppo",
    "Spectrum",
    "Start",
    "Times",
    "Train",
    "digest",
    "digest_of",
    "to_dict",
]

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
Method: TypeAlias = Literal["dense", "base", "rescaled", "ai", "eoi", "eis", "sao", "2:4", "blocks"]

WITHOUT_CRITERION: tuple[Method, ...] = ("dense", "sao", "2:4", "blocks")
"""Methods that choose the non-zero weights without a criterion."""

# Fields that configs have not had from the beginning, and that count only if they are not at their
# defaults: the digests of configs without them stay as they were.
_LATER = ("block_size", "optimizer", "perceptrons", "validate_every")


@dataclasses.dataclass(frozen=True)
class Start:
    """The start of one network, with each of a few seeds."""

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
    perceptrons: bool = True
    """Whether the perceptrons beside the heads are pruned; False for the heads alone."""

    data: str = "mnist"
    """Data set, by its name in experiments.data; "made" needs no files."""

    method: Method = "eoi"
    """Start: dense (dense), or sparse by masking (base), by masking and rescaling to the mask's
    fan-in (rescaled), by approximated isometry (ai), by EOI, EIS or SAO, exactly orthogonal with
    two of four consecutive inputs of each output (2:4), or by layers that store only blocks
    (blocks)."""
    criterion: Criterion = "erdos_renyi_kernel"
    """Method that decides the masks, or for EOI and EIS the layer densities; not used by
    :data:`WITHOUT_CRITERION`."""
    density: float = 0.1
    """Fraction of the weights that are kept, in (0, 1]; 1 for dense, 0.5 for 2:4."""
    block_size: int = 0
    """Rows, and columns, of the blocks of method="blocks"; 0 for all others."""
    init: Literal["orthogonal", "fan_in"] = "orthogonal"
    """Dense weights that are masked: orthogonal (convolutions delta-orthogonal), or fan_in: the
    normal distribution that is the network's default, He's or LeCun's."""
    scale: float = 1.0
    """Gain of orthogonal weights."""
    bias_std: float = 0.0
    """Standard deviation of the biases at the start."""
    angles: str = "uniform"
    """Angles of EOI's rotations: "uniform", "hadamard", or degrees such as "80"."""
    planes: Literal["independent", "matching", "banded", "butterfly"] = "independent"
    """Planes of EOI's rotations: independent, perfect matchings in rounds, or drawn inside a
    pattern."""
    taps: Literal["center", "spread", "spread_both"] = "center"
    """Taps of the entries of EOI's convolutions: the center tap, or spread over all taps."""
    he_norm: bool = False
    """Whether EOI's kernels have the Frobenius norm of masked He weights, for layers before a
    normalization, in place of the singular value ``scale``."""
    ai_steps: int = 10_000
    """Steps of approximated isometry."""
    ai_objective: Literal["frobenius", "log_det"] = "frobenius"
    """Objective of approximated isometry: the published one, or the log-determinant."""
    batch_size: int = 128
    """Images of a training step, and of the batches that SNIP and GraSP use."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of everything random, each in [0, 2**31)."""

    def __post_init__(self) -> None:
        _floats(self)
        _require(self, self.ai_steps >= 1, "ai_steps", "[1, ...)")
        _require(self, self.batch_size >= 1, "batch_size", "[1, ...)")
        _require(self, 0 < self.scale < math.inf, "scale", "(0, inf)")
        _require(self, 0 <= self.bias_std < math.inf, "bias_std", "[0, inf)")
        _require(self, 0 < self.density <= 1, "density", "(0, 1]")
        dense, remedy = self.method == "dense", "A dense start keeps all weights: give 1."
        _require(self, not dense or self.density == 1, "density", "{1}", remedy)
        two_of_four, remedy = (
            self.method == "2:4",
            "A 2:4 start keeps half of the weights: give 0.5.",
        )
        _require(self, not two_of_four or self.density == 0.5, "density", "{0.5}", remedy)
        _require_seeds(self, "seeds")
        allowed = "'uniform', 'hadamard' and finite numbers"
        _require(self, _is_angle(self.angles), "angles", allowed, "Give degrees such as '80'.")
        self._require_defaults("planes", "taps", "he_norm", unless="eoi")
        _require_block_size(self)
        some, remedy = (
            self.perceptrons or self.attention,
            "Give attention=True, to prune the heads.",
        )
        _require(self, some, "perceptrons", "{True}", remedy)
        if self.method == "blocks":
            self._require_defaults("init", "attention")

    def _require_defaults(self, *names: str, unless: str = "") -> None:
        """Require the defaults of fields, unless the method is the one that uses others."""
        remedy = f"Others are for method={unless!r}." if unless else "Others are for masks."
        for name in names:
            default = getattr(type(self), name)
            usual = getattr(self, name) == default
            _require(self, usual or self.method == unless, name, f"{{{default!r}}}", remedy)


@dataclasses.dataclass(frozen=True)
class Train(Start):
    """One network, trained from one kind of start with each of a few seeds.

    The seeds are trained at once, under :func:`jax.vmap`: give several for a small network, one
    for a large one.
    """

    dynamic: Literal["static", "set", "rigl"] = "static"
    """Whether the mask is fixed, or changes during training by SET or RigL."""
    epochs: float = 1.0
    """Passes over the training images; may be a fraction."""
    learning_rate: float = 0.01
    """Learning rate, divided by 10 at half and at three quarters of the steps."""
    learning_rates: tuple[float, ...] = ()
    """If given, two or more rates, of which one replaces ``learning_rate``: the first seed is
    trained with each, and all seeds use the rate with the highest validation accuracy over the
    last quarter of the steps."""
    density_power: float = 0.0
    """The updates of each sparse kernel are multiplied by ``density**-density_power``: 1 for
    SμPar."""
    optimizer: Literal["sgd", "adamw"] = "sgd"
    """SGD with Nesterov momentum, or AdamW."""
    momentum: float = 0.9
    """Nesterov momentum of SGD; for AdamW the decay of the mean of gradients."""
    weight_decay: float = 1e-4
    """Weight decay of all parameters; for SGD it is added to the gradient."""
    validate_every: int = 0
    """Steps between two evaluations on validation data, in addition to those at the ends of epochs;
    0 for only these."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self, 0 < self.epochs < math.inf, "epochs", "(0, inf)")
        _require(self, 0 < self.learning_rate < math.inf, "learning_rate", "(0, inf)")
        _require_rates(self)
        _require(self, math.isfinite(self.density_power), "density_power", "finite numbers")
        _require(self, 0 <= self.weight_decay < math.inf, "weight_decay", "[0, inf)")
        _require(self, 0 <= self.momentum < 1, "momentum", "[0, 1)")
        _require(self, self.validate_every >= 0, "validate_every", "[0, ...)")
        if self.method == "blocks":
            self._require_defaults("dynamic", "density_power")


@dataclasses.dataclass(frozen=True)
class Ppo:
    """An actor and a critic, trained by PPO from one kind of start with each of a few seeds.

    The seeds are trained at once, under :func:`jax.vmap`. Only the kernels between a network's
    first layer and its last are sparse.
    """

    experiment: str = "rl"
    """Table or figure that the run belongs to; its folder is named after it."""
    env: Literal[
        "CartPole-v1",
        "Acrobot-v1",
        "Asterix-MinAtar",
        "Breakout-MinAtar",
        "SpaceInvaders-MinAtar",
    ] = "CartPole-v1"
    """Environment, by its name in gymnax."""

    network: Literal["mlp", "simba"] = "mlp"
    """Actor and critic: plain perceptrons, or residual ones with normalization, as in SimBa."""
    width: int = 64
    """Units of a hidden layer, or of the residual stream."""
    depth: int = 2
    """Hidden layers, or residual blocks of two layers each."""
    activation: str | None = None
    """Activation by name; default: tanh of a plain network, ReLU of a residual one."""

    method: Literal["dense", "base", "rescaled", "eoi", "blocks"] = "eoi"
    """Start of the hidden kernels: dense, or sparse by masking (base), by masking and rescaling to
    the mask's fan-in (rescaled), by EOI, or by layers that store only blocks (blocks)."""
    criterion: Literal["uniform", "erdos_renyi"] = "uniform"
    """How the hidden kernels share the density; not used by dense and blocks."""
    density: float = 0.1
    """Fraction of the hidden kernels' weights that are kept, in (0, 1]; 1 for dense."""
    block_size: int = 0
    """Rows, and columns, of the blocks of method="blocks"; 0 for all others."""
    planes: Literal["independent", "matching"] = "independent"
    """Planes of EOI's rotations: independent, or perfect matchings in rounds."""
    scale: float = math.sqrt(2)
    """Gain of the orthogonal weights of all layers but the last."""
    dynamic: Literal["static", "set", "rigl"] = "static"
    """Whether the mask is fixed, or changes during training by SET or RigL."""

    total_steps: int = 500_000
    """Steps of all environments together; steps that do not fill an update are left out."""
    num_envs: int = 4
    """Environments of each seed."""
    num_steps: int = 128
    """Steps of each environment before an update."""
    num_epochs: int = 4
    """Passes over these steps in an update."""
    num_minibatches: int = 4
    """Number of minibatches of a pass; a divisor of the number of steps."""
    learning_rate: float = 2.5e-4
    """Learning rate of Adam at the first update; it falls linearly to 0."""
    learning_rates: tuple[float, ...] = ()
    """If given, two or more rates, of which one replaces ``learning_rate``: the rate with the
    highest mean return of ``rate_seeds`` in the second half of the training."""
    rate_seeds: tuple[int, ...] = (101, 102)
    """Seeds that choose among ``learning_rates``, each in [0, 2**31); best different from
    ``seeds``."""
    discount: float = 0.99
    """Discount of rewards, in [0, 1]."""
    gae_lambda: float = 0.95
    """Decay of the generalized advantage estimate, in [0, 1]."""
    clip: float = 0.2
    """Bound of PPO's clipping: of the change of the probability ratio, and of the change of a
    value."""
    entropy: float = 0.01
    """Weight of the policy's entropy in the loss."""
    value_weight: float = 0.5
    """Weight of the critic's squared error in the loss."""
    max_grad_norm: float = 0.5
    """Norm to which gradients are clipped."""
    num_points: int = 20
    """Points of the learning curve: means over as many equal parts of the training."""
    seeds: tuple[int, ...] = (1,)
    """Seeds of everything random, each in [0, 2**31)."""

    def __post_init__(self) -> None:
        _floats(self)
        for name in ("width", "depth", "num_envs", "num_steps", "num_epochs", "num_points"):
            _require(self, getattr(self, name) >= 1, name, "[1, ...)")
        batch = self.num_envs * self.num_steps
        divides = self.num_minibatches >= 1 and batch % self.num_minibatches == 0
        allowed, remedy = f"the divisors of num_envs * num_steps = {batch}", "Give one of them."
        _require(self, divides, "num_minibatches", allowed, remedy)
        low = batch * self.num_points
        remedy = "There is an update for each of num_points: give more steps, or fewer points."
        _require(self, low <= self.total_steps < 2**31, "total_steps", f"[{low}, 2**31)", remedy)
        for name in ("learning_rate", "scale", "clip", "max_grad_norm"):
            _require(self, 0 < getattr(self, name) < math.inf, name, "(0, inf)")
        for name in ("discount", "gae_lambda"):
            _require(self, 0 <= getattr(self, name) <= 1, name, "[0, 1]")
        for name in ("entropy", "value_weight"):
            _require(self, 0 <= getattr(self, name) < math.inf, name, "[0, inf)")
        _require_seeds(self, "seeds")
        _require_rates(self)
        if self.learning_rates:
            _require_seeds(self, "rate_seeds")
        else:  # one config, whatever seeds stood there
            object.__setattr__(self, "rate_seeds", Ppo.rate_seeds)
        _require(self, 0 < self.density <= 1, "density", "(0, 1]")
        dense, remedy = self.method == "dense", "A dense start keeps all weights: give 1."
        _require(self, not dense or self.density == 1, "density", "{1}", remedy)
        planes, remedy = self.planes == "independent", "Others are for method='eoi'."
        _require(self, planes or self.method == "eoi", "planes", "{'independent'}", remedy)
        blocks, remedy = self.method == "blocks", "Others are for masks."
        masked = not blocks and not dense
        _require(self, masked or self.dynamic == "static", "dynamic", "{'static'}", remedy)
        _require_block_size(self)


@dataclasses.dataclass(frozen=True)
class Spectrum(Start):
    """Singular values of a start's input-output Jacobian on 128 training images."""

    experiment: str = "spectrum"
    """Figure that the run belongs to; its folder is named after it."""


@dataclasses.dataclass(frozen=True)
class Counts:
    """The numbers of all and of kept parameters of a network."""

    experiment: str = "counts"
    """Table that the run belongs to; its folder is named after it."""
    model: str = "resnet32"
    """Network, by its name in experiments.models."""
    num_classes: int = 10
    """Number of logits."""
    attention: bool = False
    """Whether the heads of attention are pruned too, in a network that has them."""
    budget: Literal["uniform", "erdos_renyi", "erdos_renyi_kernel"] = "erdos_renyi_kernel"
    """How the layers share the density."""
    density: float = 0.1
    """Fraction of the weights that are kept, in (0, 1]."""

    def __post_init__(self) -> None:
        _floats(self)
        _require(self, 0 < self.density <= 1, "density", "(0, 1]")


@dataclasses.dataclass(frozen=True)
class Times:
    """Time to draw square matrices of one size, by EOI, SAO, QR and a step of AI."""

    experiment: str = "times"
    """Figure that the run belongs to; its folder is named after it."""
    size: int = 1024
    """Rows and columns."""
    densities: tuple[float, ...] = (0.125,)
    """Fractions of non-zeros, in (0, 1]."""
    repeats: int = 5
    """Runs of each; the median is reported."""

    def __post_init__(self) -> None:
        _floats(self)
        _require(self, self.size >= 2, "size", "[2, ...)")
        _require(self, self.repeats >= 1, "repeats", "[1, ...)")
        in_range = all(0 < density <= 1 for density in self.densities)
        _require(self, in_range, "densities", "(0, 1]", "Give numbers in it.")


@dataclasses.dataclass(frozen=True)
class Kernel:
    """The kernel of one convolution, and its mask."""

    experiment: str = "kernel"
    """Figure that the run belongs to; its folder is named after it."""
    channels: int = 16
    """Inputs, and outputs."""
    taps: int = 3
    """Height, and width."""
    density: float = 0.1
    """Fraction of the weights that are kept, in (0, 1]."""
    seed: int = 0
    """Seed of weights and mask, in [0, 2**31)."""

    def __post_init__(self) -> None:
        _floats(self)
        _require(self, self.channels >= 1, "channels", "[1, ...)")
        _require(self, self.taps >= 1, "taps", "[1, ...)")
        _require(self, 0 < self.density <= 1, "density", "(0, 1]")
        _require(self, 0 <= self.seed < 2**31, "seed", "[0, 2**31)")


def to_dict(config: Any) -> dict[str, Any]:
    """Return a config as a dictionary for JSON, the name of its class under ``"kind"``.

    Args:
        config: A frozen dataclass of numbers, strings and tuples of them.

    Returns:
        A new dictionary, with its keys in the order of the fields. Fields that were added later
        (``block_size``, ``optimizer``, ``perceptrons``, ``validate_every``) are left out if they
        have their default values.

    Example:
        >>> from experiments import config
        >>> fields = config.to_dict(config.Train(seeds=(1, 2)))
        >>> fields["kind"], fields["model"], fields["seeds"]
        ('Train', 'mlp7', [1, 2])
    """
    fields: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    for name in _LATER:
        if name in fields and fields[name] == getattr(type(config), name):
            del fields[name]
    return {"kind": type(config).__name__, **fields}


def digest(config: Any) -> str:
    """Return twelve hexadecimal digits that identify a config.

    They are the first digits of the SHA-256 of its fields in JSON: any change of a field gives
    another digest, and the digest is the same on every machine.

    Args:
        config: A frozen dataclass of numbers, strings and tuples of them.

    Returns:
        The digits.

    Example:
        >>> from experiments import config
        >>> config.digest(config.Train(epochs=1)) == config.digest(config.Train(epochs=1.0))
        True
        >>> config.digest(config.Train(density=0.05)) == config.digest(config.Train())
        False
    """
    return digest_of(to_dict(config))


def digest_of(fields: dict[str, Any]) -> str:
    """Return the digest of the config that :func:`to_dict` turned into these fields."""
    text = json.dumps(fields, sort_keys=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _floats(config: Any) -> None:
    """Make a float of every integer that stands for one: 1 and 1.0 are one config."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.type == "float":
            object.__setattr__(config, field.name, float(value))
        elif field.type == "tuple[float, ...]":
            object.__setattr__(config, field.name, tuple(map(float, value)))


def _is_angle(angles: str) -> bool:
    try:
        return angles in ("uniform", "hadamard") or math.isfinite(float(angles))
    except ValueError:
        return False


def _require_seeds(config: Any, name: str) -> None:
    given = getattr(config, name)
    seeds = {seed for seed in given if 0 <= seed < 2**31}
    allowed, remedy = "the sets of one or more numbers in [0, 2**31)", "Give each seed once."
    _require(config, 0 < len(seeds) == len(given), name, allowed, remedy)


def _require_rates(config: Any) -> None:
    rates = {rate for rate in config.learning_rates if 0 < rate < math.inf}
    several, remedy = len(rates) == len(config.learning_rates) != 1, "Give each rate once."
    _require(config, several, "learning_rates", "() and two or more numbers > 0", remedy)
    if rates:  # one config, whatever rate stood there
        object.__setattr__(config, "learning_rate", config.learning_rates[0])


def _require_block_size(config: Any) -> None:
    size, blocks = config.block_size, config.method == "blocks"
    allowed = "[1, ...)" if blocks else "{0}"
    remedy = "It is for method='blocks', which needs one, such as 128."
    _require(config, size >= 1 if blocks else size == 0, "block_size", allowed, remedy)


def _require(
    config: Any, holds: bool, name: str, allowed: str, remedy: str = "Give a value in it."
) -> None:
    if not holds:
        raise ValueError(f"{name}={getattr(config, name)!r} is outside {allowed}. {remedy}")
