"""What a compiled step reads and writes, counted from programs of a few lines whose bytes are known by hand."""

import pytest

from examples.benchmarks.hlo_traffic import parsed, step, table, uses

BIG = "64,64,320"
ELEMENTS = 64 * 64 * 320


def program(fused: str, main: str) -> str:
    """Lines of a fused computation, and of the program that calls it, as XLA prints them."""
    return (
        f"HloModule test\n\n%fused (p: f32[]) -> f32[] {{\n{fused}}}\n\nENTRY %main (a: f32[]) -> f32[] {{\n{main}}}\n"
    )


def one_fusion(lines: str, kind: str = "kLoop", result: str = f"bf16[{BIG}]{{2,1,0}}", dtype: str = "bf16"):
    """The use of a fusion of those lines over one operand, %p."""
    fused = f"  %p = {dtype}[{BIG}]{{2,1,0}} parameter(0)\n{lines}"
    main = f"  %a = {dtype}[{BIG}]{{2,1,0}} parameter(0)\n"
    main += f'  ROOT %f.1 = {result} fusion(%a), kind={kind}, calls=%fused, metadata={{op_name="jit(f)/net/add"}}\n'
    (found,) = uses(program(fused, main))
    return found


def surplus(found):
    return {kind: size for kind, size in found.surplus.items() if size}


def test_arithmetic_on_a_value_and_its_function_reads_it_once():
    found = one_fusion(f"  %n = bf16[{BIG}]{{2,1,0}} negate(%p)\n  ROOT %m = bf16[{BIG}]{{2,1,0}} multiply(%p, %n)\n")
    assert (found.read, found.written, surplus(found)) == (2 * ELEMENTS, 2 * ELEMENTS, {})


SUM_AND_VALUES = (
    "  %z = bf16[] constant(0)\n"
    "  %s = bf16[64,64]{1,0} reduce(%p, %z), dimensions={2}, to_apply=%add\n"
    f"  %w = bf16[{BIG}]{{2,1,0}} broadcast(%s), dimensions={{0,1}}\n"
    f"  ROOT %m = bf16[{BIG}]{{2,1,0}} subtract(%p, %w)\n"
)


def test_a_sum_that_is_taken_off_the_values_reads_them_again_unless_they_stay_in_a_tile():
    found = one_fusion(SUM_AND_VALUES)
    assert (found.read, surplus(found)) == (4 * ELEMENTS, {"again": 2 * ELEMENTS})
    assert surplus(one_fusion(SUM_AND_VALUES, kind="kCustom")) == {}


def test_two_halves_of_an_array_are_one_reading():
    half = "bf16[64,64,160]{2,1,0}"
    found = one_fusion(
        f"  %l = {half} slice(%p), slice={{[0:64], [0:64], [0:160]}}\n"
        f"  %r = {half} slice(%p), slice={{[0:64], [0:64], [160:320]}}\n"
        f"  ROOT %m = {half} multiply(%l, %r)\n",
        result=half,
    )
    assert (found.read, found.written, surplus(found)) == (2 * ELEMENTS, ELEMENTS, {})


def test_what_only_moves_is_surplus_altogether():
    found = one_fusion(
        "  ROOT %t = bf16[320,64,64]{2,1,0} transpose(%p), dimensions={2,0,1}\n", result="bf16[320,64,64]{2,1,0}"
    )
    assert (found.needed, surplus(found)) == (0, {"moved": 4 * ELEMENTS})


def test_of_a_sum_and_the_array_stored_beside_it_the_array_is_surplus():
    whole = f"bf16[2,{BIG}]{{3,2,1,0}}"
    found = one_fusion(
        f"  %b = {whole} broadcast(%p), dimensions={{1,2,3}}\n"
        "  %z = bf16[] constant(0)\n"
        "  %s = bf16[2,64]{1,0} reduce(%b, %z), dimensions={2,3}, to_apply=%add\n"
        f"  ROOT %u = (bf16[2,64]{{1,0}}, {whole}) tuple(%s, %b)\n",
        result=f"(bf16[2,64]{{1,0}}, {whole})",
    )
    assert surplus(found) == {"moved": 4 * ELEMENTS}


def test_float32_between_fusions_is_surplus_but_for_the_programs_own():
    line = f"  ROOT %c = f32[{BIG}]{{2,1,0}} convert(%p)\n"
    found = one_fusion(line, result=f"f32[{BIG}]{{2,1,0}}")
    assert (found.written, surplus(found)) == (4 * ELEMENTS, {"float32": 2 * ELEMENTS})
    assert surplus(one_fusion(line, result=f"f32[{BIG}]{{2,1,0}}", dtype="f32")) == {}


def test_arrays_that_stay_on_the_chip_are_no_surplus():
    main = "  %a = bf16[64,64]{1,0} parameter(0)\n  ROOT %c.1 = bf16[64,64]{0,1} copy(%a)\n"
    (found,) = uses(program("  ROOT %p = f32[] parameter(0)\n", main))
    assert (found.read, found.written, surplus(found)) == (8192, 8192, {})


def test_parts_of_a_sum_are_surplus_where_they_are_written_and_where_they_are_added():
    fused = (
        "  %p = f32[4,512,320]{2,1,0} parameter(0)\n  %z = f32[] constant(0)\n"
        "  %s = f32[512,320]{1,0} reduce(%p, %z), dimensions={0}, to_apply=%add\n"
        "  ROOT %c = bf16[512,320]{1,0} convert(%s)\n"
    )
    main = (
        "  %a = bf16[512,4,320]{2,1,0} parameter(0)\n  %b = bf16[1280,320]{1,0} parameter(1)\n"
        "  %gemm_fusion_dot.3 = f32[4,512,320]{2,1,0} fusion(%a, %b), kind=kCustom, calls=%dot\n"
        "  %seen = f32[4,512,320]{2,1,0} bitcast(%gemm_fusion_dot.3)\n"
        "  ROOT %f.1 = bf16[512,320]{1,0} fusion(%seen), kind=kLoop, calls=%fused\n"
    )
    result = 2 * 512 * 320
    for found in uses(program(fused, main)):
        assert surplus(found) == {"splits": 4 * 2 * result - result}


def test_a_third_reading_by_one_norm_is_surplus():
    lines = "\n".join(
        f'  %{name} = bf16[{BIG}]{{2,1,0}} negate(%p), metadata={{op_name="jit(f)/{module}/sub"}}'
        for name, module in (("x", "res_0/norm1"), ("y", "res_0/conv"))
    )
    fused = f"  %p = bf16[{BIG}]{{2,1,0}} parameter(0)\n{lines}\n  ROOT %m = bf16[{BIG}]{{2,1,0}} add(%x, %y)\n"
    calls = [
        f"  %f.{i} = bf16[{BIG}]{{2,1,0}} fusion(%{'ab'[i % 2]}), kind=kLoop, calls=%fused\n" for i in range(6)
    ]  # two bitcasts are one array
    main = f"  %a = bf16[{BIG}]{{2,1,0}} parameter(0)\n  %b = bf16[{BIG}]{{2,1,0}} bitcast(%a)\n" + "".join(calls)
    found = {each.instruction.name: surplus(each) for each in uses(program(fused, main))}
    assert found == {f"f.{i}": {"norm": 2 * ELEMENTS} if i > 1 else {} for i in range(6)}


LOOP = f"""HloModule test

%small (t: (s32[])) -> (s32[]) {{
  %t.1 = (s32[]) parameter(0)
  ROOT %copy.1 = (s32[]) copy(%t.1)
}}

%large (t: (s32[])) -> (s32[]) {{
  %t.2 = (s32[]) parameter(0)
  %x = bf16[{BIG}]{{2,1,0}} get-tuple-element(%t.2), index=0
  %conv.1 = (bf16[{BIG}]{{2,1,0}}, u8[0]{{0}}) custom-call(%x), dim_labels=b01f_o01i->b01f
  ROOT %copy.2 = (s32[]) copy(%t.2)
}}

%body (t: (s32[])) -> (s32[]) {{
  %t.3 = (s32[]) parameter(0)
  %cond.1 = (s32[]) conditional(%t.3, %t.3, %t.3), true_computation=%large, false_computation=%small
  ROOT %cond.2 = (s32[]) conditional(%t.3, %t.3), branch_computations={{%small, %twice}}
}}

%twice (t: (s32[])) -> (s32[]) {{
  %t.4 = bf16[{BIG}]{{2,1,0}} parameter(0)
  %copy.4 = bf16[{BIG}]{{2,1,0}} copy(%t.4)
  ROOT %copy.5 = bf16[{BIG}]{{2,1,0}} copy(%copy.4)
}}

ENTRY %main (a: (s32[])) -> (s32[]) {{
  %a = (s32[]) parameter(0)
  %copy.9 = (s32[]) copy(%a)
  ROOT %while.1 = (s32[]) while(%copy.9), condition=%until, body=%body
}}
"""


def test_a_step_is_the_loops_body_with_the_branch_that_convolves_and_else_the_least():
    names = [one.name for _, one in step(*parsed(LOOP))]
    assert names == ["conv.1", "copy.2", "copy.1"]


def test_the_table_sums_alike_fusions_and_the_whole_step():
    main = f"  %a = bf16[{BIG}]{{2,1,0}} parameter(0)\n" + "".join(
        f"  %copy.{i} = bf16[{BIG}]{{2,1,0}} copy(%a), "
        f'metadata={{op_name="jit(f)/while/body/closed_call/UNet.predict/up_{i}/res_1/add"}}\n'
        for i in range(3)
    )
    lines = table(uses(program("  ROOT %p = f32[] parameter(0)\n", main)))
    assert lines[1].split() == ["15.7", "7.9", "7.9", "0.0", "-", "3", "moved,", "copy,", "up_*/res_*/add"]
    assert lines[2].startswith(
        "a step: 3 kernels, 7.9 MB read, 7.9 MB written, of which surplus 15.7 MB: again 0.0, moved"
    )
    assert "and 1 more rows" in table(uses(program("  ROOT %p = f32[] parameter(0)\n", main)), most=0)[1]


@pytest.mark.parametrize(
    ("dtype", "size"), [("pred", 1), ("bf16", 2), ("f32", 4), ("s64", 8), ("u8", 1), ("f8e4m3fn", 1)]
)
def test_bytes_of_element_types(dtype, size):
    (found,) = uses(
        program(
            "  ROOT %p = f32[] parameter(0)\n",
            f"  %a = {dtype}[3,5]{{1,0}} parameter(0)\n  %c = {dtype}[3,5]{{1,0}} copy(%a)\n",
        )
    )
    assert found.read == 15 * size
