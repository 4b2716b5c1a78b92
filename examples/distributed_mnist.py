"""The MLP of mnist_mlp.py, trained by AdamW on many processes: each device has a part of every batch, and of the
optimizer's state (ZeRO-1).

    python examples/distributed_mnist.py                  # one process and all of its devices
    python examples/distributed_mnist.py --local 2        # two processes here, of four CPU devices each
    srun python examples/distributed_mnist.py --cluster --checkpoint run    # Slurm, Open MPI, Cloud TPU, Kubernetes
    python examples/distributed_mnist.py --coordinator host0:1234 --processes 2 --process 0    # any others, one by one

The course of a run is that of one device, up to the rounding of the sums over a batch. If a process is lost, JAX's
runtime ends the others, which else would wait for ever, within `--timeout` seconds; it gives the number of the lost one
("The following tasks are unhealthy"), or says that it was the leader, process 0. The same command again goes on from
the last complete checkpoint, on as many processes and devices as there are then. `--checkpoint` is a folder that all
processes see.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import zlib
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from loaders import mnist
from loaders.mnist import Dataset
from mnist_mlp import CLASSES, MLP, Metrics, Parameters, cost_and_metrics, epoch_of
from numpy.typing import NDArray
from support import report
from support.checkpoints import Checkpoints, OtherRunError
from support.command_line import Parser, real, whole
from support.report import Run

import adam_fn

NAME = "distributed_mnist.py"
LOCAL_DEVICES = 4  # of each process of --local


class Trained(NamedTuple):
    run: Run
    params: Parameters  # whole on every device
    state: optax.OptState  # divided over the devices


@partial(jax.jit, static_argnames=("graph", "tx"), donate_argnames=("params", "state"))
def train_step(
    params: Parameters,
    state: optax.OptState,
    images: jax.Array,
    labels: jax.Array,
    *,
    graph: nnx.GraphDef[MLP],
    tx: optax.GradientTransformation,
) -> tuple[Parameters, optax.OptState, Metrics]:
    """One update in place. It reads as on one device: the means over the batch are over all of them."""
    (_, metrics), grads = jax.value_and_grad(cost_and_metrics, has_aux=True)(params, graph, images, labels)
    updates, state = tx.update(grads, state, params)
    return cast(Parameters, optax.apply_updates(params, updates)), state, metrics


@partial(jax.jit, static_argnames="graph")
def evaluate(params: Parameters, images: jax.Array, labels: jax.Array, *, graph: nnx.GraphDef[MLP]) -> Metrics:
    """Of the images whose labels are not negative."""
    real = labels >= 0
    logits = nnx.merge(graph, params)(images.astype(jnp.float32) / 255)
    costs = optax.softmax_cross_entropy_with_integer_labels(logits, jnp.maximum(labels, 0))
    return Metrics(jnp.mean(costs, where=real), jnp.mean(logits.argmax(-1) == labels, where=real))


def train(dataset: Dataset, options: Namespace) -> Trained:
    """Every process of the job calls this with the same arguments; what it returns is the same in each."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    everywhere, divided = NamedSharding(mesh, PartitionSpec()), NamedSharding(mesh, PartitionSpec("data"))

    def spread(rows: NDArray[np.uint8 | np.int32], numbers: NDArray[np.int64]) -> jax.Array:
        """rows[numbers], of which each device gets its part: a process reads no others."""
        shape = (len(numbers), *rows.shape[1:])
        return jax.make_array_from_callback(shape, divided, lambda index: rows[numbers[index[0]]])  # pyright: ignore[reportOptionalSubscript]

    def init() -> Parameters:
        return nnx.to_pure_dict(nnx.state(MLP(dataset.pixels, options.width, rngs=nnx.Rngs(options.seed)), nnx.Param))

    size = len(dataset.train_labels)
    steps = min(size // options.batch, options.steps or size)
    graph = nnx.graphdef(nnx.eval_shape(lambda: MLP(dataset.pixels, options.width, rngs=nnx.Rngs(0))))
    params: Parameters = jax.jit(init, out_shardings=everywhere)()
    rate = optax.cosine_decay_schedule(options.learning_rate, steps * options.epochs)
    tx = adam_fn.zero1(adam_fn.adamw(rate, weight_decay=options.weight_decay), params, mesh, "data")
    state = jax.jit(tx.init)(params)

    def padded(rows: NDArray[np.uint8 | np.int32], value: int) -> jax.Array:
        rest = -len(rows) % mesh.size
        rows = np.pad(rows, [(0, rest)] + [(0, 0)] * (rows.ndim - 1), constant_values=value)
        return spread(rows, np.arange(len(rows)))

    test = padded(dataset.test_images, 0), padded(dataset.test_labels, -1)
    run = Run("adamw", "AdamW, ZeRO-1", options.learning_rate, options.weight_decay, "cosine")
    checkpoints = None
    if options.checkpoint is not None:
        decisive = {name: getattr(options, name) for name in ("epochs", "batch", "width", "seed", "learning_rate")}
        decisive |= {"data": dataset.name, "steps": steps, "weight_decay": options.weight_decay}
        checkpoints = Checkpoints(options.checkpoint, decisive, tx, jax.eval_shape(init))
        if (last := checkpoints.last((params, state))) is not None:
            (params, state), record = last
            run = Run.of(record)
            say(f"resumed from {options.checkpoint} after epoch {len(run.epochs)}/{options.epochs}")

    for epoch in range(len(run.epochs) + 1, options.epochs + 1):
        order = np.random.default_rng((options.seed, epoch)).permutation(size)  # The same in every process.
        metrics: list[Metrics] = []
        start = time.perf_counter()
        for batch in order[: steps * options.batch].reshape(steps, options.batch):
            images, labels = spread(dataset.train_images, batch), spread(dataset.train_labels, batch)
            params, state, seen = train_step(params, state, images, labels, graph=graph, tx=tx)
            metrics.append(seen)
        jax.block_until_ready(metrics)
        seconds = time.perf_counter() - start
        tested = evaluate(params, *test, graph=graph)
        run.step_costs += [float(seen.cost) for seen in metrics]
        run.epochs.append(epoch_of(epoch, metrics, tested, seconds, steps * options.batch))
        if checkpoints is not None:
            checkpoints.save(epoch, (params, state), asdict(run))
        say(report.epoch_line(run, options.epochs))
    return Trained(run, params, state)


def check_same(dataset: Dataset, options: Namespace) -> None:
    """Raises where processes have other options or data, or see other checkpoints."""
    seen = sorted(x.name for x in options.checkpoint.glob("[0-9]*")) if options.checkpoint else []
    own = {"coordinator", "process", "out"}  # May differ.
    ours = {name: value for name, value in vars(options).items() if name not in own}
    ours |= {"data": (dataset.name, len(dataset.train_labels)), "checkpoints": seen}
    digests = multihost_utils.process_allgather(np.uint32(zlib.crc32(repr(ours).encode())))
    if other := [i for i, digest in enumerate(digests) if digest != digests[0]]:
        raise ValueError(f"processes {other} have other options or data than process 0, or see other checkpoints")


def say(text: str) -> None:
    """Once for the whole job."""
    if jax.process_index() == 0:
        print(text, flush=True)


def local(processes: int, argv: Sequence[str]) -> int:
    """The script in so many processes here, until all have ended or one has failed. Returns the exit status."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={LOCAL_DEVICES}"
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    cluster = ["--local=0", f"--coordinator=localhost:{port}", f"--processes={processes}"]
    job: list[subprocess.Popen[bytes]] = []
    try:
        for i in range(processes):
            job.append(subprocess.Popen([sys.executable, __file__, *argv, *cluster, f"--process={i}"], env=env))
            print(f"process {i} of {processes}: started here, pid {job[i].pid}", flush=True)
        while True:
            for i, process in enumerate(job):
                if code := process.poll():
                    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
                    print(f"{NAME}: error: process {i} of {processes} was lost: {how}", file=sys.stderr)
                    return 1
            if all(process.poll() == 0 for process in job):
                return 0
            time.sleep(0.1)
    finally:
        for process in job:
            process.kill()  # JAX takes SIGTERM for a notice and goes on.
            process.wait()


def parse(argv: Sequence[str] | None) -> Namespace:
    parser = Parser(prog=NAME, description="Data-parallel training on many processes, the optimizer's state divided")
    add = parser.add_argument
    add("--local", type=whole(0), metavar="N", help=f"start N processes here, of {LOCAL_DEVICES} CPU devices each")
    add("--cluster", action="store_true", help="this is one of the processes that Slurm, Open MPI, Kubernetes or a "
        "Cloud TPU started")  # fmt: skip
    add("--coordinator", metavar="HOST:PORT", help="of process 0, where nothing tells it; with --processes, --process")
    add("--processes", type=whole(1), metavar="N", help="how many there are")
    add("--process", type=whole(0), metavar="I", help="which of them this is, from 0")
    add("--timeout", type=whole(2), default=30, metavar="S", help="seconds without a sign of life after which a "
        "process counts as lost (default: 30)")  # fmt: skip
    add("--learning-rate", type=real, default=1e-3, metavar="RATE", help="at first; a cosine (default: 0.001)")
    add("--weight-decay", type=real, default=1e-2, metavar="DECAY", help="times the rate (default: 0.01)")
    add("--epochs", type=whole(1), metavar="N", help="default: 5")
    add("--batch", type=whole(1), default=128, metavar="N", help="images a step, of all devices (default: 128)")
    add("--width", type=whole(1), metavar="N", help="of both hidden layers (default: 1000)")
    add("--seed", type=whole(0), default=0, metavar="N", help="of the initialisation and the shuffles (default: 0)")
    add("--data", metavar="FOLDER", help="as for mnist_mlp.py")
    add("--out", type=Path, default=Path("out"), metavar="FOLDER", help="for the plot and the numbers (default: out)")
    add("--checkpoint", type=Path, metavar="FOLDER", help="save there after every epoch, and go on from there")
    add("--quick", action="store_true", help="a trial of 2 epochs of at most 20 steps, 64 units wide")
    given = parser.parse_args(argv)
    if len({x is None for x in (given.coordinator, given.processes, given.process)}) > 1:
        parser.error("--coordinator, --processes and --process are given together")
    if bool(given.local) + given.cluster + (given.coordinator is not None) > 1:
        parser.error("--local, --cluster and --coordinator exclude one another")
    given.steps = 20 if given.quick else None  # At most so many an epoch.
    given.epochs = given.epochs or (2 if given.quick else 5)
    given.width = given.width or (64 if given.quick else 1000)
    return given


def main(argv: Sequence[str] | None = None) -> Trained:
    """Trains as one process of the job; with --local, starts them all and exits."""
    argv = sys.argv[1:] if argv is None else argv
    options = parse(argv)
    if options.local:
        sys.exit(local(options.local, argv))
    if options.cluster or options.coordinator:
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(
            options.coordinator,
            options.processes,
            options.process,
            heartbeat_timeout_seconds=options.timeout,
            shutdown_timeout_seconds=options.timeout,
        )
    device = jax.devices()[0].device_kind
    me, processes, devices = jax.process_index(), jax.process_count(), jax.device_count()
    # By this number the runtime calls a process that it has lost; here is where that one was.
    print(f"process {me} of {processes}: {socket.gethostname()}, pid {os.getpid()}, {jax.local_device_count()} of the "
          f"{devices} devices, {device}", flush=True)  # fmt: skip
    try:
        dataset = mnist.load(options.data)
        if options.batch > len(dataset.train_labels):
            raise ValueError(f"--batch {options.batch} is more than the {len(dataset.train_labels)} training images")
        if options.batch % devices:
            raise ValueError(f"--batch {options.batch} cannot be divided by the {devices} devices")
        check_same(dataset, options)
        options.out.mkdir(parents=True, exist_ok=True)
    except (OSError, ValueError) as error:
        sys.exit(f"{NAME}: error: process {me} of {processes}: {error}")
    try:
        trained = train(dataset, options)
    except OtherRunError as error:
        sys.exit(f"{NAME}: error: process {me} of {processes}: {error}")
    except jax.errors.JaxRuntimeError as error:
        if processes == 1:
            raise
        print(f"{NAME}: error: process {me} of {processes}: {error}", file=sys.stderr, flush=True)
        # Probably another one is gone. If this one went too, it would itself count as lost: the runtime needs a while
        # to find out which one was, says so and ends this process.
        time.sleep(2 * options.timeout)
        raise
    if me == 0:
        sizes = f"{dataset.pixels}-{options.width}-{options.width}-{CLASSES}"
        title = f"MLP {sizes} on {dataset.name}, batch {options.batch} on {devices} devices, seed {options.seed}"
        print(f"\n{report.table([trained.run])}\n")
        png, numbers = options.out / "distributed_mnist.png", options.out / "distributed_mnist.json"
        report.plot_run(png, trained.run, title)
        about = {"dataset": dataset.name, "batch": options.batch, "seed": options.seed, "device": device}
        about |= {"processes": processes, "devices": devices}
        report.write_json(numbers, about, [trained.run])
        print(f"wrote {png} and {numbers}")
    return trained


if __name__ == "__main__":
    main()
