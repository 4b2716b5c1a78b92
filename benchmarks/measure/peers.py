"""The optimizers that are measured, in one table, and the machine's copy, each turned into a runner."""

import concurrent.futures
import dataclasses
import functools
import importlib
import importlib.util
import math
import time
import typing
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from measure import scripts, workloads

import adam_fn

RATE = 1e-3
Tree: typing.TypeAlias = typing.Any  # Any pytree.
#: (params, state, gradients or a batch) -> (params, state)
Step = Callable[..., tuple[Tree, optax.OptState]]


def plain(tx: optax.GradientTransformation) -> Step:
    """The step that a user writes around any optax transformation."""

    def step(params: Tree, state: optax.OptState, grads: Tree) -> tuple[Tree, optax.OptState]:
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    return step


def plain_step(tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    return jax.jit(plain(tx), donate_argnums=(0, 1))


def training_step(tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    """Loss, gradients, update: the same program for every optimizer."""

    def step(params: Tree, state: optax.OptState, batch: Tree) -> tuple[Tree, optax.OptState]:
        return plain(tx)(params, state, jax.grad(workloads.loss)(params, batch))

    return jax.jit(step, donate_argnums=(0, 1))


def loop_step(tx: optax.GradientTransformation) -> jax.stages.Wrapped:
    """A hundred steps in a loop, as solvers take them, with the parameters as their own gradients."""

    def steps(params: Tree, state: optax.OptState, grads: Tree) -> tuple[Tree, optax.OptState]:
        def step(carry: tuple[Tree, optax.OptState, jax.Array]) -> tuple[Tree, optax.OptState, jax.Array]:
            params, state, count = carry
            return *plain(tx)(params, state, params), count + 1

        return jax.lax.while_loop(lambda carry: carry[2] < 100, step, (params, state, jnp.int32(0)))[:2]

    return jax.jit(steps)


Way = Callable[[optax.GradientTransformation], Step]
#: The step around a transformation for each kind of case.
WAYS: dict[str, Way] = {"tree": plain_step, "eager": plain, "training": training_step, "loop": loop_step}


@dataclasses.dataclass(frozen=True)
class JaxPeer:
    """An optax transformation and the step around it, where it is not that of the case's kind.

    `leaves`: the most in a case, where it takes long to compile.
    """

    name: str
    tx: optax.GradientTransformation
    kinds: tuple[workloads.Kind, ...] = ("tree",)
    step: Way | None = None
    leaves: float = math.inf

    def step_of(self, case: workloads.Case) -> Step:
        return (self.step or WAYS[case.kind])(self.tx)

    def program(self, case: workloads.Case) -> tuple[jax.stages.Wrapped, tuple[object, ...]]:
        """The step, made anew, and the shapes that it is compiled for."""
        params = {name: jax.ShapeDtypeStruct(shape, case.dtype) for name, shape in case.shapes.items()}
        inputs = jax.eval_shape(lambda: workloads.images(case, 1)) if case.kind == "training" else params
        step = typing.cast(jax.stages.Wrapped, self.step_of(case))
        return step, (params, jax.eval_shape(self.tx.init, params), inputs)


STORAGES: tuple[adam_fn.StorageName, ...] = ("bfloat16", "24bit", "16bit")
JAX_PEERS = (
    JaxPeer("optax", optax.adam(RATE), ("tree", "eager", "training", "loop")),
    JaxPeer("adam_fn", adam_fn.adam(RATE), ("tree", "eager", "training", "loop")),
    JaxPeer("adam_fn make_step", adam_fn.adam(RATE), ("tree", "eager"), adam_fn.make_step),
    *(
        JaxPeer(f"adam_fn {name}{way}", adam_fn.adam(RATE, storage=storage), step=step, leaves=200)
        for storage, name in zip(STORAGES, ("bfloat16 moments", "24-bit state", "16-bit state"), strict=True)
        for way, step in (("", adam_fn.make_step), (", update and apply", None))
    ),
)
#: The implementations of torch.optim.Adam.
TORCH_PEERS = {"torch fused": {"fused": True}, "torch foreach": {"foreach": True}}


@dataclasses.dataclass
class Runner:
    """One peer at work. `step` takes what it returned the last time; `wait` waits for that.

    `given` are the bytes of gradients and, twice, of parameters: a step reads and writes at least them and the state.
    """

    name: str
    step: Callable[[typing.Any], object]
    carry: object = None
    wait: Callable[[object], object] = jax.block_until_ready
    state_bytes: int = 0
    given: int = 0

    @property
    def traffic(self) -> int:
        """The least a step can move: all read once, parameters and state written once, each in its own dtype."""
        return self.given + 2 * self.state_bytes

    def seconds(self, steps: int) -> float:
        """Runs so many steps."""
        start = time.perf_counter()
        for _ in range(steps):
            self.carry = self.step(self.carry)
        self.wait(self.carry)
        return time.perf_counter() - start


def jax_runner(peer: JaxPeer, step: Step, params: Tree, inputs: Tree) -> Runner:
    """A runner that carries its own parameters and state through `step`."""
    own = jax.tree.map(jnp.copy, params)
    carry = (own, state := peer.tx.init(own))

    def advance(carry: tuple[Tree, optax.OptState]) -> object:
        return step(*carry, inputs)

    return Runner(
        peer.name, advance, carry, state_bytes=workloads.held(state), given=workloads.held((inputs, params, params))
    )


def torch_device() -> str | None:
    """The device on which torch can be compared with JAX, of the same kind; None if there is none."""
    if importlib.util.find_spec("torch") is None:
        return None
    torch = importlib.import_module("torch")
    if jax.devices()[0].platform == "cpu":
        torch.set_num_threads(scripts.cores())
        return "cpu"
    return "cuda" if torch.cuda.is_available() else None


def torch_runner(name: str, case: workloads.Case, params: Tree, inputs: Tree) -> Runner:
    """torch.optim.Adam over the same leaves; the gradients share JAX's memory."""
    torch = importlib.import_module("torch")
    device = typing.cast(str, torch_device())
    leaves = {key: torch.from_dlpack(leaf).to(device).clone().requires_grad_() for key, leaf in params.items()}
    optimizer = torch.optim.Adam(list(leaves.values()), lr=RATE, **TORCH_PEERS[name])

    functional = importlib.import_module("torch.nn.functional")
    given = jax.tree.map(lambda array: torch.from_dlpack(array).to(device), inputs)
    if training := case.kind == "training":
        given = given[0], given[1].long()
    else:
        for key, leaf in leaves.items():
            leaf.grad = given[key]

    def step(_: object) -> object:
        if training:
            optimizer.zero_grad(set_to_none=True)
            hidden = functional.relu(torch.addmm(leaves["b1"], given[0], leaves["w1"]))
            hidden = functional.relu(torch.addmm(leaves["b2"], hidden, leaves["w2"]))
            logits = torch.addmm(leaves["b3"], hidden, leaves["w3"])
            functional.cross_entropy(logits, given[1]).backward()
        return optimizer.step()

    wait = torch.cuda.synchronize if device == "cuda" else bool
    step(None)  # the state exists after the first step
    slots = [value for own in optimizer.state.values() for value in own.values() if torch.is_tensor(value)]
    state = sum(value.nbytes for value in slots)
    return Runner(name, step, wait=wait, state_bytes=state, given=workloads.held((inputs, params, params)))


def limits(traffic: int) -> list[Runner]:
    """The machine's own speed at `traffic` bytes, half of them read and half written: a copy from one array to another,
    and a change of one array in place, by all cores or by the accelerator.
    """
    count = max(traffic // 8, 1)
    if jax.devices()[0].platform != "cpu":
        array = jnp.ones(count, jnp.float32)
        duplicate, negate = jax.jit(jnp.copy), jax.jit(jnp.negative, donate_argnums=0)
        found = [Runner("copy", lambda _: duplicate(array)), Runner("in place", negate, jnp.copy(array))]
    else:
        # Ones, not zeros: pages of zeros that were never written are all the same page of memory.
        threads = scripts.cores()
        source, target = (np.array_split(np.ones(count, np.float32), threads) for _ in range(2))
        pool = concurrent.futures.ThreadPoolExecutor(threads)
        found = [
            Runner("copy", lambda _: [*pool.map(np.copyto, target, source)], wait=bool),
            Runner("in place", lambda _: [*pool.map(np.negative, source, source)], wait=bool),
        ]
    return [dataclasses.replace(runner, given=8 * count) for runner in found]


def jax_peers(case: workloads.Case) -> list[JaxPeer]:
    return [peer for peer in JAX_PEERS if case.kind in peer.kinds and len(case.shapes) <= peer.leaves]


def runners(case: workloads.Case) -> list[Runner]:
    """Every peer of a case whose steps run; the gradients or the batch are shared, nothing else is."""
    training = case.kind == "training"
    params = workloads.weights(case.shapes, 0) if training else case.tree(0, 0.02)
    inputs = workloads.images(case, 1) if training else case.tree(1, 0.01)
    found = [jax_runner(peer, peer.step_of(case), params, inputs) for peer in jax_peers(case)]
    found += [torch_runner(name, case, params, inputs) for name in TORCH_PEERS if torch_device()]
    traffic = next(runner.traffic for runner in found if runner.name == "optax")
    return found + limits(traffic) if case.kind == "tree" else found


def updates(case: workloads.Case) -> list[Runner]:
    """The updates alone, outside jit."""
    params, grads = case.tree(0, 0.02), case.tree(1, 0.01)

    def update(tx: optax.GradientTransformation, carry: tuple[Tree, optax.OptState]) -> object:
        return tx.update(grads, carry[1], params)

    alone = (peer for peer in jax_peers(case) if peer.step is None)
    return [Runner(peer.name, functools.partial(update, peer.tx), (None, peer.tx.init(params))) for peer in alone]
