"""A training process that may be killed at any moment.

It goes on from the last complete checkpoint in its folder, saves every few steps, says when it starts and which
checkpoint it begins, and at last a digest of parameters, state and random key.
"""

import hashlib
import os
from multiprocessing.connection import Connection
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from helpers import compiling

import adam_fn
from adam_fn import checkpoint

TX = adam_fn.master_weights(adam_fn.adamw(optax.cosine_decay_schedule(1e-2, 1000), weight_decay=0.01, storage="16bit"))


def begin() -> Any:
    w1, w2 = (jax.random.normal(jax.random.key(i), (64, 64), jnp.bfloat16) / 8 for i in range(2))
    params = {"w1": w1, "b1": jnp.zeros(64, jnp.bfloat16), "w2": w2}
    return {"params": params, "state": TX.init(params), "key": jax.random.key(2)}


def step(carry: Any) -> Any:
    """A batch and dropout that the key decides, which the next step needs too."""
    key, batch, drop = jax.random.split(carry["key"], 3)
    x = jax.random.normal(batch, (16, 64), jnp.bfloat16)

    def loss(p: Any) -> jax.Array:
        hidden = jnp.tanh(x @ p["w1"] + p["b1"][None]) * jax.random.bernoulli(drop, 0.5, (16, 64))
        return jnp.mean((hidden @ p["w2"] - jnp.sin(x)).astype(jnp.float32) ** 2)

    updates, state = TX.update(jax.grad(loss)(carry["params"]), carry["state"], carry["params"])
    return {"params": optax.apply_updates(carry["params"], updates), "state": state, "key": key}


def digest(carry: Any) -> str:
    carry = {**carry, "key": jax.random.key_data(carry["key"])}
    return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in jax.tree.leaves(carry))).hexdigest()


def main(folder: str, steps: int, every: int, cache: str, said: Connection) -> None:
    """What a process of its own runs; `cache` is for what it compiles, through `said` it sends its lines."""
    os.environ["XLA_FLAGS"] = compiling.flags(devices=1)  # One device starts sooner than eight.
    jax.config.update("jax_compilation_cache_dir", cache)
    assert jax.device_count() == 1
    carry, done = begin(), 0
    train = jax.jit(step, donate_argnums=0).lower(carry).compile()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        if (last := manager.latest_step()) is not None:
            checkpoint.check(manager.metadata(last).custom_metadata, TX, carry["params"])
            carry, done = manager.restore(last, args=ocp.args.StandardRestore(carry)), last
        about = checkpoint.describe(TX, carry["params"])
        said.send(f"start {done}")
        while done < steps:
            carry, done = train(carry), done + 1
            if done % every == 0 or done == steps:
                manager.save(done, args=ocp.args.StandardSave(carry), custom_metadata=about)
                said.send(f"save {done}")
    said.send(f"end {digest(carry)}")
