"""Converts states of other frameworks' optimizers to ours and back, and our states to another storage.

torch and Keras need not be installed.
"""

from adam_fn.interop.keras import from_keras as from_keras
from adam_fn.interop.keras import to_keras as to_keras
from adam_fn.interop.optax import from_optax as from_optax
from adam_fn.interop.optax import to_optax as to_optax
from adam_fn.interop.storage import change_storage as change_storage
from adam_fn.interop.torch import from_torch as from_torch
from adam_fn.interop.torch import to_torch as to_torch
from adam_fn.interop.torch import torch_groups as torch_groups
from adam_fn.interop.torch import torch_tensors as torch_tensors

# Without it a star import would bring the modules too, which have the names of the frameworks.
__all__ = [
    "change_storage",
    "from_keras",
    "from_optax",
    "from_torch",
    "to_keras",
    "to_optax",
    "to_torch",
    "torch_groups",
    "torch_tensors",
]
