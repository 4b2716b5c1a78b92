"""The Adam family for JAX: exact, at any precision, as optax transformations."""

from adam_fn import backward as backward
from adam_fn import checkpoint as checkpoint
from adam_fn import diagnostics as diagnostics
from adam_fn import interop as interop
from adam_fn import masks as masks
from adam_fn import options as options
from adam_fn import presets as presets
from adam_fn import schedules as schedules
from adam_fn import surgery as surgery
from adam_fn.algebra.arithmetic import Scalar as Scalar
from adam_fn.algebra.arithmetic import ema as ema
from adam_fn.algebra.hyper import Beta as Beta
from adam_fn.algebra.hyper import Hyper as Hyper
from adam_fn.algebra.hyper import NonNegative as NonNegative
from adam_fn.algebra.hyper import Schedule as Schedule
from adam_fn.algebra.links import Decay as Decay
from adam_fn.algebra.links import ProximalDecay as ProximalDecay
from adam_fn.algebra.links import Rate as Rate
from adam_fn.algebra.links import WeightDecay as WeightDecay
from adam_fn.algebra.rule import Clock as Clock
from adam_fn.algebra.rule import Rule as Rule
from adam_fn.algebra.slots import Slot as Slot
from adam_fn.algebra.slots import Slots as Slots
from adam_fn.algebra.slots import Unit as Unit
from adam_fn.devices.offload import offload as offload
from adam_fn.devices.sharding import state_shardings as state_shardings
from adam_fn.devices.zero1 import undivided as undivided
from adam_fn.devices.zero1 import zero1 as zero1
from adam_fn.diagnostics import state_bytes as state_bytes
from adam_fn.family.adabelief import AdaBelief as AdaBelief
from adam_fn.family.adabelief import adabelief as adabelief
from adam_fn.family.adam import Adam as Adam
from adam_fn.family.adam import adam as adam
from adam_fn.family.adam import adamw as adamw
from adam_fn.family.adam import nadam as nadam
from adam_fn.family.adam import nadamw as nadamw
from adam_fn.family.adam_atan2 import AdamAtan2 as AdamAtan2
from adam_fn.family.adam_atan2 import adam_atan2 as adam_atan2
from adam_fn.family.adamax import AdaMax as AdaMax
from adam_fn.family.adamax import adamax as adamax
from adam_fn.family.adamax import adamaxw as adamaxw
from adam_fn.family.adan import Adan as Adan
from adam_fn.family.adan import adan as adan
from adam_fn.family.ademamix import AdEMAMix as AdEMAMix
from adam_fn.family.ademamix import ademamix as ademamix
from adam_fn.family.adopt import ADOPT as ADOPT
from adam_fn.family.adopt import adopt as adopt
from adam_fn.family.amsgrad import AMSGrad as AMSGrad
from adam_fn.family.amsgrad import amsgrad as amsgrad
from adam_fn.family.lamb import lamb as lamb
from adam_fn.family.laprop import LaProp as LaProp
from adam_fn.family.laprop import laprop as laprop
from adam_fn.family.lion import Lion as Lion
from adam_fn.family.lion import lion as lion
from adam_fn.family.radam import RAdam as RAdam
from adam_fn.family.radam import radam as radam
from adam_fn.family.scale_by import scale_by_adam as scale_by_adam
from adam_fn.family.scale_by import scale_by_adamax as scale_by_adamax
from adam_fn.family.scale_by import scale_by_adan as scale_by_adan
from adam_fn.family.scale_by import scale_by_amsgrad as scale_by_amsgrad
from adam_fn.family.scale_by import scale_by_belief as scale_by_belief
from adam_fn.family.scale_by import scale_by_lion as scale_by_lion
from adam_fn.family.scale_by import scale_by_radam as scale_by_radam
from adam_fn.family.scale_by import scale_by_yogi as scale_by_yogi
from adam_fn.family.swats import SwatsState as SwatsState
from adam_fn.family.swats import swats as swats
from adam_fn.family.yogi import Yogi as Yogi
from adam_fn.family.yogi import yogi as yogi
from adam_fn.options import Storage as Storage
from adam_fn.storage.codec import Cast as Cast
from adam_fn.storage.codec import Codec as Codec
from adam_fn.storage.codec import Stored as Stored
from adam_fn.storage.low_bit_codes import MuLaw as MuLaw
from adam_fn.storage.low_bit_codes import StorageLike as StorageLike
from adam_fn.storage.low_bit_codes import StorageName as StorageName
from adam_fn.storage.low_bit_codes import Word as Word
from adam_fn.trees.groups import Group as Group
from adam_fn.trees.groups import Groups as Groups
from adam_fn.trees.leaves import Mask as Mask
from adam_fn.trees.leaves import PyTree as PyTree
from adam_fn.trees.transform import Transformation as Transformation
from adam_fn.trees.transform import transform as transform
from adam_fn.version import __version__ as __version__
from adam_fn.wrappers.averaging import Average as Average
from adam_fn.wrappers.averaging import average_params as average_params
from adam_fn.wrappers.averaging import averaged_params as averaged_params
from adam_fn.wrappers.cautious import cautious as cautious
from adam_fn.wrappers.clip import clip_by_global_norm as clip_by_global_norm
from adam_fn.wrappers.guard import GuardState as GuardState
from adam_fn.wrappers.guard import skip_nonfinite as skip_nonfinite
from adam_fn.wrappers.masters import MasterState as MasterState
from adam_fn.wrappers.masters import master_weights as master_weights
from adam_fn.wrappers.rounding import RoundingState as RoundingState
from adam_fn.wrappers.rounding import stochastic_rounding as stochastic_rounding
from adam_fn.wrappers.step import make_step as make_step
from adam_fn.wrappers.stored import StoredState as StoredState
from adam_fn.wrappers.stored import stored as stored

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
