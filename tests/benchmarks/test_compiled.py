"""Figures read from compiled programs, and their limits; no compiler is needed."""

import math
import sys
import types

import jax
import pytest
import tables
from cases import CASES
from compilers import figures, placements, steps, worker
from compilers.hlo import Array, Instruction, Program, instruction
from measure import workloads
from measure.scripts import Row

pytestmark = pytest.mark.quick

# As XLA writes it: fetches from the host's memory, S(5), and into fast memory, S(1), a loop and a call.
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
  %p = f32[64,32]{1,0:T(8,128)S(5)} parameter(0), sharding={replicated}
  %s = u8[32]{0:S(5)} parameter(1)
  %zero = s32[] constant(0)
  %copy-start.1 = (f32[64,32]{1,0:T(8,128)}, f32[64,32]{1,0:T(8,128)S(5)}, u32[]{:S(2)}) copy-start(%p)
  %copy-done.1 = f32[64,32]{1,0:T(8,128)} copy-done(%copy-start.1)
  %slice-start = ((u8[32]{0}), u8[8]{0:T(32,128)(4,1)S(1)}, s32[]{:S(2)}) slice-start(%s), slice={[0:8]}
  %slice-done = u8[8]{0:T(32,128)(4,1)S(1)} slice-done(%slice-start)
  %joined = u8[8]{0} custom-call(%slice-done), custom_call_target="ConcatBitcast"
  %small = (u8[32]{0}, /*index=1*/u32[64]{0}) fusion(%s, /*index=1*/%joined), kind=kLoop, calls=%fused_small
  %tuple.1 = (s32[], f32[64,32]{1,0}) tuple(%zero, %copy-done.1)
  %while.1 = (s32[], f32[64,32]{1,0}) while(%tuple.1), condition=%condition, body=%body
  %last = f32[64,32]{1,0} get-tuple-element(%while.1), index=1
  %call = f32[64,32]{1,0:T(8,128)S(1)} call(%last), to_apply=%called
  %copy-start = (f32[64,32]{1,0:T(8,128)S(5)}, f32[64,32]{1,0:T(8,128)S(1)}, u32[]{:S(2)}) copy-start(%call)
  %copy-done = f32[64,32]{1,0:T(8,128)S(5)} copy-done(%copy-start)
  %codes = u8[32]{0} get-tuple-element(%small), index=0
  ROOT %tuple.2 = (f32[64,32]{1,0:T(8,128)S(5)}, u8[32]{0}) tuple(%copy-done, %codes)
}
"""


def test_kernels_cycles_and_memory_are_read_from_a_program() -> None:
    program = Program(HLO)
    leaf = 64 * 32
    # The fusion in the loop and the copy in the called computation go over the leaf.
    assert program.kernels(leaf) == 2
    assert program.kernels() == 3
    assert program.cycles() == 10 + 5
    assert program.exchanges() == []
    # The copy fetched from the host, the result of the loop and u32[64]; or XLA's own figure if it is smaller.
    sizes = [program.temporaries(types.SimpleNamespace(temp_size_in_bytes=size)) for size in (1 << 20, 1000)]
    assert sizes == [2 * 4 * leaf + 4 * 64, 1000]
    assert program.bus() == (4 * leaf + 32, 4 * leaf)
    assert Program(HLO.replace("S(5)", "")).bus() == (0, 0)


# For TPUs XLA writes two reduce-scatters in a fusion, and an asynchronous all-gather in two kernels; for GPUs
# one instruction starts many arrays at once, and its results begin with its operands.
EXCHANGES = """\
%gather.1 (param_0.1: f32[1,1,512]) -> f32[4,1,512] {
  %param_0.1 = f32[1,1,512]{2,1,0:T(1,128)S(1)} parameter(0)
  ROOT %all-gather.14 = f32[4,1,512]{2,1,0:T(1,128)} all-gather(%param_0.1), frontend_attributes={chain_id="0"}
}

%async_collective_fusion.16 (param_0.2: f32[1,1,512]) -> f32[4,1,512] {
  %param_0.2 = f32[1,1,512]{2,1,0:T(1,128)S(1)} parameter(0)
  ROOT %all-gather.16 = f32[4,1,512]{2,1,0:T(1,128)S(1)} all-gather(%param_0.2), frontend_attributes={chain_id="0"}
}

%all-reduce-scatter.2 (input_0: bf16[512,2048], input_1: bf16[2048,512]) -> (bf16[128,2048], bf16[512,512]) {
  %input_0 = bf16[512,2048]{1,0:T(8,128)(2,1)} parameter(0)
  %input_1 = bf16[2048,512]{1,0:T(8,128)(2,1)} parameter(1)
  ROOT %all-reduce.6 = (bf16[512,2048]{1,0:T(8,128)(2,1)}, bf16[2048,512]{1,0:T(8,128)(2,1)}) \
all-reduce(%input_0, %input_1), channel_id=1, replica_groups={{0,1,2,3}}, to_apply=%add.clone
}

ENTRY %main.8_spmd (p: f32[2048], q: f32[128,2048], s: f32[3]) -> f32[512,2048] {
  %p = f32[2048]{0:T(1024)S(1)} parameter(0)
  %q = f32[128,2048]{1,0:T(8,128)} parameter(1)
  %s = f32[3]{0} parameter(2)
  %all-reduce.1 = (f32[2048]{0:T(1024)S(1)}, f32[3]{0}) all-reduce(%p, %s), channel_id=2, to_apply=%add
  %reduce_scatter.25 = f32[512]{0:T(512)} reduce-scatter(%p), channel_id=1, dimensions={0}, to_apply=%add
  %reduce-scatter-start = ((f32[2048]{0}, f32[128,2048]{1,0}), (f32[512]{0}, f32[32,2048]{1,0})) \
reduce-scatter-start(%p, %q), channel_id=8, dimensions={0}
  %reduce-scatter-done = (f32[512]{0}, f32[32,2048]{1,0}) reduce-scatter-done(%reduce-scatter-start)
  %all-reduce-start = f32[3]{0} all-reduce-start(%s), channel_id=5, to_apply=%add
  %all-reduce-done = f32[3]{0} all-reduce-done(%all-reduce-start)
  %part = f32[512]{0} get-tuple-element(%reduce-scatter-done), index=0
  %all-gather-start = ((f32[512]{0}), (f32[2048]{0})) all-gather-start(%part), channel_id=2, dimensions={0}
  %all-gather-done = (f32[2048]{0}) all-gather-done(%all-gather-start)
  ROOT %all-gather.25 = f32[512,2048]{1,0:T(8,128)S(1)} all-gather(%q), channel_id=1
}
"""


def test_exchanges_between_devices_are_each_counted_once() -> None:
    assert sorted(Program(EXCHANGES).exchanges()) == [
        ("all-gather", 4 * 2048),
        ("all-gather", 4 * 2048),
        ("all-gather", 4 * 512 * 2048),
        ("all-reduce", 4 * 3),
        ("all-reduce", 4 * 2051),
        ("reduce-scatter", 4 * 2048),
        ("reduce-scatter", 4 * (2048 + 128 * 2048)),
        ("reduce-scatter", 2 * 2 * 512 * 2048),
    ]


def test_an_instruction_is_parsed() -> None:
    found = instruction(
        "  ROOT %a.1 = (bf16[2,3]{1,0:T(8,128)(2,1)S(1)}, s4[5]{0}) fusion(%b, /*index=1*/%c.2), calls=%f"
    )
    result = Array("bf16", (2, 3), 1), Array("s4", (5,))
    assert found == Instruction("a.1", result, "fusion", ("b", "c.2"), ", calls=%f")
    others = Array("pred", ()), Array("f8e4m3fn", (4,)), Array("c64", (1,))
    assert [array.bytes for array in (*result, *others)] == [12, 2.5, 1, 4, 8]
    assert instruction("HloModule jit_step, is_scheduled=true") is None


def fitting() -> list[Row]:
    """A row for each compiled program, with figures that every limit allows."""
    bases = {limit.figure: 1.0 for limit in figures.LIMITS if limit.base}
    names = [{"target": target, **name} for target in figures.BOTH for name, _ in worker.jobs(target)]
    held = [(row, [limit for limit in figures.LIMITS if limit.holds_for(row)]) for row in names]
    return [row | bases | {x.figure: x.most for x in found if not x.base} for row, found in held]


def test_every_limit_applies_to_a_compiled_program() -> None:
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


def test_the_whole_family_is_compiled_and_models_have_their_sizes() -> None:
    assert {case.alias.__name__ for case in CASES} <= set(steps.MEMBERS)
    made = {name: jax.tree.leaves(step.arguments({"leaf": (64, 32)})[1]) for name, step in steps.family("adan").items()}
    assert len(made) == len(steps.STORAGES) * len(steps.WRITES)
    assert {x.dtype.name for x in made["8-bit masters, 24bit"] if x.size > 16} == {"int8", "bfloat16"}
    assert [math.prod(steps.GPT2["wte"]), workloads.size(steps.GPT2)] == [50257 * 768, 124_439_808]
    assert workloads.size(steps.llama(32)) == 6_738_415_616
    assert {*steps.GPUS} == {*figures.GPU}


def test_the_documentation_shows_the_results(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["tables.py", "--check"])
    tables.main()
