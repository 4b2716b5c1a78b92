"""Short trainings of other people's libraries, with optax and with its names replaced by adam_fn's: the same numbers.

    python .ci/peers.py

Needs NumPyro, optimistix, blackjax, haliax and NetKet beside adam_fn. Each training runs in a process of its own, once
as the library is and once with ``optax.adam`` and the others replaced before the library is imported.
"""

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

NAMES = ("adam", "adamw", "nadam", "nadamw", "adamax", "adamaxw", "radam", "yogi", "adabelief", "lion", "lamb")
NAMES += tuple(f"scale_by_{name}" for name in ("adam", "adamax", "belief", "yogi", "radam", "lion"))


def _is_ours(function: Any) -> bool:
    return function.__module__.startswith("adam_fn")


def numpyro() -> dict[str, Any]:
    """Stochastic variational inference of a regression."""
    import jax
    import jax.numpy as jnp
    import numpyro.distributions as dist
    import optax
    from numpyro import sample
    from numpyro.infer import SVI, Trace_ELBO
    from numpyro.infer.autoguide import AutoNormal

    traced = []

    def model(x: Any, y: Any = None) -> None:
        traced.append(1)
        weights = sample("weights", dist.Normal(jnp.zeros(3), 1).to_event(1))
        sample("y", dist.Normal(x @ weights, 0.1), obs=y)

    x = jax.random.normal(jax.random.key(0), (64, 3))
    svi = SVI(model, AutoNormal(model), optax.adam(1e-2), Trace_ELBO())
    result = svi.run(jax.random.key(1), 300, x, x @ jnp.arange(3.0), progress_bar=False)
    return {"values": result.params["weights_auto_loc"], "traces": len(traced)}


def optimistix() -> dict[str, Any]:
    """The minimum of a function, for three learning rates that are arrays."""
    import equinox as eqx
    import jax.numpy as jnp
    import optax
    import optimistix as optx

    traced = []

    def loss(y: Any, args: Any) -> Any:
        traced.append(1)
        return jnp.sum((y - 1) ** 2)

    @eqx.filter_jit
    def run(solver: Any) -> Any:
        return optx.minimise(loss, solver, jnp.zeros(2), max_steps=60, throw=False).value

    values = [run(optx.OptaxMinimiser(optax.adam(jnp.asarray(rate)), 1e-6, 1e-6)) for rate in (0.1, 0.05, 0.02)]
    return {"values": jnp.concatenate(values), "traces": len(traced)}


def blackjax() -> dict[str, Any]:
    """Mean-field variational inference of a normal distribution."""
    import blackjax as library
    import jax
    import jax.numpy as jnp
    import optax

    traced = []

    def density(x: Any) -> Any:
        traced.append(1)
        return -0.5 * jnp.sum((x["x"] - jnp.asarray([1.0, -2.0])) ** 2)

    algorithm = library.meanfield_vi(density, optax.adam(1e-2), 10)
    state = algorithm.init({"x": jnp.zeros(2)})
    step = jax.jit(lambda key, state: algorithm.step(key, state)[0])
    for i in range(200):
        state = step(jax.random.key(i), state)
    return {"values": state.mu["x"], "traces": len(traced)}


def haliax() -> dict[str, Any]:
    """A linear layer with named axes, in Equinox, divided over a mesh of eight devices."""
    import equinox as eqx
    import haliax as hax
    import haliax.nn as hnn
    import jax
    import optax

    jax.config.update("jax_num_cpu_devices", 8)
    traced = []
    batch, inside, outside = hax.make_axes(batch=16, inside=16, outside=8)
    mesh = jax.make_mesh((4, 2), ("fsdp", "tp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

    def train(tx: Any) -> Any:
        layer = hax.shard(hnn.Linear.init(inside, outside, key=jax.random.key(0)))
        x = hax.random.normal(jax.random.key(1), (batch, inside))
        state = hax.named_jit(tx.init)(layer)

        @hax.named_jit
        def step(layer: Any, state: Any) -> Any:
            traced.append(1)
            grads = eqx.filter_grad(lambda layer: hax.mean(hax.square(layer(x) - 1)).scalar())(layer)
            updates, state = tx.update(grads, state, layer)
            return eqx.apply_updates(layer, updates), state

        for _ in range(30):
            layer, state = step(layer, state)
        weight = layer.weight.array
        for moment in (x for x in jax.tree.leaves(state) if x.shape == weight.shape):
            assert moment.sharding == weight.sharding, (moment.sharding, weight.sharding)
        return weight.ravel()

    with hax.axis_mapping({"inside": "fsdp", "outside": "tp"}), jax.set_mesh(mesh):
        values = train(optax.adamw(1e-2))
        if _is_ours(optax.adamw):
            import adam_fn

            for storage in ("24bit", "16bit"):
                near = train(adam_fn.master_weights(adam_fn.adamw(1e-2, storage=storage)))
                assert abs(near - values).max() < 0.02, storage
            traced = traced[: len(traced) // 3]
    return {"values": values, "traces": len(traced)}


def netket() -> dict[str, Any]:
    """The ground state of a spin chain, by a wave function with complex parameters."""
    import jax
    import jax.numpy as jnp
    import netket as nk
    import optax

    graph = nk.graph.Chain(length=6)
    space = nk.hilbert.Spin(s=0.5, N=graph.n_nodes)
    state = nk.vqs.FullSumState(space, nk.models.RBM(alpha=1, param_dtype=complex), seed=1)
    tx = optax.adam(1e-2, **({"complex": "magnitude"} if _is_ours(optax.adam) else {}))
    driver = nk.driver.VMC(nk.operator.IsingJax(space, graph, h=1.0), tx, variational_state=state)
    driver.run(60, show_progress=False, out=None)
    values = jnp.concatenate([jnp.ravel(x) for x in jax.tree.leaves(state.parameters)])
    return {"values": jnp.concatenate([values.real, values.imag]), "traces": 0}


TRAININGS: dict[str, Callable[[], dict[str, Any]]] = {
    "numpyro": numpyro,
    "optimistix": optimistix,
    "blackjax": blackjax,
    "haliax": haliax,
    "netket": netket,
}


def run(name: str, kind: str) -> dict[str, Any]:
    """A training in a process of its own."""
    done = subprocess.run([sys.executable, __file__, name, kind], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} with {kind} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    if len(sys.argv) == 3:
        name, kind = sys.argv[1:]
        if kind == "adam_fn":
            import optax

            import adam_fn

            for replaced in NAMES:
                setattr(optax, replaced, getattr(adam_fn, replaced))
        found = TRAININGS[name]()
        print(json.dumps({"values": [float(x) for x in found["values"]], "traces": found["traces"]}))
        return
    for name in TRAININGS:
        theirs, ours = (run(name, kind) for kind in ("optax", "adam_fn"))
        difference = max(abs(x - y) for x, y in zip(theirs["values"], ours["values"], strict=True))
        assert difference < 1e-4, (name, theirs, ours)
        assert ours["traces"] <= theirs["traces"], (name, theirs["traces"], ours["traces"])
        print(f"{name}: the same numbers to {difference:.1e}, {ours['traces']} traces ({theirs['traces']})")


if __name__ == "__main__":
    main()
