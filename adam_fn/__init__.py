"""The Adam family for JAX: exact, at any precision, as optax transformations."""

from adam_fn import backward, checkpoint, diagnostics, interop, masks, options, presets, schedules, surgery
from adam_fn.algebra.arithmetic import Scalar, ema
from adam_fn.algebra.hyper import Beta, Hyper, NonNegative, Schedule
from adam_fn.algebra.rate_and_decay import Decay, ProximalDecay, Rate, WeightDecay
from adam_fn.algebra.rule import Clock, Rule
from adam_fn.algebra.slots import Slot, Slots, Unit
from adam_fn.devices.offload import offload
from adam_fn.devices.sharding import state_shardings
from adam_fn.devices.zero1 import undivided, zero1
from adam_fn.diagnostics import state_bytes
from adam_fn.family.adabelief import AdaBelief, adabelief
from adam_fn.family.adam import Adam, adam, adamw, nadam, nadamw
from adam_fn.family.adam_atan2 import AdamAtan2, adam_atan2
from adam_fn.family.adamax import AdaMax, adamax, adamaxw
from adam_fn.family.adan import Adan, adan
from adam_fn.family.ademamix import AdEMAMix, ademamix
from adam_fn.family.adopt import ADOPT, adopt
from adam_fn.family.amsgrad import AMSGrad, amsgrad
from adam_fn.family.lamb import lamb
from adam_fn.family.laprop import LaProp, laprop
from adam_fn.family.lion import Lion, lion
from adam_fn.family.radam import RAdam, radam
from adam_fn.family.scale_by import (
    scale_by_adam,
    scale_by_adamax,
    scale_by_adan,
    scale_by_amsgrad,
    scale_by_belief,
    scale_by_lion,
    scale_by_radam,
    scale_by_yogi,
)
from adam_fn.family.swats import SwatsState, swats
from adam_fn.family.yogi import Yogi, yogi
from adam_fn.options import Storage
from adam_fn.storage.codec import Cast, Codec, Stored
from adam_fn.storage.mu_law_8bit import MuLaw
from adam_fn.storage.names import StorageLike, StorageName
from adam_fn.storage.word_16bit import Word
from adam_fn.trees.groups import Group, Groups
from adam_fn.trees.leaves import Mask, PyTree
from adam_fn.trees.transform import Transformation, transform
from adam_fn.version import __version__ as __version__
from adam_fn.wrappers.averaging import Average, average_params, averaged_params
from adam_fn.wrappers.cautious import cautious
from adam_fn.wrappers.clip import clip_by_global_norm
from adam_fn.wrappers.guard import GuardState, skip_nonfinite
from adam_fn.wrappers.masters import MasterState, master_weights
from adam_fn.wrappers.rounding import RoundingState, stochastic_rounding
from adam_fn.wrappers.step import make_step
from adam_fn.wrappers.stored import StoredState, stored

__all__ = [
    "ADOPT",
    "AMSGrad",
    "AdEMAMix",
    "AdaBelief",
    "AdaMax",
    "Adam",
    "AdamAtan2",
    "Adan",
    "Average",
    "Beta",
    "Cast",
    "Clock",
    "Codec",
    "Decay",
    "Group",
    "Groups",
    "GuardState",
    "Hyper",
    "LaProp",
    "Lion",
    "Mask",
    "MasterState",
    "MuLaw",
    "NonNegative",
    "ProximalDecay",
    "PyTree",
    "RAdam",
    "Rate",
    "RoundingState",
    "Rule",
    "Scalar",
    "Schedule",
    "Slot",
    "Slots",
    "Storage",
    "StorageLike",
    "StorageName",
    "Stored",
    "StoredState",
    "SwatsState",
    "Transformation",
    "Unit",
    "WeightDecay",
    "Word",
    "Yogi",
    "adabelief",
    "adam",
    "adam_atan2",
    "adamax",
    "adamaxw",
    "adamw",
    "adan",
    "ademamix",
    "adopt",
    "amsgrad",
    "average_params",
    "averaged_params",
    "backward",
    "cautious",
    "checkpoint",
    "clip_by_global_norm",
    "diagnostics",
    "ema",
    "interop",
    "lamb",
    "laprop",
    "lion",
    "make_step",
    "masks",
    "master_weights",
    "nadam",
    "nadamw",
    "offload",
    "options",
    "presets",
    "radam",
    "scale_by_adam",
    "scale_by_adamax",
    "scale_by_adan",
    "scale_by_amsgrad",
    "scale_by_belief",
    "scale_by_lion",
    "scale_by_radam",
    "scale_by_yogi",
    "schedules",
    "skip_nonfinite",
    "state_bytes",
    "state_shardings",
    "stochastic_rounding",
    "stored",
    "surgery",
    "swats",
    "transform",
    "undivided",
    "yogi",
    "zero1",
]
