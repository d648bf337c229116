"""AdamW over the trainable leaves: schedule, clipping, and path rules for decay and rates."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import jax
import ml_collections
import optax

from flora_jax.adapters import Quantized
from flora_jax.config import learning_rate, warmup_steps
from flora_jax.errors import require, split_names
from flora_jax.training.rules import decide, paths, tree

# Whether AdamW's decay applies. Every model has norms, so no rule is idle.
DECAY_RULES: list[tuple[str, bool]] = [(r".*(norm/scale|_bias)", False), (r".*", True)]


def trains(config: ml_collections.ConfigDict, variables: Mapping[str, Any]) -> dict[str, bool]:
    """Path -> whether the leaf trains.

    The adapter trains (for fft the whole base), and so do the base leaves that
    `config.train.trainable` names. Raises UserError for a rule that matches nothing, and for
    quantised leaves that would train.
    """
    rules = [(pattern, True) for pattern in split_names(config.train.trainable)]
    if config.adapter.method == "fft":
        require(
            not rules,
            f"config.train.trainable={config.train.trainable!r}: fft trains every leaf already",
        )
        rules = [(r"params/.*", True)]
    leaves = paths(variables)
    adapter = {path: True for path in leaves if path.startswith("adapter/")}
    base = [path for path in leaves if path not in adapter]
    trained = decide(rules, base, "config.train.trainable", default=False)
    for path, does in trained.items():
        require(
            not (does and isinstance(leaves[path], Quantized)),
            f"config.model.quantization={config.model.quantization!r}: {path} would train, and "
            "codes have no gradient; use none, or leave it out of what trains (fft trains it all)",
        )
    return trained | adapter


def make_schedule(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate by step: a linear warm-up from peak / (warmup + 1) to the peak, then
    cosine, linear or constant."""
    peak = learning_rate(config)
    warmup = warmup_steps(config)
    rest = max(1, config.train.steps - warmup)
    after = {
        "cosine": optax.cosine_decay_schedule(peak, rest, alpha=config.optim.final_fraction),
        "linear": optax.linear_schedule(peak, peak * config.optim.final_fraction, rest),
        "constant": optax.constant_schedule(peak),
    }[config.optim.schedule]
    if warmup == 0:
        return after
    # Step 0 is already one step up the ramp: a rate of zero would waste its batch.
    ramp = optax.linear_schedule(peak / (warmup + 1), peak, warmup)
    return optax.join_schedules([ramp, after], [warmup])


def make_optimizer(
    config: ml_collections.ConfigDict, variables: Mapping[str, Any], trained: Mapping[str, bool]
) -> optax.GradientTransformation:
    """The gradient transformation for the leaves that train.

    variables: the whole tree, of arrays or shapes; trained: path -> whether the leaf trains. Raises
    UserError for rate rules that are malformed or match nothing.
    """
    leaves = [path for path, does in trained.items() if does]
    decays = decide(DECAY_RULES, list(paths(variables)), "weight decay")
    decays = tree({path: decays[path] for path in leaves})
    optim = config.optim
    chain = []
    if optim.clip_norm:
        chain.append(optax.clip_by_global_norm(optim.clip_norm))
    chain += [
        optax.scale_by_adam(b1=optim.b1, b2=optim.b2, eps=optim.eps),
        optax.add_decayed_weights(optim.weight_decay, mask=decays),
    ]
    if optim.rate_rules:
        rules = [_rate_rule(rule) for rule in split_names(optim.rate_rules)]
        factors = tree(decide(rules, leaves, "config.optim.rate_rules", default=1.0))
        chain.append(
            optax.stateless(lambda updates, _: jax.tree.map(lambda u, f: u * f, updates, factors))
        )
    return optax.chain(*chain, optax.scale_by_learning_rate(make_schedule(config)))


def _rate_rule(rule: str) -> tuple[str, float]:
    pattern, _, factor = rule.rpartition("=")
    try:
        value = float(factor)
    except ValueError:
        value = -1.0
    require(
        pattern and 0 <= value < math.inf,
        f"config.optim.rate_rules: {rule!r} is not PATH_RULE=FACTOR with a factor of at least 0",
    )
    return pattern, value
