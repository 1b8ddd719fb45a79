"""Deep reinforcement learning with SBX: it builds its optimizers before it has parameters.

The extra ``rl`` installs SBX. Kernels and optimizer are sparse by two independent lines, the
initializer of the layers and the optimizer's class.
"""

import functools
import re
from pathlib import Path

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest

import eoi_jax as eoi

sbx = pytest.importorskip("sbx", reason="needs the extra rl: pip install -e '.[rl]'")
gymnasium = pytest.importorskip("gymnasium")

# SBX and what it builds on warn of their own affairs.
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]
DENSITY = 0.4


def sparse_adam(learning_rate):
    return eoi.static_sparse(optax.adam(learning_rate), eoi.masks.support)


def sparse_rigl(learning_rate):
    return eoi.rigl(optax.adam(learning_rate), eoi.masks.support, update_every=3)


def networks(model, *, targets):
    """Name each network: its parameters, and the mask in the state of its optimizer."""
    policy, found = model.policy, {}
    for name in ("actor_state", "vf_state", "qf_state"):
        if (state := getattr(policy, name, None)) is not None:
            mask = optax.tree.get(state.opt_state, "mask")
            found[name] = state.params, mask
            if targets and hasattr(state, "target_params"):
                found[f"target of {name}"] = state.target_params, mask
    return found


def check(model, counts, *, targets=True):
    """Require zeros off every mask, and of each kernel as many weights as at the start."""
    for name, (params, mask) in networks(model, targets=targets).items():
        kernels = 0
        for leaf, leaf_mask in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
            if np.ndim(leaf_mask):
                kernels += 1
                assert not np.asarray(leaf)[~np.asarray(leaf_mask)].any(), name
        assert kernels >= 2, name
        assert [int(np.sum(m)) for m in jax.tree.leaves(mask)] == counts[name], name


def counts_of(model):
    found = networks(model, targets=True)
    return {
        name: [int(np.sum(leaf)) for leaf in jax.tree.leaves(mask)]
        for name, (_, mask) in found.items()
    }


@pytest.fixture
def sparse_layers(monkeypatch):
    monkeypatch.setattr(
        nn, "Dense", functools.partial(nn.Dense, kernel_init=eoi.dense(density=DENSITY))
    )


@pytest.mark.parametrize("optimizer", [sparse_adam, sparse_rigl])
@pytest.mark.parametrize(
    ("name", "environment", "options"),
    [
        ("PPO", "CartPole-v1", {"n_steps": 16, "batch_size": 8, "n_epochs": 2}),
        ("SAC", "Pendulum-v1", {"learning_starts": 8, "batch_size": 8, "gradient_steps": 1}),
    ],
)
@pytest.mark.usefixtures("sparse_layers")
def test_masks_hold_through_learning_and_files(tmp_path, name, environment, options, optimizer):
    kind = getattr(sbx, name)
    policy = {"net_arch": [16, 16], "optimizer_class": optimizer}
    model = kind("MlpPolicy", environment, policy_kwargs=policy, seed=0, device="cpu", **options)
    counts = counts_of(model)
    before = jax.tree.map(np.array, networks(model, targets=True))
    # The weights of a target follow those of its network, and have left a mask that moved late.
    targets = optimizer is sparse_adam
    check(model, counts)
    model.learn(40)
    check(model, counts, targets=targets)
    for network, (params, _) in networks(model, targets=True).items():
        moved = jax.tree.map(lambda old, new: (old != new).any(), before[network][0], params)
        assert all(jax.tree.leaves(moved)), network

    model.save(tmp_path / "model")
    loaded = kind.load(tmp_path / "model", env=gymnasium.make(environment), device="cpu")
    check(loaded, counts, targets=targets)
    saved = networks(model, targets=True)
    for network, (params, mask) in networks(loaded, targets=True).items():
        jax.tree.map(np.testing.assert_array_equal, params, saved[network][0])
        jax.tree.map(np.testing.assert_array_equal, mask, saved[network][1])
    loaded.learn(40)
    check(loaded, counts, targets=targets)


def test_the_recipe_of_the_documentation_trains_sparse_networks(capsys):
    """First and last layers are dense, and of the hidden kernels a quarter is left."""
    page = Path(__file__).resolve().parent.parent / "docs/how-to/reinforcement_learning.md"
    [block] = re.findall(r"```python\n(.*?)```", page.read_text(), re.DOTALL)
    names, dense = {}, nn.Dense
    exec(compile(block, page.name, "exec"), names)
    assert nn.Dense is dense
    assert capsys.readouterr().out.count("of the weights") == 4
    for model in (names["ppo"], names["sac"]):
        check(model, counts_of(model))
        for params, mask in networks(model, targets=True).values():
            for leaf, leaf_mask in zip(jax.tree.leaves(params), jax.tree.leaves(mask), strict=True):
                hidden = leaf.ndim > 1 and min(leaf.shape[-2:]) >= 32
                density = np.mean(leaf_mask)
                assert abs(density - 0.25) < 0.05 if hidden else density == 1
