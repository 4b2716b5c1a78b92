"""The directions of the optimizers without rate and decay, with the names and arguments of optax's ``scale_by_…``.

They are for code that builds its own chain::

    tx = optax.chain(
        adam_fn.scale_by_adam(storage="16bit"), optax.add_decayed_weights(0.1), optax.scale_by_learning_rate(1e-3)
    )

The states are optax's where optax has the same optimizer. Each takes the options ``complex``, ``frozen``, ``nu_dtype``,
``storage`` and ``storage_mask`` of `adam_fn.options.Options` as well.
"""

from typing import Literal, Unpack

from jax.typing import DTypeLike

from adam_fn.algebra.hyper import Hyper
from adam_fn.algebra.rule import Rule
from adam_fn.family.adabelief import AdaBelief
from adam_fn.family.adam import Adam
from adam_fn.family.adamax import AdaMax
from adam_fn.family.adan import Adan
from adam_fn.family.amsgrad import AMSGrad
from adam_fn.family.lion import Lion
from adam_fn.family.radam import RAdam
from adam_fn.family.yogi import Yogi
from adam_fn.options import DirectionOptions, built, lists_options
from adam_fn.trees.transform import Transformation, transform


def _direction(rule: Rule, options: DirectionOptions, mu_dtype: DTypeLike | None = None) -> Transformation:
    found = built(rule, mu_dtype=mu_dtype, **options)
    return transform(found.direction, **found.arguments)


@lists_options
def scale_by_adam(
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    *,
    nesterov: bool = False,
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_adam`: ``u = m̂/(√(v̂ + ε_root) + ε)``, see `adam_fn.adam`."""
    return _direction(Adam(b1, b2, eps, eps_root, nesterov), options, mu_dtype)


@lists_options
def scale_by_adamax(
    b1: Hyper = 0.9, b2: Hyper = 0.999, eps: Hyper = 1e-8, **options: Unpack[DirectionOptions]
) -> Transformation:
    """`optax.scale_by_adamax`: ``u = m̂/v``, ``v ← max(β₂v, |g| + ε)``, see `adam_fn.adamax`."""
    return _direction(AdaMax(b1, b2, eps), options)


@lists_options
def scale_by_amsgrad(
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    mu_dtype: DTypeLike | None = None,
    bias_correction_mu: bool = True,
    bias_correction_nu: bool = True,
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_amsgrad`, except that the maximum is of the raw v; see `adam_fn.amsgrad`."""
    corrections = {"bias_correction_mu": bias_correction_mu, "bias_correction_nu": bias_correction_nu}
    return _direction(AMSGrad(b1, b2, eps, eps_root, **corrections), options, mu_dtype)


@lists_options
def scale_by_belief(
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-16,
    eps_root: Hyper = 1e-16,
    *,
    nesterov: bool = False,
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_belief`: ``u = m̂/(√ŝ + ε)``, s of ``(g - m)² + ε_root``, see `adam_fn.adabelief`."""
    return _direction(AdaBelief(b1, b2, eps, eps_each=eps_root, nesterov=nesterov), options)


@lists_options
def scale_by_yogi(
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-3,
    eps_root: Hyper = 0.0,
    initial_accumulator_value: float = 1e-6,
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_yogi`: ``v ← v - (1-β₂) sign(v - g²) g²``, see `adam_fn.yogi`.

    Both moments start at `initial_accumulator_value`.
    """
    return _direction(Yogi(b1, b2, eps, eps_root, initial=initial_accumulator_value), options)


@lists_options
def scale_by_radam(
    b1: Hyper = 0.9,
    b2: Hyper = 0.999,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    threshold: Hyper = 5.0,
    *,
    nesterov: bool = False,
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_radam`: ``u = r m̂/(√v̂ + ε)`` or ``m̂``, see `adam_fn.radam`."""
    return _direction(RAdam(b1, b2, eps, eps_root, nesterov, threshold=threshold), options)


@lists_options
def scale_by_lion(
    b1: Hyper = 0.9,
    b2: Hyper = 0.99,
    mu_dtype: DTypeLike | None = None,
    *,
    mode: Literal["hard"] = "hard",
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_lion`: ``u = sign(β₁m + (1-β₁)g)``, see `adam_fn.lion`. The only `mode` is ``"hard"``."""
    if mode != "hard":
        raise ValueError(f'mode must be "hard", which is Lion, got {mode!r}: the others are in optax.scale_by_lion')
    return _direction(Lion(b1, b2), options, mu_dtype)


@lists_options
def scale_by_adan(
    b1: Hyper = 0.98,
    b2: Hyper = 0.92,
    b3: Hyper = 0.99,
    eps: Hyper = 1e-8,
    eps_root: Hyper = 0.0,
    **options: Unpack[DirectionOptions],
) -> Transformation:
    """`optax.scale_by_adan`, except that it has the paper's β₂ where optax has 1-β₂; see `adam_fn.adan`."""
    return _direction(Adan(b1, b2, eps, eps_root, b3=b3), options)
