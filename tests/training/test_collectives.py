"""What devices exchange in a compiled program: texts written by hand, and programs compiled for four devices."""

import textwrap

import pytest

from rat_jax.training.collectives import Collectives, count_collectives, sent
from rat_jax.training.hlo import Program, num_bytes
from tests import virtual_devices


def counted(text: str, num_devices: int = 8) -> dict[str, Collectives]:
    return count_collectives(Program.parse(textwrap.dedent(text)), num_devices)


def entry(*lines: str) -> str:
    """A program of one computation, whose parameter is 1 KiB."""
    parameter = "%p = f32[4,64]{1,0} parameter(0)"
    body = "".join(f"  {line}\n" for line in (parameter, *lines))
    return f"HloModule m\n\nENTRY %main (p: f32[4,64]) -> f32[4,64] {{\n{body}}}\n"


@pytest.mark.parametrize(
    ("groups", "devices"),
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("[2,4]<=[8]", 4),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_1'}", 4),
        ("mesh['axis_0'=2,'axis_1'=4] {'axis_0','axis_1'}", 8),
        ("mesh['axis_0'=4,'axis_1'=1,'axis_2'=2], device_ids=([2,4]T(1,0)) {'axis_0'}", 4),
        ("mesh['axis_0'=8], device_ids=([2,4]T(1,0)) {'axis_0':(2)4}", 4),
        ("{}", 8),
    ],
)
def test_sizes_of_groups(groups, devices):
    line = f"ROOT %g = f32[32,64]{{1,0}} all-gather(%p), channel_id=1, replica_groups={groups}, dimensions={{0}}"
    whole = 1024 * devices
    expected = Collectives(count=1, num_bytes=whole, sent_bytes=whole - 1024, looped=0)
    assert counted(entry(line)) == {"all-gather": expected}


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("all-reduce", (1024, 1792)),  # twice 7 parts of 8
        ("reduce-scatter", (1024, 896)),
        ("all-to-all", (1024, 896)),
        ("collective-permute", (1024, 1024)),
    ],
)
def test_bytes_of_other_kinds(kind, expected):
    (found,) = counted(entry(f"ROOT %x = f32[4,64]{{1,0:T(8,128)(2,1)S(1)}} {kind}(%p), channel_id=1")).values()
    assert (found.num_bytes, found.sent_bytes) == expected
    assert sent(kind, 1024, 8) == expected[1]


def test_groups_of_an_unknown_form_are_no_guess():
    with pytest.raises(ValueError, match="g has groups of devices in an unknown form"):
        counted(entry("ROOT %g = f32[32,64]{1,0} all-gather(%p), replica_groups=cube[2,2], dimensions={0}"))


def test_a_start_and_its_done_are_one():
    text = entry(
        "%s = (f32[4,64]{1,0}, f32[32,64]{1,0}) all-gather-start(%p), channel_id=1, dimensions={0}",
        "%d = f32[32,64]{1,0} all-gather-done(%s)",
        "%cs = (f32[4,64]{1,0}, f32[4,64]{1,0}, u32[], u32[]) collective-permute-start(%p), pairs={{0,1}}",
        "ROOT %cd = f32[4,64]{1,0} collective-permute-done(%cs)",
    )
    assert {kind: (part.count, part.num_bytes) for kind, part in counted(text).items()} == {
        "all-gather": (1, 8192),
        "collective-permute": (1, 1024),
    }


def test_what_an_asynchronous_start_calls_is_counted_once():
    text = """\
    %wrapped (x: f32[4,64]) -> f32[1,32] {
      %x = f32[4,64]{1,0} parameter(0)
      ROOT %rs = f32[1,32]{1,0} reduce-scatter(%x), channel_id=1, replica_groups=[1,8]<=[8], dimensions={0}
    }

    ENTRY %main (p: f32[4,64]) -> f32[1,32] {
      %p = f32[4,64]{1,0} parameter(0)
      %s = ((f32[4,64]{1,0}), f32[1,32]{1,0}) async-start(%p), calls=%wrapped
      %u = ((f32[4,64]{1,0}), f32[1,32]{1,0}) async-update(%s), calls=%wrapped
      ROOT %d = f32[1,32]{1,0} async-done(%u), calls=%wrapped
    }
    """
    assert counted(text) == {"reduce-scatter": Collectives(1, 1024, 896, 0)}


def test_several_arrays_in_one():
    text = entry("%q = bf16[8]{0} constant({...})", "ROOT %x = (f32[4,64]{1,0}, bf16[8]{0}) all-reduce(%p, %q)")
    assert counted(text)["all-reduce"].num_bytes == 1024 + 16


def test_pieces_that_overlap_other_work_are_one():
    """As the TPU compiler cuts a gather up: start, products beside it, end."""
    gather = (
        "all-gather(%a), channel_id=7, replica_groups=mesh['axis_0'=8] {'axis_0'}, dimensions={0}, "
        'frontend_attributes={chain_id="CHAIN"}'
    )
    fused = "\n".join(
        f"%fused.{i} (a: f32[4,64]) -> f32[32,64] {{\n  %a = f32[4,64]{{1,0}} parameter(0)\n"
        f"  ROOT %g.{i} = f32[32,64]{{1,0}} {gather.replace('CHAIN', chain)}\n}}\n"
        for i, chain in enumerate("3334")
    )
    calls = [f"%f.{i} = f32[32,64]{{1,0}} fusion(%p), kind=kCustom, calls=%fused.{i}" for i in range(4)]
    assert counted(fused + entry(*calls, "ROOT %c = f32[4,64]{1,0} copy(%p)"))["all-gather"].count == 2


def test_a_fused_reduce_scatter_is_no_all_reduce():
    text = """\
    %all-reduce-scatter.8.clone (x: f32[4,64]) -> f32[1,32] {
      %x = f32[4,64]{1,0} parameter(0)
      %r = f32[4,64]{1,0} all-reduce(%x), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}
      ROOT %s = f32[1,32]{1,0} dynamic-slice(%r), dynamic_slice_sizes={1,32}
    }

    ENTRY %main (p: f32[4,64]) -> f32[1,32] {
      %p = f32[4,64]{1,0} parameter(0)
      ROOT %f = f32[1,32]{1,0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.8.clone
    }
    """
    assert counted(text) == {"reduce-scatter": Collectives(1, 1024, 768, 0)}


def loop(limit: str = "constant(5)", step: str = "constant(2)", attributes: str = "") -> str:
    """An all-reduce of 1 KiB in a loop from 1 to `limit` in steps."""
    return f"""\
    %cond (c: (s32[], f32[4,64])) -> pred[] {{
      %c = (s32[], f32[4,64]{{1,0}}) parameter(0)
      %i = s32[] get-tuple-element(%c), index=0
      %n = s32[] {limit}
      ROOT %lt = pred[] compare(%i, %n), direction=LT
    }}

    %body (b: (s32[], f32[4,64])) -> (s32[], f32[4,64]) {{
      %b = (s32[], f32[4,64]{{1,0}}) parameter(0)
      %i = s32[] get-tuple-element(%b), index=0
      %held = s32[] copy(%i)
      %k = s32[] {step}
      %next = s32[] add(%held, %k)
      %x = f32[4,64]{{1,0}} get-tuple-element(%b), index=1
      %r = f32[4,64]{{1,0}} all-reduce(%x), channel_id=1
      ROOT %t = (s32[], f32[4,64]{{1,0}}) tuple(%next, %r)
    }}

    ENTRY %main (p: f32[4,64]) -> (s32[], f32[4,64]) {{
      %p = f32[4,64]{{1,0}} parameter(0)
      %one = s32[] constant(1)
      %first = s32[] copy(%one)
      %t = (s32[], f32[4,64]{{1,0}}) tuple(%first, %p)
      ROOT %w = (s32[], f32[4,64]{{1,0}}) while(%t), condition=%cond, body=%body{attributes}
    }}
    """


@pytest.mark.parametrize(
    ("text", "count", "looped"),
    [
        (loop(), 2, 0),  # 1, 3
        (loop(limit="constant(6)"), 3, 0),
        (loop(limit="constant(0)"), 0, 0),
        (loop(limit="custom-call()"), 1, 1),
        (loop(step="custom-call()"), 1, 1),
        (loop(limit="custom-call()", attributes=', backend_config={"known_trip_count":{"n":"24"}}'), 24, 0),
    ],
)
def test_loops(text, count, looped):
    found = counted(text)
    assert [(part.count, part.num_bytes, part.looped) for part in found.values()] == (
        [(count, 1024 * count, looped)] if count else []
    )


def test_bytes_of_types():
    assert num_bytes("bf16[2,3]{1,0:T(8,128)(2,1)S(1)}") == 12
    assert num_bytes("(f32[], /*index=1*/s4[8]{0}, pred[7], c64[2], f8e4m3fn[3], token[])") == 4 + 4 + 7 + 16 + 3
    assert num_bytes("f32[<=8,2]{1,0}") == 64


def test_what_is_no_compiled_program_is_refused():
    with pytest.raises(ValueError, match="no ENTRY computation"):
        Program.parse("module @jit_f {\n}\n")


@pytest.fixture(scope="module")
def compiled():
    return virtual_devices.run("tests.compiled_collectives")


@pytest.mark.parametrize(
    ("kind", "array_bytes"),
    [("all-gather", 4096), ("reduce-scatter", 1024), ("all-reduce", 1024), ("collective-permute", 1024)],
)
def test_collectives_of_a_compiled_loop(compiled, kind, array_bytes):
    """Each device has 1 KiB; the loop has 6 turns."""
    assert compiled["loop"][kind] == [6, 6 * array_bytes]


def test_a_step_gathers_as_much_with_a_loop_over_layers_as_without(compiled):
    assert compiled["scanned"]["all-gather"] == compiled["unrolled"]["all-gather"]
    assert compiled["scanned"]["all-reduce"][1] == compiled["unrolled"]["all-reduce"][1]
    assert set(compiled["scanned"]) == {"all-gather", "all-reduce"}
