"""What is read from compiled programs, and the limits that hold them; no compiler is needed."""

import importlib.metadata
import math
import pathlib
import types

import compiled
import jax
import pytest
import tables
from cases import CASES
from compilers import figures, placements, steps, worker
from compilers.hlo import Array, Program, instruction
from measure import scripts, workloads
from measure.scripts import Row

pytestmark = pytest.mark.quick

# As XLA writes it: a fetch into fast memory (S(1)), a loop and a call.
HLO = """\
HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[64,32]{1,0})->f32[64,32]{1,0}}

%fused (param_0: f32[64,32]) -> f32[64,32] {
  %param_0 = f32[64,32]{1,0} parameter(0)
  ROOT %sine = f32[64,32]{1,0} sine(%param_0), metadata={op_name="jit(f)/sin" stack_frame_id=2}
}

%called (a: f32[64,32]) -> f32[64,32] {
  %a = f32[64,32]{1,0} parameter(0)
  ROOT %copy.1 = f32[64,32]{1,0:T(8,128)S(1)} copy(%a), backend_config={"estimated_cycles":"5"}
}

%body (b: (s32[], f32[64,32])) -> (s32[], f32[64,32]) {
  %b = (s32[], f32[64,32]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%b), index=0
  %x = f32[64,32]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %y = f32[64,32]{1,0:T(8,128)} fusion(%x, %i), kind=kLoop, calls=%fused, backend_config={"estimated_cycles":"10"}
  ROOT %t = (s32[], f32[64,32]{1,0}) tuple(%i, %y)
}

ENTRY %main.4 (p: f32[64,32], s: u8[32]) -> (f32[64,32], u8[32]) {
  %p = f32[64,32]{1,0:T(8,128)} parameter(0), sharding={replicated}
  %s = u8[32]{0} parameter(1)
  %zero = s32[] constant(0)
  %slice-start = ((u8[32]{0}), u8[8]{0:T(32,128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%s), slice={[0:8]}
  %slice-done = u8[8]{0:T(32,128)(4,1)S(1)} slice-done(%slice-start)
  %joined = u8[8]{0} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %small = (u8[32]{0}, /*index=1*/u32[64]{0}) fusion(%s, /*index=1*/%joined), kind=kLoop, calls=%fused_small
  %tuple.1 = (s32[], f32[64,32]{1,0}) tuple(%zero, %p)
  %while.1 = (s32[], f32[64,32]{1,0}) while(%tuple.1), condition=%condition, body=%body
  %last = f32[64,32]{1,0} get-tuple-element(%while.1), index=1
  %call = f32[64,32]{1,0:T(8,128)S(1)} call(%last), to_apply=%called
  %copy-start = (f32[64,32]{1,0:T(8,128)}, f32[64,32]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%call)
  %copy-done = f32[64,32]{1,0:T(8,128)} copy-done(%copy-start)
  %codes = u8[32]{0} get-tuple-element(%small), index=0
  ROOT %tuple.2 = (f32[64,32]{1,0:T(8,128)}, u8[32]{0}) tuple(%copy-done, %codes)
}
"""


def test_what_a_program_runs() -> None:
    program = Program(HLO)
    leaf = 64 * 32
    # The fusion in the loop and the copy in what is called go over the leaf.
    assert program.kernels(leaf) == 2
    assert program.kernels() == 3
    assert program.cycles() == 10 + 5
    assert program.exchanges() == []
    # What the loop makes and u32[64], or less if XLA says so.
    sizes = [program.temporaries(types.SimpleNamespace(temp_size_in_bytes=size)) for size in (1 << 20, 1000)]
    assert sizes == [4 * leaf + 4 * 64, 1000]


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


def test_an_instruction_is_parsed() -> None:
    found = instruction(
        "  ROOT %a.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}) fusion(%b, /*index=1*/%c.2), calls=%f"
    )
    assert found is not None
    assert found.result == (Array("bf16", (2, 3), 1), Array("s4", (5,)))
    assert [array.bytes for array in found.result] == [12, 2.5]
    assert (found.name, found.opcode, found.operands, found.rest) == ("a.1", "fusion", ("b", "c.2"), ", calls=%f")
    assert instruction("HloModule jit_step, is_scheduled=true") is None
    assert Array("pred", ()).bytes == 1 and Array("f8e4m3fn", (4,)).bytes == 4 and Array("c64", (1,)).bytes == 8


def names() -> list[Row]:
    """What identifies each program."""
    return [{"target": target, **name} for target in figures.BOTH for name, _ in worker.jobs(target)]


def fitting() -> list[Row]:
    """Rows of all that is compiled, with figures that every limit allows."""
    bases = {limit.figure: 1.0 for limit in figures.LIMITS if limit.base}
    held = [(row, [limit for limit in figures.LIMITS if limit.holds_for(row)]) for row in names()]
    return [row | bases | {x.figure: x.most for x in found if not x.base} for row, found in held]


def test_every_limit_is_of_something_that_is_compiled() -> None:
    rows = fitting()
    assert list(figures.exceeded([row | {"cycles": 0.5} if row["step"] != figures.BASE else row for row in rows])) == []
    for limit in figures.LIMITS:
        found = {(row["target"], row["step"]) for row in rows if limit.holds_for(row)}
        targets = placements.MESHES if limit.part == figures.LLAMA else limit.targets
        steps_ = limit.steps or {step for _, step in found}
        assert steps_ and found == {(target, step) for target in targets for step in steps_}, limit


def test_every_exceeded_limit_is_listed() -> None:
    rows = {figures.label(row): row | {"cycles": 1 if row["step"] == figures.BASE else 0.5} for row in fitting()}
    rows["v5e, leaf: 24bit, make_step"]["cycles"] = 0.7
    rows["v6e, leaf: Lion, 24bit, make_step"]["passes"] = 2
    rows["h200, leaf: masters, 16bit, make_step"]["kernels"] = 3
    rows["h200, zero1: 24bit, jit"] |= {"all-reduce": 4.0, "reduce-scatter": 0.0}  # As without `zero1`.
    del rows["a100, GPT-2 small: 24bit, make_step"]["beside"]
    rows["v5e, Llama-7B: 16bit, FSDP 256, explicit"]["state"] = 1.9
    rows["v5e, offload: 16bit, make_step"]["error"] = "JaxRuntimeError: no"
    rows["v5e, family: adam, make_step"]["failed"] = ["masters, 24bit does not compile: no"]
    assert sorted(figures.exceeded(list(rows.values()))) == [
        "a100, GPT-2 small: 24bit, make_step: beside was not measured",
        "h200, leaf: masters, 16bit, make_step: kernels 3 times that of masters, float32, at most 1",
        "h200, zero1: 24bit, jit: all-reduce 4, at most 0.004",
        "h200, zero1: 24bit, jit: reduce-scatter 0, at least 3.96",
        "v5e, Llama-7B: 16bit, FSDP 256, explicit: state 1.9, at least 2",
        "v5e, family: adam, make_step: masters, 24bit does not compile: no",
        "v5e, leaf: 24bit, make_step: cycles 0.7 times that of optax float32, at most 0.68",
        "v5e, offload: 16bit, make_step: does not compile: JaxRuntimeError: no",
        "v6e, leaf: Lion, 24bit, make_step: passes 2, at most 1",
    ]
    del rows["h200, leaf: masters, float32, make_step"]
    assert "h200, leaf: masters, 16bit, make_step: kernels was not measured" in figures.exceeded(list(rows.values()))


def test_what_is_compiled() -> None:
    assert {case.alias.__name__ for case in CASES} <= set(steps.MEMBERS)
    made = {name: jax.tree.leaves(step.arguments({"leaf": (64, 32)})[1]) for name, step in steps.family("adan").items()}
    assert len(made) == len(steps.STORAGES) * len(steps.WRITES)
    assert {x.dtype.name for x in made["8-bit masters, 24bit"] if x.size > 16} == {"int8", "bfloat16"}
    assert [math.prod(steps.GPT2["wte"]), workloads.size(steps.GPT2)] == [50257 * 768, 124_439_808]
    assert workloads.size(steps.llama(32)) == 6_738_415_616
    assert {*steps.GPUS} == {*figures.GPU}


def test_requirements_are_pinned_to_what_is_installed() -> None:
    jax_, optax = (importlib.metadata.version(name) for name in ("jax", "optax"))
    assert compiled.requirements("tpu") == [f"jax[tpu]=={jax_}", f"optax=={optax}"]
    assert f"jax-cuda12-plugin=={jax_}" in compiled.requirements("gpu")


def test_summary(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tables of the documentation: two targets in one cell, cycles in optax's; and what is kept of earlier runs."""
    rows: list[Row] = [
        {"target": target, "part": figures.LEAF, "step": step, "way": "make_step", "passes": 1, "cycles": cycles}
        for target, step, cycles in (
            ("v5e", figures.BASE, 1000),
            ("v5e", "24bit", 650),
            ("v6e", figures.BASE, 2000),
            ("v6e", "24bit", 1400),
        )
    ]
    rows.append({"target": "v6e", "part": figures.LEAF, "step": "16bit", "way": "make_step", "error": "no"})
    rows.append({"target": "v5e", "part": figures.FAMILY, "step": "adam", "way": "", "failed": ["x"], "programs": 20})
    (text,) = figures.summary(rows)
    assert text.splitlines() == [
        "leaf:",
        "",
        "| step | by | passes | cycles / optax |",
        "| :-- | --: | --: | --: |",
        f"| {figures.BASE} | make_step | 1 | 1.00 |",
        "| 24bit | make_step | 1 | 0.65 to 0.70 |",
        "| 16bit | make_step | – | – |",
    ]
    found = scripts.merged(rows, [rows[1] | {"cycles": 1}], "target", "part", "step", "way")
    assert [row.get("cycles") for row in found] == [1000, 1, 2000, 1400, None, None]
    versions = {"tpu": {"jax": "1"}, "gpu": {"jax": "2"}}
    scripts.write(tmp_path / "compiled.json", {"date": "2026-01-01T00", "versions": versions, "rows": rows})
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    assert text in tables.compiled()
    for wanted in ("not run", "Compiled for v5e, v6e", "jax 1", "1 members", "19 of 20 steps compile"):
        assert wanted in tables.compiled()
