"""The family as data: one row per member or variant. Tests run over every row; what a row supports is in the row."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import optax
from oracles import family, momentum

import adam_fn


@dataclasses.dataclass(frozen=True)
class Case:
    """A member of the family.

    Attributes:
      name: its id in pytest.
      alias: the function under test.
      oracle: its float64 transcription (`oracles`), which takes the same options.
      options: the options of both.
      peer: optax's function where it has the same maths.
      tolerance: the largest relative L2 error of the updates in float32.
      scale_free: with these options the updates do not change when all gradients are scaled; None if they always do.
    """

    name: str
    alias: Callable[..., adam_fn.Transformation]
    oracle: Callable[..., family.Trajectory]
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    peer: Callable[..., optax.GradientTransformation] | None = None
    tolerance: float = 2e-6
    scale_free: Mapping[str, Any] | None = dataclasses.field(default_factory=lambda: {"eps": 0.0})

    def make(self, learning_rate: Any = 1e-3, **more: Any) -> adam_fn.Transformation:
        return self.alias(learning_rate, **{**self.options, **more})

    def make_peer(self, learning_rate: Any = 1e-3) -> optax.GradientTransformation:
        assert self.peer is not None
        return self.peer(learning_rate, **self.options)

    def stored(self, dtype: Any) -> dict[str, Any]:
        """The options that store every moment in `dtype`."""
        kinds = {slot.split("_")[0] for slot in self.member.slots}
        return {f"{kind}_dtype": dtype for kind in ("mu", "nu") if kind in kinds}

    @property
    def rule(self) -> adam_fn.Rule:
        """The whole rule, with its rate and decay."""
        return rule_of(self.make())

    @property
    def member(self) -> adam_fn.Rule:
        """The rule of the optimizer itself."""
        return next(part for part in self.rule.parts() if part.slots)


def rule_of(tx: adam_fn.Transformation) -> adam_fn.Rule:
    """The rule that a transformation was made of."""
    return tx.update.definition.rule


CASES = (
    Case("adam", adam_fn.adam, family.adam, peer=optax.adam),
    Case("adam-b", adam_fn.adam, family.adam, {"b1": 0.8, "b2": 0.9999, "eps": 1e-3}, peer=optax.adam),
    Case("adam-eps_root", adam_fn.adam, family.adam, {"eps": 0.0, "eps_root": 1e-6}, peer=optax.adam),
    Case("adam-eps_hat", adam_fn.adam, family.adam, {"eps": 1e-3, "eps_hat": True}),
    Case("adam-b1_zero", adam_fn.adam, family.adam, {"b1": 0.0, "b2": 0.3}, peer=optax.adam),
    Case("adam-l2", adam_fn.adam, family.adam, {"weight_decay": 0.02, "decay": "l2"}),
    Case("adamw", adam_fn.adamw, family.adamw, {"weight_decay": 0.02}, peer=optax.adamw),
    Case("adamw-independent", adam_fn.adamw, family.adamw, {"weight_decay": 1e-3, "decay": "independent"}),
    Case("nadam", adam_fn.nadam, family.nadam, peer=optax.nadam),
    Case("nadam-momentum_decay", adam_fn.nadam, family.nadam, {"momentum_decay": 4e-3}),
    Case("nadam-keras", adam_fn.nadam, family.nadam, {"momentum_decay": 1.0, "eps": 1e-7}),
    Case("nadamw", adam_fn.nadamw, family.nadamw, {"weight_decay": 0.02}, peer=optax.nadamw),
    Case("adamax", adam_fn.adamax, family.adamax, peer=optax.adamax),
    Case("adamax-paper", adam_fn.adamax, family.adamax, {"eps": 0.0}),
    Case("adamax-eps_hat", adam_fn.adamax, family.adamax, {"eps": 1e-2, "eps_hat": True}),
    Case("adamaxw", adam_fn.adamaxw, family.adamaxw, {"weight_decay": 0.02}, peer=optax.adamaxw),
    Case("amsgrad", adam_fn.amsgrad, family.amsgrad),
    Case(
        "amsgrad-paper",
        adam_fn.amsgrad,
        family.amsgrad,
        {"bias_correction_mu": False, "bias_correction_nu": False},
        peer=optax.amsgrad,
    ),
    Case("amsgrad-raw_mu", adam_fn.amsgrad, family.amsgrad, {"bias_correction_mu": False}),
    Case(
        "amsgrad-raw_nu",
        adam_fn.amsgrad,
        family.amsgrad,
        {"bias_correction_nu": False, "eps_root": 1e-4},
        peer=optax.amsgrad,
    ),
    Case("amsgrad-keras", adam_fn.amsgrad, family.amsgrad, {"eps": 1e-3, "eps_hat": True}),
    Case(
        "radam",
        adam_fn.radam,
        family.radam,
        peer=optax.radam,
        scale_free={"eps": 0.0, "degenerated_to_sgd": False},  # Not with its first steps, which are not adaptive.
    ),
    Case("radam-no_step", adam_fn.radam, family.radam, {"degenerated_to_sgd": False, "b2": 0.9999}),
    Case("radam-torch", adam_fn.radam, family.radam, {"eps_hat": True, "eps": 1e-4}),
    Case(
        "radam-threshold",
        adam_fn.radam,
        family.radam,
        {"threshold": 50.0, "nesterov": True, "eps_root": 1e-4},
        peer=optax.radam,
    ),
    Case("adabelief", adam_fn.adabelief, family.adabelief, peer=optax.adabelief, scale_free=None),
    Case("adabelief-nesterov", adam_fn.adabelief, family.adabelief, {"nesterov": True}, peer=optax.adabelief),
    Case(
        "adabelief-eps",
        adam_fn.adabelief,
        family.adabelief,
        {"eps": 1e-8, "eps_root": 1e-8},
        peer=optax.adabelief,
        tolerance=4e-6,  # g - m cancels.
    ),
    Case("yogi", adam_fn.yogi, family.yogi, peer=optax.yogi, scale_free=None),
    Case("laprop", adam_fn.laprop, momentum.laprop),
    Case("laprop-b", adam_fn.laprop, momentum.laprop, {"b1": 0.5, "b2": 0.9999, "eps": 1e-3, "weight_decay": 0.02}),
    Case("adopt", adam_fn.adopt, momentum.adopt, peer=optax.contrib.adopt),
    Case("adopt-nesterov", adam_fn.adopt, momentum.adopt, {"nesterov": True}, peer=optax.contrib.adopt),
    Case("adopt-no_clipping", adam_fn.adopt, momentum.adopt, {"b2": 0.99, "use_clipping": False}),
    Case("ademamix", adam_fn.ademamix, momentum.ademamix, peer=optax.contrib.ademamix),
    Case(
        "ademamix-b1_zero",
        adam_fn.ademamix,
        momentum.ademamix,
        {"b1": 0.0, "b3": 0.99, "alpha": 2.0, "weight_decay": 0.02},
        peer=optax.contrib.ademamix,
    ),
    Case("lion", adam_fn.lion, momentum.lion, {"weight_decay": 0.0}, peer=optax.lion, scale_free={}),
    Case("lion-decay", adam_fn.lion, momentum.lion, {"b1": 0.95, "b2": 0.98, "weight_decay": 0.02}, peer=optax.lion),
    Case("adan", adam_fn.adan, momentum.adan, tolerance=4e-6),
    Case("adan-proximal", adam_fn.adan, momentum.adan, {"weight_decay": 0.02, "decay": "proximal", "eps": 1e-3}),
    Case("adam_atan2", adam_fn.adam_atan2, momentum.adam_atan2, scale_free={}),
    Case("adam_atan2-ab", adam_fn.adam_atan2, momentum.adam_atan2, {"a": 1.27, "b": 3.0, "b2": 0.999}),
)

#: One row per rule, for tests that need not see every variant.
MEMBERS = tuple({type(case.member): case for case in reversed(CASES)}.values())


def name(case: Case) -> str:
    """Pytest's id of a row."""
    return case.name
