"""What is read from compiled programs, and the limits that hold them; no compiler is needed."""

import importlib.metadata
import math
import pathlib
import types
from typing import Any

import compiled
import jax
import pytest
import tables
from cases import CASES
from compilers import limits, several, worker
from compilers.hlo import Array, Program, instruction

TARGETS = [*compiled.TPU, *compiled.GPU]

# As XLA writes it: a loop with an annotated number of trips and one whose condition has it, a call, and a fetch.
HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64,32]{1,0})->f32[64,32]{1,0}}

%fused (param_0: f32[64,32]) -> f32[64,32] {
  %param_0 = f32[64,32]{1,0} parameter(0)
  ROOT %sine = f32[64,32]{1,0} sine(%param_0), metadata={op_name="jit(f)/sin" stack_frame_id=2}
}

%called (a: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  ROOT %copy.1 = f32[64,32]{1,0} copy(%a)
}

%body (b: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %b = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[64,32]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %y = f32[64,32]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], f32[64,32]{1,0}) tuple(%i, %y)
}

%condition (c: (s32[], f32[64,32])) -> pred[] {
  %c = (s32[], f32[64,32]{1,0}) parameter(0)
  %j = s32[] get-tuple-element(%c), index=0
  %constant.3 = s32[]{:T(128)} constant(3)
  ROOT %lt = pred[]{:T(512)} compare(%j, %constant.3), direction=LT
}

ENTRY %main.4 (p: f32[64,32], s: u8[32]) -> f32[64,32] {
  %p = f32[64,32]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %s = u8[32]{0} parameter(1)
  %zero = s32[] constant(0)
  %slice-start = ((u8[32]{0}), u8[8]{0:T(32,128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%s), slice={[0:8]}
  %slice-done = u8[8]{0:T(32,128)(4,1)S(1)} slice-done(%slice-start)
  %joined = u8[8]{0} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %kernel = (f32[64,32]{1,0}, /*index=1*/u8[32]{0}) custom-call(%p, /*index=1*/%s), custom_call_target="tpu_custom_call"
  %first = f32[64,32]{1,0} get-tuple-element(%kernel), index=0
  %tuple.1 = (s32[], f32[64,32]{1,0}) tuple(%zero, %first)
  %while.1 = (s32[], f32[64,32]{1,0}) while(%tuple.1), condition=%condition, body=%body
  %while.2 = (s32[], f32[64,32]{1,0}) while(%while.1), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %small = u8[32]{0} fusion(%s), kind=kLoop, calls=%fused_small, backend_config={"estimated_cycles":"7"}
  %last = f32[64,32]{1,0} get-tuple-element(%while.2), index=1
  ROOT %call = f32[64,32]{1,0} call(%last), to_apply=%called
}
"""


def test_what_a_program_runs() -> None:
    program = Program(HLO)
    leaf = 64 * 32
    # The custom call, a fusion in each loop, the copy in what is called.
    assert program.passes(leaf) == program.passes(leaf // 4) == 4
    assert program.count() == 1 + 3 + 5 + 1 + 1
    assert program.bytes() == 2 * (4 * leaf + 32) + 8 * (2 * 4 * leaf + 4) + 2 * 32 + 2 * 4 * leaf
    assert program.cycles() == 8 * 10 + 7
    assert program.collectives() == []


def test_collectives() -> None:
    line = "  %r = f32[64,32]{1,0} all-gather-start(%p), channel_id=1, dimensions={0}\n"
    line += "  %q = f32[64,32]{1,0} all-gather-done(%r)\n"
    assert Program(HLO.replace("  ROOT %sine", f"{line}  ROOT %sine")).collectives() == ["all-gather-start"]


# As XLA for TPUs writes exchanges: two reduce-scatters in a fusion, an asynchronous all-gather in two kernels, one
# that is not, and what is summed whole.
EXCHANGES_TPU = """\
%gather.1 (param_0.1: f32[1,1,512]) -> f32[4,1,512] {
  %param_0.1 = f32[1,1,512]{2,1,0:T(1,128)S(1)} parameter(0)
  ROOT %all-gather.14 = f32[4,1,512]{2,1,0:T(1,128)} all-gather(%param_0.1), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%async_collective_fusion.16 (param_0.2: f32[1,1,512]) -> f32[4,1,512] {
  %param_0.2 = f32[1,1,512]{2,1,0:T(1,128)S(1)} parameter(0)
  ROOT %all-gather.16 = f32[4,1,512]{2,1,0:T(1,128)S(1)} all-gather(%param_0.2), channel_id=1, dimensions={0}, \
frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.2 (input_0: bf16[512,2048], input_1: bf16[2048,512]) -> (bf16[128,2048], bf16[512,512]) {
  %input_0 = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %input_1 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-reduce.6 = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}) \
all-reduce(%input_0, %input_1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add.clone
}

ENTRY %main.8_spmd (p: f32[2048], q: f32[128,2048], s: f32[]) -> f32[512,2048] {
  %p = f32[2048]{0:T(1024)S(1)} parameter(0)
  %q = f32[128,2048]{1,0:T(8,128)} parameter(1)
  %s = f32[]{:T(128)} parameter(2)
  %all-reduce.1 = (f32[2048]{0:T(1024)S(1)}, f32[]{:T(128)}) all-reduce(%p, %s), channel_id=2, to_apply=%add
  %reduce_scatter.25 = f32[512]{0:T(512)} reduce-scatter(%p), channel_id=1, dimensions={0}, to_apply=%add
  ROOT %all-gather.25 = f32[512,2048]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=1, \
frontend_attributes={async_collective_name="all-gather-start.1"}
}
"""
# And for GPUs: many arrays at once, and results that begin with what is given.
EXCHANGES_GPU = """\
ENTRY %main.8_spmd (p: f32[2048], q: f32[512,2048], s: f32[3]) -> f32[2048] {
  %p = f32[2048]{0} parameter(0)
  %q = f32[512,2048]{1,0} parameter(1)
  %s = f32[3]{0} parameter(2)
  %reduce-scatter-start = ((f32[2048]{0}, f32[512,2048]{1,0}), (f32[512]{0}, f32[128,2048]{1,0})) \
reduce-scatter-start(%p, %q), channel_id=8, dimensions={0}
  %reduce-scatter-done = (f32[512]{0}, f32[128,2048]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = f32[3]{0} all-reduce-start(%s), channel_id=5, to_apply=%add
  %all-reduce-done = f32[3]{0} all-reduce-done(%all-reduce-start)
  %part = f32[512]{0} get-tuple-element(%reduce-scatter-done), index=0
  %all-gather-start = ((f32[512]{0}), (f32[2048]{0})) all-gather-start(%part), channel_id=2, dimensions={0}
  ROOT %all-gather-done = (f32[2048]{0}) all-gather-done(%all-gather-start)
}
"""


def test_exchanges_on_tpu() -> None:
    assert sorted(Program(EXCHANGES_TPU).exchanges()) == [
        ("all-gather", 4 * 2048),
        ("all-gather", 4 * 512 * 2048),
        ("all-reduce", 4 * 2049),
        ("reduce-scatter", 4 * 2048),
        ("reduce-scatter", 2 * 2 * 512 * 2048),
    ]
    # Without their marks they are more, and an all-reduce.
    text = EXCHANGES_TPU.replace("%all-reduce-scatter.2", "%fused").replace('chain_id="0"', "")
    kinds = [kind for kind, _ in Program(text).exchanges()]
    assert [kinds.count(kind) for kind in ("all-gather", "all-reduce", "reduce-scatter")] == [3, 2, 1]


def test_exchanges_on_gpu() -> None:
    assert Program(EXCHANGES_GPU).exchanges() == [
        ("reduce-scatter", 4 * (2048 + 512 * 2048)),
        ("all-reduce", 4 * 3),
        ("all-gather", 4 * 2048),
    ]


def test_what_goes_over_the_bus() -> None:
    text = """\
ENTRY %main.1 (p: f32[8,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0:T(8,128)S(5)} parameter(0)
  %q = u8[32,128]{1,0:S(5)} parameter(1)
  %copy-start = (f32[8,128]{1,0:T(8,128)}, f32[8,128]{1,0:T(8,128)S(5)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done = f32[8,128]{1,0:T(8,128)} copy-done(%copy-start)
  %prefetch = (f32[8,128]{1,0:T(8,128)S(1)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%copy-done)
  %kernel = f32[8,128]{1,0} fusion(%copy-done, %q), kind=kLoop, calls=%fused
  %copy-start.1 = (f32[8,128]{1,0:T(8,128)S(5)}, f32[8,128]{1,0:T(8,128)}, u32[]{:S(2)}) copy-start(%kernel)
  ROOT %copy-done.1 = f32[8,128]{1,0:T(8,128)S(5)} copy-done(%copy-start.1)
}
"""
    assert Program(text).bus() == (4 * 1024 + 32 * 128, 4 * 1024)
    assert Program(text.replace("S(5)", "")).bus() == (0, 0)


def test_instruction() -> None:
    found = instruction(
        "  ROOT %a.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}) fusion(%b, %c.2), kind=kLoop, calls=%f"
    )
    assert found is not None
    assert found.result == (Array("bf16", (2, 3)), Array("s4", (5,)))
    assert [array.bytes for array in found.result] == [12, 2.5]
    assert (found.name, found.opcode, found.operands) == ("a.1", "fusion", ("b", "c.2"))
    assert found.attribute("calls") == "f"
    assert instruction("HloModule jit_step, is_scheduled=true") is None
    branches = instruction("  %x = f32[] conditional(%p, %a, %b), branch_computations={%one, %two.1}")
    assert branches is not None
    assert branches.called == ["one", "two.1"]
    assert Array("pred", ()).bytes == 1 and Array("f8e4m3fn", (4,)).bytes == 4 and Array("c64", (1,)).bytes == 8


def row(target: str, part: str, step: str, way: str = "make_step", **figures: Any) -> dict[str, Any]:
    base = {"temporaries": 0.0, "beside arguments": 0.0, "passes": 1, "bytes": 0.0}
    base |= {"kernels": None, "peak": 16.0, "seconds": 1.0, "cycles": None}
    return {"target": target, "part": part, "step": step, "way": way, **base, **figures}


def everything(**figures: Any) -> list[dict[str, Any]]:
    """Rows of all that the worker compiles, each with these figures."""
    rows = []
    for name in ("tpu", "gpu"):
        own = {"cycles": 1000} if name == "tpu" else {"kernels": 3}
        for target in compiled.COMPILERS[name].targets:
            for step, made in worker.STEPS.items():
                rows += [row(target, compiled.LEAF, step, way, **own, **figures) for way in made.ways]
            for step in worker.GPT2_STEPS:
                rows.append(row(target, compiled.TREE, step, worker.STEPS[step].ways[0], **own, **figures))
            rows += several_rows(target)
    return rows


def several_rows(target: str) -> list[dict[str, Any]]:
    """Those of `zero1` and `offload`, within their limits."""
    device = types.SimpleNamespace(platform="tpu" if target in compiled.TPU else "gpu")
    rows: list[dict[str, Any]] = []
    for name, _ in several.jobs([device]):
        about: dict[str, Any] = {"target": target, **name}
        if about["part"] == compiled.ZERO1:
            size = 2 if about["step"].startswith("masters") else 4
            figures = {
                "reduce-scatter": size,
                "all-gather": size,
                "all-reduce": 0.001,
                "other exchanges": 0,
                "state": 0.25,
            }
        else:
            size = {"masters": 10.0, "Block(8)": 2.125}.get(about["step"], 8.0)
            figures = dict.fromkeys(("on the host", "kept there", "read", "stored"), size) | {
                "saved": 7.95,
                "peak": 10.0,
            }
        if limits.refused(about):
            figures = {"error": "INTERNAL"}
        rows.append({**about, **figures})
    return rows


def test_every_limit_is_of_something_that_is_compiled() -> None:
    rows = everything()
    assert list(compiled.unmeasured(rows, TARGETS)) == []
    assert list(compiled.exceeded(rows)) == []
    lacking = [x for x in rows if (x["target"], x["step"]) != ("v6e", "Block(4)")]
    lines = list(compiled.unmeasured(lacking, TARGETS))
    assert len(lines) == 4  # Two limits of the leaf, two of the tree.
    assert "v6e, leaf: Block(4): no cycles was measured" in lines
    assert set(lines) == set(compiled.unmeasured(lacking, ["v6e"]))
    assert compiled.BASE in worker.STEPS


def test_limits() -> None:
    leaf, tree, base = compiled.LEAF, compiled.TREE, compiled.BASE
    rows = [
        row("v5e", leaf, base, "update, apply", cycles=1000),
        row("v5e", leaf, "Block(8)", cycles=1701, temporaries=0.04),
        row("v5e", leaf, "Block(4)", cycles=1700, temporaries=0.06),
        row("h200", leaf, base, "update, apply", kernels=3),
        row("h200", leaf, "float32", kernels=6),
        row("h200", leaf, "Block(8)", "update", kernels=9, passes=3),
        row("h200", leaf, "Lion, Block(8)", passes=9),
        row("v6e", tree, "Block(8)") | {"beside arguments": 0.6},
        row("a100", tree, "Block(8)", error="XlaRuntimeError: no"),
        {"target": "v5e", "part": "sharded", "step": "Block(8)", "way": "make_step", "collectives": ["all-gather"]},
        {"target": "v5e", "part": "family", "step": "adam", "way": "make_step", "failed": ["Block(8), bfloat16: no"]},
    ]
    assert sorted(compiled.exceeded(rows)) == [
        "a100, GPT-2 small: Block(8), make_step: does not compile: XlaRuntimeError: no",
        "h200, leaf: Block(8), update: passes 3, at most 2",
        "h200, leaf: float32, make_step: kernels 2 times optax float32's, at most 1.7",
        "v5e, family: adam, make_step: does not compile: Block(8), bfloat16: no",
        "v5e, leaf: Block(4), make_step: temporaries 0.06, at most 0.05",
        "v5e, leaf: Block(8), make_step: cycles 1.701 times optax float32's, at most 1.7",
        "v5e, sharded: Block(8), make_step: devices talk: all-gather",
        "v6e, GPT-2 small: Block(8), make_step: beside arguments 0.6, at most 0.5",
    ]


def test_limits_of_a_divided_state() -> None:
    """Too much and too little are both wrong, and so is what compiles although it was refused."""
    rows = {f"{x['step']}, {x['way']}": x for x in several_rows("h200")}
    assert list(compiled.exceeded(list(rows.values()))) == []
    rows["float32, jit"] |= {"all-reduce": 4.0, "reduce-scatter": 0.0}  # As without `zero1`.
    rows["Block(8), shard_map"] |= {"state": 1.0, "other exchanges": 0.5}
    rows["training, one program"] |= {"saved": 0.0}
    rows["float32, kernel, make_step"] = several_rows("v5e")[-4] | {"target": "h200"}
    assert sorted(compiled.exceeded(list(rows.values()))) == [
        "h200, offload: float32, kernel, make_step: compiles now: it need not be refused any more",
        "h200, offload: training, one program: saved 0, at least 7.9",
        "h200, zero1: Block(8), shard_map: other exchanges 0.5, at most 0",
        "h200, zero1: Block(8), shard_map: state 1, at most 0.251",
        "h200, zero1: float32, jit: all-reduce 4, at most 0.004",
        "h200, zero1: float32, jit: reduce-scatter 0, at least 3.96",
    ]


def test_the_family_is_complete() -> None:
    assert {case.alias.__name__ for case in CASES} <= set(worker.MEMBERS)
    assert len(worker.family("adam")) == 40
    small = {"leaf": (64, 32)}
    for steps in (worker.family("cautious"), worker.family("adan")):
        params, state, grads = steps["Block(4), masters 8"].shapes(small)
        assert {x.dtype.name for x in jax.tree.leaves((params, grads))} == {"bfloat16"}
        assert any(x.dtype.name == "int8" for x in jax.tree.leaves(state))


def test_descriptions_of_devices() -> None:
    assert {*worker.TPUS, *worker.GPUS} == {*compiled.TPU, *compiled.GPU}
    (_, h200, _), (_, a100, _) = worker.GPUS.values()
    assert h200.keys() == a100.keys()


def test_size() -> None:
    assert worker.size(worker.LEAF) == (1 << 26, 1 << 26)
    assert worker.size(worker.GPT2)[0] == 124_439_808
    assert math.prod(worker.GPT2["wte"]) == worker.size(worker.GPT2)[1]


def test_requirements_are_pinned_to_what_is_installed() -> None:
    jax_, optax = (importlib.metadata.version(name) for name in ("jax", "optax"))
    assert compiled.requirements(compiled.COMPILERS["tpu"]) == [f"jax[tpu]=={jax_}", f"optax=={optax}"]
    assert f"jax-cuda12-plugin=={jax_}" in compiled.requirements(compiled.COMPILERS["gpu"])


def test_environments_are_kept_below_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compiled.place() == tmp_path / "adam_fn" / "compilers"
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compiled.place().name == "compilers" and tmp_path not in compiled.place().parents


def test_summary() -> None:
    """The README's tables: two targets in one cell, cycles in optax's, and what is said below."""
    leaf, tree = compiled.LEAF, compiled.TREE
    rows = [
        row("v5e", leaf, compiled.BASE, "update, apply", cycles=1000),
        row("v5e", leaf, "Block(8)", cycles=1250),
        row("v5e", leaf, "Block(8)", "update", cycles=9000),
        row("v6e", leaf, compiled.BASE, "update, apply", cycles=2000),
        row("v6e", leaf, "Block(8)", cycles=3000),
        row("v5e", tree, "Block(8)"),
        {"target": "v5e", "part": "sharded", "step": "Block(8)", "way": "make_step", "collectives": []},
        {"target": "v5e", "part": "family", "step": "adam", "way": "make_step", "failed": ["x"], "programs": 20},
        *several_rows("v5e"),
    ]
    found = {"versions": {"tpu": {"jax": "1"}}, "rows": rows, "date": "2030-01-02T00:00:00"}
    ((head, body, about),) = compiled.summary(found)
    assert head[-2:] == ["cycles / optax", "compilation, s"]
    assert [line[0] for line in body] == ["optax float32", "Block(8)", "GPT-2 small: Block(8)"]
    assert body[1][-2] == "1.25 to 1.50"
    assert body[2][-2] == ""
    wanted = ("not run", "v5e and v6e", "jax 1 (2030-01-02)", "1 of 1 programs", "19 of 20 steps compile")
    for text in (*wanted, "reduce-scatter 2.00 to 4.00"):
        assert text in about
    assert tables.table(head, body).count("\n") == 4
