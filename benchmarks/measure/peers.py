"""Who is measured: one table of optimizers and the machine's copy, each turned into a runner."""

import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import machine, workloads

import adam_fn

RATE = 1e-3
REFERENCE = "optax"
LIMITS = ("copy", "in place")
Tree = optax.Params
Leaves = dict[str, jax.Array]
Batch = tuple[jax.Array, jax.Array]  # pixels, labels
Step = Callable[[Tree, optax.OptState, Tree], tuple[Tree, optax.OptState]]


class JittedStep(typing.Protocol):
    """A step that jax.jit made, as far as it is used here."""

    def __call__(self, params: Tree, state: optax.OptState, inputs: Tree, /) -> tuple[Tree, optax.OptState]: ...

    def trace(self, *arguments: object) -> jax.stages.Traced: ...


def plain_step(tx: optax.GradientTransformation) -> JittedStep:
    """What a user writes around any optax transformation."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: optax.OptState, grads: Tree) -> tuple[Tree, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def training_step(tx: optax.GradientTransformation) -> JittedStep:
    """Loss, gradients, update: the same program for every optimizer."""

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Tree, optax.OptState]:
        grads = jax.grad(workloads.loss)(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def made_step(tx: optax.GradientTransformation) -> JittedStep:
    """adam_fn's own step."""
    return typing.cast(JittedStep, adam_fn.make_step(tx))


@dataclasses.dataclass(frozen=True)
class JaxPeer:
    """An optax transformation and the step around it; `leaves`: the most in a case, where it takes long to compile."""

    name: str
    build: Callable[[], optax.GradientTransformation]
    step: Callable[[optax.GradientTransformation], JittedStep] = plain_step
    kinds: tuple[workloads.Kind, ...] = ("tree",)
    dtypes: tuple[str, ...] = ("float32", "bfloat16")
    leaves: int | None = None


@dataclasses.dataclass(frozen=True)
class TorchPeer:
    """torch.optim.Adam with one of its implementations."""

    name: str
    options: dict[str, bool]
    kinds: tuple[workloads.Kind, ...] = ("tree", "eager", "training")


JAX_PEERS = (
    JaxPeer("optax", lambda: optax.adam(RATE), kinds=("tree", "eager", "training")),
    JaxPeer("adam_fn", lambda: adam_fn.adam(RATE), kinds=("tree", "eager", "training")),
    JaxPeer("adam_fn make_step", lambda: adam_fn.adam(RATE), made_step, kinds=("tree", "eager")),
    JaxPeer(
        "adam_fn bfloat16 moments",
        lambda: adam_fn.adam(RATE, storage="bfloat16"),
        made_step,
        leaves=200,
    ),
    JaxPeer("adam_fn 24-bit state", lambda: adam_fn.adam(RATE, storage="24bit"), made_step, leaves=200),
    JaxPeer("adam_fn 16-bit state", lambda: adam_fn.adam(RATE, storage="16bit"), made_step, leaves=200),
)
TORCH_PEERS = (TorchPeer("torch fused", {"fused": True}), TorchPeer("torch foreach", {"foreach": True}))


@dataclasses.dataclass
class Runner:
    """One peer at work. `advance` does one step and returns what `wait` must wait for.

    `traffic` is the least a step can move: gradients, parameters and state read once, parameters and state written
    once, each in its own dtype.
    """

    name: str
    advance: Callable[[], object]
    wait: Callable[[object], object]
    state_bytes: int = 0
    traffic: int = 0

    def run(self, steps: int) -> None:
        done = None
        for _ in range(steps):
            done = self.advance()
        self.wait(done)


def size(tree: object) -> int:
    """Bytes of a tree's arrays."""
    return sum(leaf.nbytes for leaf in jax.tree.leaves(tree) if hasattr(leaf, "nbytes"))


def _traffic(inputs: int, params: int, state: int) -> int:
    return inputs + 2 * params + 2 * state


def jax_runner(name: str, step: Step, params: Tree, state: optax.OptState, inputs: Tree) -> Runner:
    """A runner that carries its own parameters and state through `step`."""
    carry = (params, state)

    def advance() -> object:
        nonlocal carry
        carry = step(*carry, inputs)
        return carry

    return Runner(name, advance, jax.block_until_ready, size(state), _traffic(size(inputs), size(params), size(state)))


def update_runner(name: str, tx: optax.GradientTransformation, params: Tree, grads: Tree) -> Runner:
    """A runner of `tx.update` alone, outside jit."""
    state = tx.init(params)
    nbytes = size(state)

    def advance() -> object:
        nonlocal state
        updates, state = tx.update(grads, state, params)
        return updates, state

    return Runner(name, advance, jax.block_until_ready, nbytes)


def eager_step(tx: optax.GradientTransformation) -> Step:
    """Update and apply, outside jit."""

    def step(params: Tree, state: optax.OptState, grads: Tree) -> tuple[Tree, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def torch_device() -> str | None:
    """Where torch can be compared with JAX: the same kind of device, else None."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    if jax.devices()[0].platform == "cpu":
        torch.set_num_threads(machine.cores())
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def torch_runner(peer: TorchPeer, case: workloads.Case, params: Leaves, inputs: Leaves | Batch) -> Runner:
    """torch.optim.Adam over the same leaves; the gradients share JAX's memory."""
    torch = importlib.import_module("torch")
    device = typing.cast(str, torch_device())
    leaves = {name: torch.from_dlpack(leaf).to(device).clone().requires_grad_() for name, leaf in params.items()}
    optimizer = torch.optim.Adam(list(leaves.values()), lr=RATE, **peer.options)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None

    if case.kind == "training":
        functional = importlib.import_module("torch.nn.functional")
        pixels, labels = (torch.from_dlpack(array).to(device) for array in typing.cast(Batch, inputs))
        labels = labels.long()

        def advance() -> object:
            optimizer.zero_grad(set_to_none=True)
            hidden = functional.relu(torch.addmm(leaves["b1"], pixels, leaves["w1"]))
            hidden = functional.relu(torch.addmm(leaves["b2"], hidden, leaves["w2"]))
            logits = torch.addmm(leaves["b3"], hidden, leaves["w3"])
            functional.cross_entropy(logits, labels).backward()
            return optimizer.step()
    else:
        for name, leaf in leaves.items():
            leaf.grad = torch.from_dlpack(typing.cast(Leaves, inputs)[name]).to(device)

        def advance() -> object:
            return optimizer.step()

    advance()  # the state exists after the first step
    state = sum(
        value.nbytes for slots in optimizer.state.values() for value in slots.values() if torch.is_tensor(value)
    )
    return Runner(peer.name, advance, lambda _: wait(), state, _traffic(size(inputs), size(params), state))


def limits(traffic: int) -> list[Runner]:
    """The machine's own speed at `traffic` bytes, half of them read and half written: a copy from one array to another,
    and a change of one array in place, by all cores or by the accelerator.
    """
    count = max(traffic // 8, 1)
    nbytes = 8 * count
    if jax.devices()[0].platform != "cpu":
        array = jnp.ones(count, jnp.float32)
        duplicate, negate = jax.jit(jnp.copy), jax.jit(jnp.negative, donate_argnums=0)
        carry = jnp.ones(count, jnp.float32)

        def in_place() -> object:
            nonlocal carry
            carry = negate(carry)
            return carry

        return [
            Runner("copy", lambda: duplicate(array), jax.block_until_ready, 0, nbytes),
            Runner("in place", in_place, jax.block_until_ready, 0, nbytes),
        ]
    # Ones, not zeros: pages of zeros that were never written are all the same page of memory.
    threads = machine.cores()
    source, target = (np.array_split(np.ones(count, np.float32), threads) for _ in range(2))
    pool = concurrent.futures.ThreadPoolExecutor(threads)
    return [
        Runner("copy", lambda: list(pool.map(np.copyto, target, source)), lambda _: None, 0, nbytes),
        Runner("in place", lambda: list(pool.map(np.negative, source, source)), lambda _: None, 0, nbytes),
    ]


def jax_peers(case: workloads.Case) -> list[JaxPeer]:
    return [
        peer
        for peer in JAX_PEERS
        if case.kind in peer.kinds
        and case.dtype in peer.dtypes
        and (peer.leaves is None or len(case.shapes) <= peer.leaves)
    ]


def torch_peers(case: workloads.Case) -> list[TorchPeer]:
    return [peer for peer in TORCH_PEERS if case.kind in peer.kinds] if torch_device() else []


def runners(case: workloads.Case) -> list[Runner]:
    """Every peer of a `tree` or `training` case; the gradients or the batch are shared, nothing else is."""
    training = case.kind == "training"
    params = workloads.weights(case, 0) if training else case.tree(0, 0.02)
    inputs = workloads.images(case, 1) if training else case.tree(1, 0.01)
    found = []
    for peer in jax_peers(case):
        tx = peer.build()
        step = training_step(tx) if training else peer.step(tx)
        own = jax.tree.map(jnp.copy, params)
        found.append(jax_runner(peer.name, step, own, tx.init(own), inputs))
    found += [torch_runner(peer, case, params, inputs) for peer in torch_peers(case)]
    if not training:
        found += limits(next(runner.traffic for runner in found if runner.name == REFERENCE))
    return found


def eager_runners(case: workloads.Case) -> tuple[list[Runner], list[Runner]]:
    """Runners of the update alone, and of the update with its application, all outside jit."""
    params, grads = case.tree(0, 0.02), case.tree(1, 0.01)
    updates, steps = [], []
    for peer in jax_peers(case):
        tx = peer.build()
        own = jax.tree.map(jnp.copy, params)
        if peer.step is plain_step:
            updates.append(update_runner(peer.name, tx, params, grads))
            steps.append(jax_runner(peer.name, eager_step(tx), own, tx.init(own), grads))
        else:
            steps.append(jax_runner(peer.name, peer.step(tx), own, tx.init(own), grads))
    steps += [torch_runner(peer, case, params, grads) for peer in torch_peers(case)]
    return updates, steps
