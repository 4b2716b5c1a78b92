"""The state of other frameworks' optimizers, to ours and back. None of them is imported, nor need be there."""

from adam_fn.interop.optax import from_optax as from_optax
from adam_fn.interop.optax import to_optax as to_optax
