"""Proximal policy optimization as one compiled program, of several seeds at once.

The settings and the loss are those of PureJaxRL's PPO, with one difference. Where an episode is cut
at the time limit, the value of the last observation replaces the rewards that would have followed,
as in Pardo et al. In PureJaxRL such an episode counts as terminated.

References:
    Schulman et al., "Proximal Policy Optimization Algorithms", 2017, arXiv:1707.06347.

    Lu et al., "Discovered Policy Optimisation", NeurIPS 2022 (PureJaxRL).

    Pardo et al., "Time Limits in Reinforcement Learning", ICML 2018.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from eoi_jax.typing import Array, Mask, Params
from experiments.config import Ppo
from experiments.rl import environments, networks
from experiments.rl.environments import Environment, Transition
from experiments.rl.networks import ActorCritic
from experiments.training import loops, steps

__all__ = [
    "Batch",
    "State",
    "StepFns",
    "Sums",
    "compiled",
    "generalized_advantages",
    "rollout",
]

# Fields that the compiled functions depend on. Runs that differ in others share them.
_FIELDS = (
    *("env", "network", "width", "depth", "activation", "scale", "dynamic"),
    *("total_steps", "num_envs", "num_steps", "num_epochs", "num_minibatches", "discount"),
    *("gae_lambda", "clip", "entropy", "value_weight", "max_grad_norm"),
)
_ACTIONS, _ORDER, _RESET = range(100, 103)  # beside the purposes of experiments.training.keys


class State(NamedTuple):
    """Everything that changes while a seed trains; stacked for several seeds.

    Attributes:
        key: Integers of the seed's key, uint32.
        params: Parameters of actor and critic.
        others: Their other collections, such as the pattern of blocks.
        optimizer: State of the optimizer, with the mask.
        env: States of the environments.
        observations: What they show, ``(num_envs, size)``.
        returns: Sums of the rewards of the episodes that are under way, ``(num_envs,)``.
    """

    key: Array
    params: Params
    others: dict[str, Any]
    optimizer: Any
    env: Any
    observations: Array
    returns: Array


class Sums(NamedTuple):
    """Sums over some updates, for each seed.

    Attributes:
        returns: Undiscounted returns of the episodes that were completed.
        episodes: Their number.
        loss: Mean losses of the updates.
        entropy: Mean entropies of the policy, in nats.
        finite: Whether all losses were finite.
    """

    returns: Array
    episodes: Array
    loss: Array
    entropy: Array
    finite: Array


class Batch(NamedTuple):
    """The inputs of the loss from some steps, with any leading axes.

    Attributes:
        observations: Before the steps.
        actions: What was done.
        log_probs: The actions' log-probabilities at that time.
        values: The observations' values at that time.
        advantages: How much better the actions were than the policy's mean.
    """

    observations: Array
    actions: Array
    log_probs: Array
    values: Array
    advantages: Array


class StepFns(NamedTuple):
    """The compiled functions of training, of several stacked seeds.

    Attributes:
        model: Actor and critic.
        env: The environment.
        begin: ``(key, variables, mask) -> State`` of one seed.
        stack: Puts the states of seeds into one.
        advance: ``(state, learning_rate, first, stop) -> (state, Sums)``: the updates from number
            ``first`` up to ``stop``, the latter excluded. The state passed is used up.
        num_updates: Updates in all.
    """

    model: ActorCritic
    env: Environment
    begin: Callable[..., State]
    stack: Callable[[list[State]], State]
    advance: Callable[..., tuple[State, Sums]]
    num_updates: int


def compiled(config: Ppo) -> StepFns:
    """Return the functions of a config; configs that need the same ones share them."""
    more = ("method", "density", "block_size") if config.method == "blocks" else ()
    fields = {name: getattr(config, name) for name in (*_FIELDS, *more)}
    return _compiled(Ppo(num_points=1, **fields))


@functools.lru_cache(maxsize=8)
def _compiled(config: Ppo) -> StepFns:
    env = environments.load(config.env)
    model = networks.build(config, env.num_actions)
    num_updates = config.total_steps // (config.num_envs * config.num_steps)
    dynamic = config.dynamic != "static"
    update = _update(config, model, env, num_updates)
    axes = _axes(dynamic=dynamic)
    of_all = jax.vmap(update, (axes, None, None), (axes, 0))  # type: ignore[arg-type]

    def advance(state: State, learning_rate: Any, first: Any, stop: Any) -> tuple[State, Sums]:
        def body(number: Array, carry: tuple[State, Sums]) -> tuple[State, Sums]:
            state, sums = carry
            state, new = of_all(state, learning_rate, number)
            added = jax.tree.map(jnp.add, sums, new)
            return state, added._replace(finite=sums.finite & new.finite)

        zero = jnp.zeros(len(state.key))
        nothing = Sums(zero, zero, zero, zero, zero == 0)
        return jax.lax.fori_loop(first, stop, body, (state, nothing))

    def begin(key: Array, variables: dict[str, Any], mask: Mask) -> State:
        others = {name: value for name, value in variables.items() if name != "params"}
        params = variables["params"]
        tx = _optimizer(config, mask, key, 0.0, num_updates)
        keys = jax.random.split(jax.random.fold_in(key, _RESET), config.num_envs)
        observations, states = jax.vmap(env.reset)(keys)
        zeros = jnp.zeros(config.num_envs)
        state = State(
            jax.random.key_data(key), params, others, tx.init(params), states, observations, zeros
        )
        # Python's numbers in a state would be weak, and a second program follow the first.
        return jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.asarray(leaf).dtype), state)

    def stack(states: list[State]) -> State:
        return jax.device_put(loops.stack_all(states), jax.local_devices()[0])

    stepped = jax.jit(advance, donate_argnums=0)
    return StepFns(model, env, jax.jit(begin), stack, stepped, num_updates)


def _axes(*, dynamic: bool) -> State:
    """Return the axes of seeds in a stacked state, as :func:`jax.vmap` takes them."""
    axes: Any = 0
    optimizer = loops.optimizer_axes(dynamic=dynamic)
    return State(axes, axes, axes, optimizer, axes, axes, axes)


def _optimizer(
    config: Ppo, mask: Mask, key: Array, learning_rate: Any, num_updates: int
) -> optax.GradientTransformationExtraArgs:
    """Return Adam with clipped gradients, outermost the rule for the mask."""
    inner = optax.chain(
        optax.clip_by_global_norm(config.max_grad_norm), optax.adam(learning_rate, eps=1e-5)
    )
    num_steps = num_updates * config.num_epochs * config.num_minibatches
    dynamic = config.dynamic
    return steps.under_mask(inner, mask, key=key, num_steps=num_steps, dynamic=dynamic)


def _update(
    config: Ppo, model: Any, env: Environment, num_updates: int
) -> Callable[[State, Any, Any], tuple[State, Sums]]:
    """Return one update of one seed: steps of the environments, then epochs of training."""
    batch_size = config.num_envs * config.num_steps
    minibatch_size = batch_size // config.num_minibatches

    def update(state: State, learning_rate: Any, number: Any) -> tuple[State, Sums]:
        seed_key = jax.random.wrap_key_data(state.key)
        variables = {"params": state.params, **state.others}
        policy = functools.partial(model.apply, variables, method="policy")
        value = functools.partial(model.apply, variables, method="value")
        act_key = jax.random.fold_in(jax.random.fold_in(seed_key, _ACTIONS), number)
        begun = (state.observations, state.env)
        (observations, env_state), path = rollout(env, policy, act_key, begun, config.num_steps)
        (seen, actions, log_probs), found = path
        returns, totals, episodes = _completed(state.returns, found)

        values, following = value(seen), value(found.final)
        advantages = generalized_advantages(
            found, values, following, discount=config.discount, gae_lambda=config.gae_lambda
        )
        whole = Batch(seen, actions, log_probs, values, advantages)
        flat = jax.tree.map(lambda x: x.reshape(batch_size, *x.shape[2:]), whole)

        rate = learning_rate * (1 - number / num_updates)
        loss_fn = functools.partial(_loss, config, model, state.others)

        def learn(carry: Any, index: Array) -> Any:
            params, optimizer = carry
            batch = jax.tree.map(lambda x: x[index], flat)
            (loss, entropy), grads = jax.value_and_grad(loss_fn, has_aux=True)(params, batch)
            # SET and RigL change the mask: the one in the state counts.
            mask = optax.tree.get(optimizer, "mask")
            tx = _optimizer(config, mask, seed_key, rate, num_updates)
            updates, optimizer = tx.update(grads, optimizer, params)
            return (optax.apply_updates(params, updates), optimizer), (loss, entropy)

        order_key = jax.random.fold_in(jax.random.fold_in(seed_key, _ORDER), number)
        order_keys = jax.random.split(order_key, config.num_epochs)
        orders = jax.vmap(lambda key: jax.random.permutation(key, batch_size))(order_keys)
        parts = orders.reshape(-1, minibatch_size)
        learned = jax.lax.scan(learn, (state.params, state.optimizer), parts)
        (params, optimizer), (losses, entropies) = learned

        sums = Sums(totals, episodes, losses.mean(), entropies.mean(), jnp.isfinite(losses).all())
        after = State(state.key, params, state.others, optimizer, env_state, observations, returns)
        return after, sums

    return update


def rollout(
    env: Environment,
    policy: Callable[[Array], Array],
    key: Array,
    begun: tuple[Array, Any],
    num_steps: int,
) -> tuple[tuple[Array, Any], tuple[tuple[Array, Array, Array], Transition]]:
    """Let a policy act in several environments.

    Args:
        env: The environment.
        policy: From observations ``(num_envs, size)`` to logits ``(num_envs, num_actions)``.
        key: A random key.
        begun: Observations and states of the environments.
        num_steps: Steps of each.

    Returns:
        Observations and states after the last step; and of all steps, stacked along the first
        axis, what was seen before, what was done and the log-probability of doing so, and what
        followed from it.
    """

    def act(carry: tuple[Array, Any], number: Array) -> Any:
        observations, state = carry
        action_key, step_key = jax.random.split(jax.random.fold_in(key, number))
        logits = policy(observations)
        actions = jax.random.categorical(action_key, logits)
        log_probs = _log_prob(logits, actions)
        keys = jax.random.split(step_key, len(observations))
        following, state, found = jax.vmap(env.step)(keys, state, actions)
        return (following, state), ((observations, actions, log_probs), found)

    return jax.lax.scan(act, begun, jnp.arange(num_steps))


def _completed(returns: Array, found: Transition) -> tuple[Array, Array, Array]:
    """Follow the returns of episodes through some steps.

    Returns:
        The returns so far of episodes that are under way, the sum of those of completed episodes,
        and the number of these.
    """

    def follow(returns: Array, step: tuple[Array, Array]) -> tuple[Array, tuple[Array, Array]]:
        reward, done = step
        returns = returns + reward
        total = jnp.where(done, returns, 0).sum()
        return jnp.where(done, 0, returns), (total, done.sum())

    done = found.terminated | found.truncated
    returns, (totals, episodes) = jax.lax.scan(follow, returns, (found.reward, done))
    return returns, totals.sum(), episodes.sum().astype(jnp.float32)


def generalized_advantages(
    found: Transition,
    values: Array,
    following: Array,
    *,
    discount: float,
    gae_lambda: float,
) -> Array:
    r"""Estimate how much better each action was than the policy's mean.

    .. math:: \delta_t = r_t + \gamma (1 - e_t) V(s'_t) - V(s_t), \qquad
              A_t = \delta_t + \gamma \lambda (1 - d_t) A_{t+1},

    where :math:`e_t` says that the episode ended with step :math:`t`, :math:`d_t` that it ended or
    was cut, and :math:`s'_t` is the observation that the step led to: of an episode that was cut,
    its last one, not the first of the next.

    Args:
        found: Rewards, ends and cuts, of shape ``(num_steps, ...)``.
        values: :math:`V(s_t)`, of that shape.
        following: :math:`V(s'_t)`, of that shape.
        discount: :math:`\gamma` in [0, 1].
        gae_lambda: :math:`\lambda` in [0, 1].

    Returns:
        Advantages of that shape; plus ``values`` they are the critic's targets.

    Example:
        >>> import jax.numpy as jnp
        >>> from experiments.rl import environments, ppo
        >>> no = jnp.array([False, False])
        >>> found = environments.Transition(jnp.array([1.0, 1.0]), no, no, no)
        >>> zeros = jnp.zeros(2)
        >>> ppo.generalized_advantages(found, zeros, zeros, discount=0.5, gae_lambda=1.0)
        Array([1.5, 1. ], dtype=float32)

    Reference:
        Schulman et al., "High-dimensional continuous control using generalized advantage
        estimation", ICLR 2016.
    """
    delta = found.reward + discount * jnp.where(found.terminated, 0, following) - values
    done = found.terminated | found.truncated
    decay = discount * gae_lambda * jnp.where(done, 0.0, 1.0)

    def back(advantage: Array, step: tuple[Array, Array]) -> tuple[Array, Array]:
        delta, decay = step
        advantage = delta + decay * advantage
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(delta[0]), (delta, decay), reverse=True)
    return advantages


def _loss(
    config: Ppo, model: Any, others: dict[str, Any], params: Params, batch: Batch
) -> tuple[Array, Array]:
    """Return the loss of a minibatch and the policy's entropy."""
    logits, values = model.apply({"params": params, **others}, batch.observations)
    ratio = jnp.exp(_log_prob(logits, batch.actions) - batch.log_probs)
    advantages = batch.advantages
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    clipped = jnp.clip(ratio, 1 - config.clip, 1 + config.clip)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()

    targets = batch.values + batch.advantages
    near = batch.values + jnp.clip(values - batch.values, -config.clip, config.clip)
    errors = jnp.maximum(jnp.square(values - targets), jnp.square(near - targets))
    log_probs = jax.nn.log_softmax(logits)
    entropy = -(jnp.exp(log_probs) * log_probs).sum(axis=-1).mean()
    loss = policy_loss + config.value_weight * 0.5 * errors.mean() - config.entropy * entropy
    return loss, entropy


def _log_prob(logits: Array, actions: Array) -> Array:
    log_probs = jax.nn.log_softmax(logits)
    return jnp.take_along_axis(log_probs, actions[..., None], axis=-1)[..., 0]
