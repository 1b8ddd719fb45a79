"""Mutation testing of the core: change one operator or number at a time and see a test fail.

Not part of ``make test``: a sample of 84 takes about half an hour on two cores. It needs
cosmic-ray, and **changes files in place**, so run it in a clone of its own::

    pip install cosmic-ray
    python tests/mutants.py --count 84 --seed 16 --shard 0/2

It prints each mutant that no test has noticed. Those that change nothing that can be told (another
of two equal bounds, the size of a block) are equivalent and no fault of the tests.
"""

from __future__ import annotations

import argparse
import ast
import random
import sys
import tempfile
from pathlib import Path

from cosmic_ray.commands.init import init
from cosmic_ray.mutating import mutate_and_test
from cosmic_ray.work_db import WorkDB, use_db
from cosmic_ray.work_item import MutationSpec, TestOutcome

# The tests of a module, quickest to notice first.
TESTS = {
    "givens.py": "reproducible givens keys sparse_orthogonal",
    "rotation.py": "rotation",
    "sparse_orthogonal.py": "reproducible sparse_orthogonal initializers keys",
    "theory.py": "theory sparse_orthogonal",
    "masks.py": "reproducible masks keys metadata arrays",
    "budgets.py": "budgets networks",
    "criteria/scores.py": "criteria",
    "criteria/synflow.py": "criteria",
    "criteria/iterative.py": "criteria",
    "optim.py": "optim masked_state metadata",
    "dynamic.py": "reproducible dynamic keys",
    "_internal/selection.py": "selection masks dynamic",
    "_internal/waves.py": "givens rotation sparse_orthogonal",
    "_internal/drawing.py": "reproducible sparse_orthogonal networks",
    "_internal/masked_state.py": "masked_state optim",
    "_internal/keys.py": "keys",
    "_internal/conv.py": "initializers networks",
    "networks/exact.py": "reproducible networks",
}


def mutations() -> list[list[MutationSpec]]:
    """List the mutations of each place, except of annotations, which are not evaluated."""
    paths = [Path("eoi_jax", name) for name in TESTS]
    with (
        tempfile.TemporaryDirectory() as folder,
        use_db(str(Path(folder, "session")), WorkDB.Mode.create) as database,
    ):
        init(paths, database, {})
        items = list(database.work_items)
    annotations = {path: annotated(path) for path in paths}
    places: dict[tuple[str, int, int], list[MutationSpec]] = {}
    for item in items:
        [mutation] = item.mutations
        if mutation.start_pos not in annotations[mutation.module_path]:
            place = (str(mutation.module_path), *mutation.start_pos)
            places.setdefault(place, []).append(mutation)
    return [
        sorted(places[place], key=lambda m: (m.operator_name, m.occurrence))
        for place in sorted(places)
    ]


def annotated(path: Path) -> set[tuple[int, int]]:
    """List the positions within the annotations of a file."""
    places: set[tuple[int, int]] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        for name in ("annotation", "returns"):
            part = getattr(node, name, None)
            if part is not None:
                lines = range(part.lineno, part.end_lineno + 1)
                places |= {(line, column) for line in lines for column in range(101)}
    return places


def main() -> None:
    """Sample, mutate, test, and print what survived."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=84)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shard", default="0/1", help="i/n: of n processes, each in its clone")
    parser.add_argument("--python", default=sys.executable, help="interpreter of the tests")
    options = parser.parse_args()
    index, number = map(int, options.shard.split("/"))
    chance = random.Random(options.seed)
    places = chance.sample(mutations(), options.count)
    sample = [chance.choice(place) for place in places][index::number]
    survived = 0
    for mutation in sample:
        tests = TESTS[str(mutation.module_path.relative_to("eoi_jax"))].split()
        files = " ".join(f"tests/test_{name}.py" for name in tests)
        command = f"{options.python} -m pytest -x -q -p no:cacheprovider -p no:xdist {files}"
        result = mutate_and_test([mutation], command, 600)
        where = f"{mutation.module_path}:{mutation.start_pos[0]} {mutation.operator_name}"
        if result.test_outcome not in (TestOutcome.SURVIVED, TestOutcome.KILLED):
            raise RuntimeError(f"{where}: {result.output}")
        is_alive = result.test_outcome == TestOutcome.SURVIVED
        survived += is_alive
        print("ALIVE " if is_alive else "killed", where, flush=True)
        if is_alive:
            print(result.diff, flush=True)
    print(f"{len(sample) - survived} of {len(sample)} killed")


if __name__ == "__main__":
    main()
