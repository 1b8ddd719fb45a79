"""PPO on gymnax: its estimates against oracles, runs that resume, masks that hold."""

import dataclasses
import importlib.util
import itertools
import json
import math
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats
from helpers import refuses
from hypothesis import given
from hypothesis import strategies as st

from experiments import runs
from experiments.config import Ppo, digest
from experiments.rl import aggregates, diagnostics, environments, networks, ppo, starts, train
from experiments.rl.environments import Transition
from experiments.training import checkpoints, metrics
from experiments.training.starts import count

needs_gymnax = pytest.mark.skipif(
    importlib.util.find_spec("gymnax") is None,
    reason="needs gymnax, of the extra rl: pip install -e '.[rl]'",
)
TINY = Ppo(
    "test",
    width=8,
    depth=3,
    density=0.375,  # counts are whole
    num_envs=2,
    num_steps=8,
    num_epochs=2,
    num_minibatches=2,
    total_steps=1200,  # 300 optimizer steps: RigL acts twice
    num_points=3,
    learning_rate=1e-2,
    seeds=(1, 2),
)
DENSE = {"method": "dense", "density": 1.0}
BLOCKS = {"method": "blocks", "block_size": 2, "density": 0.5}


def runtime(folder, **options):
    return runs.Runtime(runs=str(folder), progress=False, **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Return the folder of TINY's run, carried out without a stop."""
    return runs.execute(TINY, runtime(tmp_path_factory.mktemp("finished")))


def lines(folder):
    return metrics.read(folder / "metrics.jsonl", types=train.TYPES)


# Estimates and scores, against oracles


def advantages_by_sums(found, values, following, discount, gae_lambda):
    """Take the definition: a decayed sum of errors, up to where the episode is over."""
    steps, envs = values.shape
    result = np.zeros((steps, envs))
    for t, env in itertools.product(range(steps), range(envs)):
        weight = 1.0
        for k in range(t, steps):
            ended, cut = found.terminated[k, env], found.truncated[k, env]
            bootstrap = 0.0 if ended else discount * following[k, env]
            result[t, env] += weight * (found.reward[k, env] + bootstrap - values[k, env])
            if ended or cut:
                break
            weight *= discount * gae_lambda
    return result


@pytest.mark.parametrize("decays", [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0)])
def test_advantages_equal_their_definition(decays):
    rng = np.random.default_rng(0)
    reward, values, following = rng.normal(size=(3, 12, 4))
    terminated, truncated = rng.random((2, 12, 4)) < 0.2
    found = Transition(reward, terminated, truncated, None)
    discount, gae_lambda = decays
    result = ppo.generalized_advantages(
        jax.tree.map(jnp.asarray, found),
        jnp.asarray(values),
        jnp.asarray(following),
        discount=discount,
        gae_lambda=gae_lambda,
    )
    expected = advantages_by_sums(found, values, following, discount, gae_lambda)
    np.testing.assert_allclose(result, expected, rtol=1e-5, atol=1e-5)


def test_returns_are_those_of_whole_episodes():
    rng = np.random.default_rng(1)
    reward = rng.normal(size=(20, 3)).astype(np.float32)
    terminated, truncated = rng.random((2, 20, 3)) < 0.15
    begun, expected, under_way = np.array([1.0, 2.0, 3.0], np.float32), [], []
    for env in range(3):
        total = begun[env]
        for t in range(20):
            total += reward[t, env]
            if terminated[t, env] or truncated[t, env]:
                expected.append(total)
                total = 0.0
        under_way.append(total)
    found = jax.tree.map(jnp.asarray, Transition(reward, terminated, truncated, None))
    left, total, episodes = ppo._completed(jnp.asarray(begun), found)
    np.testing.assert_allclose(left, under_way, atol=1e-5)
    np.testing.assert_allclose(total, np.sum(expected), atol=1e-5)
    assert episodes == len(expected) > 3


@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=30))
def test_interquartile_mean_is_scipys_trimmed_mean(scores):
    """rliable takes scipy.stats.trim_mean with a quarter cut at each end."""
    expected = scipy.stats.trim_mean(scores, proportiontocut=0.25)
    assert math.isclose(aggregates.interquartile_mean(scores), expected, abs_tol=1e-9)


def test_bootstrap_intervals_are_those_of_all_samples():
    # Two runs are drawn as (a, a), (a, b), (b, a) or (b, b), and none is cut.
    assert aggregates.bootstrap_interval([[1.0, 3.0]]) == (1.0, 3.0)
    low, high = aggregates.bootstrap_interval([[1.0, 3.0]], confidence=0.4)
    assert (low, high) == (2.0, 2.0)
    # By task: one run of each is drawn as it is. Over both tasks the mean would differ.
    assert aggregates.bootstrap_interval([[1.0], [3.0]]) == (2.0, 2.0)
    # A bootstrapped mean of many runs has about its normal standard error.
    scores = np.random.default_rng(0).normal(size=400)
    low, high = aggregates.bootstrap_interval([scores])
    middle = scipy.stats.norm.ppf(0.75)  # the asymptotic deviation of a trimmed mean
    inner = 0.5 - 2 * middle * scipy.stats.norm.pdf(middle)
    deviation = math.sqrt((inner + 0.5 * middle**2) / 0.25 / 400)
    assert 0.8 < (high - low) / (2 * 1.96 * deviation) < 1.2
    with refuses("confidence", 1.0):
        aggregates.bootstrap_interval([[1.0]], confidence=1.0)
    with refuses("scores", [[1.0], []]):
        aggregates.bootstrap_interval([[1.0], []])


def test_scores_that_are_not_finite_are_not_hidden():
    assert math.isnan(aggregates.interquartile_mean([0.0, 1.0, 2.0, 3.0, math.nan]))
    with pytest.raises(ValueError, match="empty"):
        aggregates.interquartile_mean([])


# Environments and networks


@pytest.mark.slow
@needs_gymnax
def test_an_episode_that_is_cut_is_told_from_one_that_ends():
    env = environments.load("CartPole-v1")
    observation, state = env.reset(jax.random.key(0))
    step = jax.jit(env.step)
    key, action = jax.random.key(1), jnp.int32(0)
    following, _, found = step(key, state, action)
    assert not found.terminated
    assert not found.truncated
    np.testing.assert_array_equal(following, found.final)
    cut, after, found = step(key, dataclasses.replace(state, time=jnp.int32(499)), action)
    assert found.truncated
    assert not found.terminated
    assert after.time == 0
    assert not np.array_equal(cut, found.final)
    fallen, _, found = step(key, dataclasses.replace(state, theta=jnp.float32(1.0)), action)
    assert found.terminated
    assert not found.truncated
    assert found.final[2] > 0.5 > abs(fallen[2])
    assert found.reward.dtype == jnp.float32
    assert observation.shape == (env.observation_size,)


@needs_gymnax
@pytest.mark.parametrize("name", ["Acrobot-v1", "Breakout-MinAtar"])
def test_observations_are_flat(name):
    env = environments.load(name)
    observation, _ = jax.eval_shape(env.reset, jax.random.key(0))
    assert observation.shape == (env.observation_size,)
    assert observation.dtype == jnp.float32


def test_environments_without_gymnax_say_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnax", None)
    with pytest.raises(ImportError, match=r"pip install 'gymnax>=1\.0\.1'"):
        environments.load.__wrapped__("CartPole-v1")


@pytest.mark.slow
@pytest.mark.parametrize("network", ["mlp", "simba"])
def test_starts_are_sparse_between_first_and_last_layer_alone(network):
    config = dataclasses.replace(TINY, network=network, depth=2, method="rescaled")
    model = networks.build(config, 3)
    start = starts.make(config, model, 5, 1)
    sparse = {"mlp": ["linear"], "simba": ["down", "up"] * 2}[network]
    for part in ("actor", "critic"):
        masks = jax.tree_util.tree_leaves_with_path(start.mask[part])
        names = [path[-2].key for path, leaf in masks if leaf.ndim]
        assert names == sparse
        kept = sum(int(leaf.sum()) for _, leaf in masks if leaf.ndim)
        size = sum(leaf.size for _, leaf in masks if leaf.ndim)
        assert kept == 0.375 * size
    gains = [start.variables["params"][part]["last"]["kernel"] for part in ("actor", "critic")]
    for kernel, gain in zip(gains, (0.01, 1.0), strict=True):
        np.testing.assert_allclose(np.linalg.svd(kernel)[1], gain, rtol=1e-5)
    whole = starts.make(dataclasses.replace(config, **DENSE), model, 5, 1)
    assert count(whole)[0] == count(whole)[1] == count(start)[1] > count(start)[0]


@pytest.mark.slow
def test_the_hidden_jacobian_of_linear_layers_is_the_product_of_their_gains():
    """Two orthogonal layers of gain √2: all singular values 2, of EOI and of blocks."""
    for fields in ({}, BLOCKS):
        config = dataclasses.replace(TINY, activation="identity", **fields)
        model = networks.build(config, 3)
        start = starts.make(config, model, 5, 1)
        hidden = jax.jacobian(lambda x: model.apply(start.variables, x, method="actor_hidden"))  # noqa: B023
        values = np.linalg.svd(hidden(jnp.ones(8)))[1]
        np.testing.assert_allclose(values, 2.0, rtol=1e-5)


@pytest.mark.slow
def test_units_without_activation_are_dormant():
    model = networks.build(TINY, 3)
    variables = starts.make(TINY, model, 5, 1).variables
    x = jax.random.normal(jax.random.key(0), (32, 5))
    found = networks.units(model, variables, x)
    assert [layer.shape for layer in found["actor"]] == [(32, 8)] * 3
    assert diagnostics.dormant_fraction(found["actor"]) == 0
    dead = jax.tree.map(jnp.asarray, variables)
    last = dead["params"]["critic"]["layers_1"]["linear"]
    last["kernel"] = last["kernel"].at[:, :6].set(0)
    found = networks.units(model, dead, x)
    assert diagnostics.dormant_fraction(found["critic"]) == np.float32(6 / 24)
    assert diagnostics.dormant_fraction(found["actor"]) == 0


def test_programs_are_shared_by_starts_of_the_same_shapes(monkeypatch):
    monkeypatch.setattr(ppo, "_compiled", lambda config: config)
    found = {
        ppo.compiled(dataclasses.replace(TINY, **fields))
        for fields in (
            *({}, DENSE, {"method": "rescaled", "density": 0.2}, {"planes": "matching"}),
            *({"learning_rate": 0.5}, {"seeds": (7,)}, {"num_points": 1}, {"experiment": "x"}),
        )
    }
    assert len(found) == 1
    for fields in (BLOCKS, {**BLOCKS, "density": 1.0}, {"width": 9}, {"dynamic": "set"}):
        found.add(ppo.compiled(dataclasses.replace(TINY, **fields)))
    assert len(found) == 5


# Runs


def kernels(folder):
    """Return, by network and layer, the weights of a run at its end and their mask."""
    tree = checkpoints.read(folder / "checkpoints").tree
    pairs = zip(
        jax.tree_util.tree_leaves_with_path(tree["params"]),
        jax.tree.leaves(tree["optimizer"]["mask"]),
        strict=True,
    )
    return {
        (path[0].key, path[1].key): (leaf, mask)
        for (path, leaf), mask in pairs
        if mask.ndim > 1  # of dense leaves one boolean a seed
    }


@pytest.mark.slow
@needs_gymnax
@pytest.mark.parametrize("dynamic", ["static", pytest.param("rigl", marks=pytest.mark.slow)])
def test_masks_hold_in_actor_and_critic(dynamic, finished, tmp_path):
    config = dataclasses.replace(TINY, dynamic=dynamic)
    folder = finished if dynamic == "static" else runs.execute(config, runtime(tmp_path))
    found = kernels(folder)
    parts, layers = ("actor", "critic"), ("layers_0", "layers_1")
    assert set(found) == set(itertools.product(parts, layers))
    env = environments.load(config.env)
    model = networks.build(config, env.num_actions)
    for index, seed in enumerate(config.seeds):
        start = starts.make(config, model, env.observation_size, seed)
        for (part, layer), (weights, masks) in found.items():
            before = np.asarray(start.mask[part][layer]["linear"]["kernel"])
            mask, kernel = masks[index], weights[index]
            assert not kernel[~mask].any()
            assert mask.sum() == before.sum() == 0.375 * 64
            assert np.array_equal(mask, before) == (dynamic == "static")
            drawn = np.asarray(start.variables["params"][part][layer]["linear"]["kernel"])
            assert (kernel != drawn)[mask & before].all()


@needs_gymnax
def test_lines_and_results_of_a_run(finished):
    rows = json.loads((finished / "results.json").read_text())
    assert [row["seed"] for row in rows] == [1, 2]
    steps = [step for step in (0, 400, 800, 1200) for _ in rows]
    assert [line["step"] for line in lines(finished)] == steps
    for row in rows:
        of_seed = [line for line in lines(finished) if line["seed"] == row["seed"]]
        assert row["return"] == of_seed[-1]["return"] > 1
        episodes, returns = zip(*((x["episodes"], x["return"]) for x in of_seed[2:]), strict=True)
        assert math.isclose(row["return_of_half"], np.average(returns, weights=episodes))
        assert row["steps"] == 1200
        assert sum(line["episodes"] for line in of_seed) >= 5
        # Returns are of 1 a step, and the last episodes are not over.
        assert sum(line["episodes"] * line["return"] for line in of_seed[1:]) <= 1200
        assert [math.isnan(line["largest"]) for line in of_seed] == [False] * 4
        assert 0 < of_seed[0]["smallest"] <= of_seed[0]["largest"] <= 2 + 1e-5
        assert row["largest_at_start"] == of_seed[0]["largest"] != row["largest"]
        assert all(0 < line["entropy"] <= math.log(2) + 1e-6 for line in of_seed[1:])


@needs_gymnax
def test_a_run_that_was_stopped_ends_as_one_that_was_not(finished, tmp_path, monkeypatch):
    show = metrics.Bar.show

    def stopped(bar, step, *words):
        show(bar, step, *words)
        if step >= 50:  # the second part is logged, and not in a checkpoint
            raise KeyboardInterrupt

    config = TINY
    with monkeypatch.context() as patch:
        patch.setattr(metrics.Bar, "show", stopped)
        with pytest.raises(KeyboardInterrupt, match=r"step 800; .* from step 0"):
            runs.execute(config, runtime(tmp_path / "never"))
        with pytest.raises(KeyboardInterrupt, match=r"step 800; .* from step 400"):
            runs.execute(config, runtime(tmp_path / "each", checkpoint_every=0))
    for name in ("never", "each"):
        folder = runs.execute(config, runtime(tmp_path / name))
        for file in ("metrics.jsonl", "results.json", "checkpoints/1200.safetensors"):
            assert (folder / file).read_bytes() == (finished / file).read_bytes()


@pytest.mark.slow
@needs_gymnax
def test_a_seed_alone_equals_itself_among_others(finished, tmp_path):
    """Up to rounding: products of several seeds' matrices are taken in another order."""
    alone = runs.execute(dataclasses.replace(TINY, seeds=(2,)), runtime(tmp_path))
    among = [line for line in lines(finished) if line["seed"] == 2]
    for one, other in zip(lines(alone), among, strict=True):
        assert one["episodes"] == other["episodes"]
        for name in ("return", "loss", "entropy", "largest"):
            np.testing.assert_allclose(one[name], other[name], rtol=1e-4)


@needs_gymnax
@pytest.mark.slow
def test_blocks_train_like_other_starts(tmp_path):
    config = dataclasses.replace(TINY, **BLOCKS, depth=2)
    folder = runs.execute(config, runtime(tmp_path))
    [row, _] = json.loads((folder / "results.json").read_text())
    tree = checkpoints.read(folder / "checkpoints").tree
    kernel = tree["params"]["actor"]["layers_0"]["linear"]["kernel"]
    assert kernel.size == len(TINY.seeds) * 0.5 * 8 * 8
    assert row["kept"] < row["size"]
    assert np.isfinite([line["loss"] for line in lines(folder)[2:]]).all()


@needs_gymnax
def test_the_best_of_several_rates_is_chosen_by_other_seeds(finished, tmp_path):
    config = dataclasses.replace(TINY, learning_rates=(1e-2, 1e-9), rate_seeds=(3, 4))
    folder = runs.execute(config, runtime(tmp_path))
    rows = json.loads((folder / "results.json").read_text())
    chosen = rows[0]["learning_rate"]
    tried = {float(rate): score for rate, score in rows[0]["tried"].items()}
    assert set(tried) == set(config.learning_rates)
    assert tried[chosen] == max(tried.values())
    one = dataclasses.replace(TINY, learning_rate=chosen)
    same = tmp_path / "test" / digest(one)
    assert (folder / "metrics.jsonl").read_bytes() == (same / "metrics.jsonl").read_bytes()
    for rate in config.learning_rates:
        trial = (
            tmp_path / "test" / digest(dataclasses.replace(one, learning_rate=rate, seeds=(3, 4)))
        )
        returns = [
            row["return_of_half"] for row in json.loads((trial / "results.json").read_text())
        ]
        assert tried[rate] == np.mean(returns)
    if chosen == TINY.learning_rate:
        assert (same / "metrics.jsonl").read_bytes() == (finished / "metrics.jsonl").read_bytes()


def test_rates_without_an_episode_to_compare_are_an_error(tmp_path, monkeypatch):
    config = dataclasses.replace(TINY, learning_rates=(1e-2, 1e-3))
    monkeypatch.setattr(train, "execute", lambda config, runtime: tmp_path)
    (tmp_path / "results.json").write_text('[{"return_of_half": NaN}]')
    with refuses("total_steps", "total_steps=1200", "learning_rates=(0.01, 0.001)"):
        train._run_best_rate(config, tmp_path, runtime(tmp_path))


@needs_gymnax
def test_the_command_trains_and_sums_up_in_a_line(tmp_path, capsys):
    sizes = {"width": 8, "depth": 3, "num-envs": 2, "num-steps": 8, "num-epochs": 2}
    more = {"num-minibatches": 2, "total-steps": 1200, "num-points": 3, "density": 0.375}
    options = [f"--{name}={value}" for name, value in {**sizes, **more}.items()]
    seeds = ["--seeds", "1", "2"]
    train.main([*options, *seeds, "--runs", str(tmp_path), "--no-progress"])
    line, folder = capsys.readouterr().out.splitlines()
    assert line.startswith("return ")
    assert "interquartile mean of 2 seeds" in line
    assert str(tmp_path) in folder


@pytest.mark.parametrize(
    ("field", "value", "others"),
    [
        ("width", 0, {}),
        ("num_minibatches", 3, {}),
        ("total_steps", 16, {}),
        ("discount", 1.5, {}),
        ("learning_rate", 0.0, {}),
        ("learning_rates", (0.1,), {}),
        ("seeds", (1, 1), {}),
        ("rate_seeds", (), {"learning_rates": (0.1, 0.2)}),
        ("density", 0.5, {"method": "dense"}),
        ("planes", "matching", {"method": "base"}),
        ("dynamic", "rigl", DENSE),
        ("block_size", 2, {}),
    ],
)
def test_bad_settings_are_named(field, value, others):
    with refuses(field, value):
        dataclasses.replace(TINY, **{**others, field: value})
