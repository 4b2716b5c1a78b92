"""A real process, killed with SIGKILL again and again, ends where an undisturbed one does: bit for bit.

It goes on from the last complete checkpoint in its folder, saves every few steps, says when it starts and which
checkpoint it begins, and at last a digest of parameters, state and random key.
"""

import contextlib
import hashlib
import os
import random
import signal
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
from helpers import compiling
from helpers.scripts import SERVER

import adam_fn
from adam_fn import checkpoint

KILLS = 8
STEPS = 250
EVERY = 3

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


def train(folder: str, steps: int, every: int, cache: str, said: Connection) -> None:
    """What a process of its own runs; `cache` is for what it compiles, through `said` it sends its lines."""
    os.environ["XLA_FLAGS"] = compiling.flags(devices=1)  # One device starts sooner than eight.
    jax.config.update("jax_compilation_cache_dir", cache)
    assert jax.device_count() == 1
    carry, done = begin(), 0
    advance = jax.jit(step, donate_argnums=0).lower(carry).compile()
    options = ocp.CheckpointManagerOptions(max_to_keep=2)
    with ocp.CheckpointManager(folder, options=options, item_handlers=ocp.StandardCheckpointHandler()) as manager:
        if (last := manager.latest_step()) is not None:
            checkpoint.check(manager.metadata(last).custom_metadata, TX, carry["params"])
            carry, done = manager.restore(last, args=ocp.args.StandardRestore(carry)), last
        about = checkpoint.describe(TX, carry["params"])
        said.send(f"start {done}")
        while done < steps:
            carry, done = advance(carry), done + 1
            if done % every == 0 or done == steps:
                manager.save(done, args=ocp.args.StandardSave(carry), custom_metadata=about)
                said.send(f"save {done}")
    said.send(f"end {digest(carry)}")


@contextlib.contextmanager
def process(place: Path, name: str, every: int) -> Iterator[tuple[BaseProcess, Any]]:
    """Training with its checkpoints in a folder of that name, and where it says its lines."""
    said, its_end = SERVER.Pipe(duplex=False)
    # A cache of its own: a killed process may leave half an entry behind.
    arguments = (str(place / name), STEPS, every, str(place / "cache"), its_end)
    run = SERVER.Process(target=train, args=arguments)
    run.start()
    its_end.close()
    try:
        with said:
            yield run, said
    finally:
        run.kill()
        run.join()


def finished(place: Path, name: str, every: int) -> list[str]:
    """The lines of a process that nobody kills."""
    lines = []
    with process(place, name, every) as (run, said):
        with contextlib.suppress(EOFError):
            while said.poll(timeout=120):
                lines.append(said.recv())
        run.join(timeout=120)
        assert run.exitcode == 0
    return lines


def start(line: str) -> int:
    """The step from which a process says that it goes on."""
    word, step = line.split()
    assert word == "start"
    return int(step)


def test_a_killed_run_ends_where_an_undisturbed_one_does(tmp_path: Path) -> None:
    expected = finished(tmp_path, "undisturbed", STEPS)
    assert start(expected[0]) == 0
    chance = random.Random(0)
    starts = []
    for _ in range(KILLS):
        with process(tmp_path, "killed", EVERY) as (run, said):
            lines = [said.recv() for _ in range(1 + chance.randrange(5))]  # "start" and up to 4 times "save"
            time.sleep(chance.choice([0, chance.random() / 10]))
            run.kill()
            run.join()
            assert run.exitcode == -signal.SIGKILL
        starts.append(start(lines[0]))
    assert starts == sorted(starts), "a complete checkpoint was lost"
    assert starts[0] == 0 < starts[-1] < STEPS
    last = finished(tmp_path, "killed", STEPS)
    assert start(last[0]) >= starts[-1]
    assert last[-1] == expected[-1]
    assert last[-1].startswith("end ")
