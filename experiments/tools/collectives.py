"""Count the collectives of a compiled program: what its devices send to each other.

XLA writes a program with one instruction in each line. An asynchronous collective has two
instructions, a start and a done, and is counted at the latter.
"""

from __future__ import annotations

import dataclasses
import math
import re

__all__ = ["KINDS", "Collective", "collectives"]

KINDS = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
"""The operations between devices, by XLA's names."""

_CALL = re.compile(
    rf"^\s*(?:ROOT )?%?[\w.-]+ = (\(.*?\)|\S+) ({'|'.join(KINDS)})(?:-done)?\(", re.MULTILINE
)
_ARRAY = re.compile(r"\b(pred|(?:bf|[sufc])(\d+)\w*)\[([\d,]*)\]")


@dataclasses.dataclass(frozen=True)
class Collective:
    """All operations of one kind.

    Attributes:
        count: How many instructions of the program; one in a loop counts once.
        bytes: Their results on one device, in all.
    """

    count: int
    bytes: int


def collectives(text: str) -> dict[str, Collective]:
    """Count the collectives of a compiled program.

    Args:
        text: The program of one device, as ``jax.jit(...).lower(...).compile().as_text()`` writes
            it.

    Returns:
        What there is of each kind that occurs, in the order of :data:`KINDS`.

    Example:
        >>> from experiments.tools.collectives import collectives
        >>> collectives("%sum = f32[4,2]{1,0} all-reduce(%x), to_apply=%add")
        {'all-reduce': Collective(count=1, bytes=32)}
    """
    found: dict[str, list[int]] = {}
    for result, kind in _CALL.findall(text):
        found.setdefault(kind, []).append(sum(map(_num_bytes, _ARRAY.findall(result))))
    return {kind: Collective(len(found[kind]), sum(found[kind])) for kind in KINDS if kind in found}


def _num_bytes(array: tuple[str, str, str]) -> int:
    """Return the bytes of an array of a type, its bits and its shape; a truth value takes one."""
    _, bits, shape = array
    return math.ceil(math.prod(int(n) for n in shape.split(",") if n) * int(bits or 8) / 8)
