"""What is read from machine code: on a small listing of every kind that resources.py looks for."""

from __future__ import annotations

import machine_code
import pytest
from machine_code import GPUS


def listing(*lines: str) -> list[machine_code.Instruction]:
    """Return parsed lines, 16 bytes apart as cuobjdump shows them."""
    return machine_code.parse(
        "\n".join(f"        /*{16 * i:04x}*/  {line} ;  /* 0x0 */" for i, line in enumerate(lines))
    )


NESTED = listing(
    "STL [R1], R2",
    "MUFU.EX2 R3, R3",  # outer loop
    "FFMA R4, R4, R4, R5",  # inner loop
    "HMMA.16816.F32 R8, R4, R6, R8",
    "@P0 BRA 0x20",
    "@!P1 BRA 0x10",
    "@P2 BRA 0x90",
    "LDL R2, [R1]",
    "EXIT",
    "IADD3 R2, R2, 0x1, RZ",  # moved out of the way
    "BRA 0x70",
    "BRA 0xb0",  # padding behind the end
)


def test_natural_loops_and_the_inner_one():
    assert machine_code.loops(NESTED) == [[2, 3, 4], [1, 2, 3, 4, 5]]
    assert [one.stem for one in machine_code.inner_loop(NESTED)] == ["FFMA", "HMMA", "BRA"]


def test_without_loops_all_code_is_the_loop():
    code = listing("FADD R1, R1, R2", "EXIT")
    assert machine_code.inner_loop(code) == code


def test_spills_are_told_apart():
    assert machine_code.spills(NESTED) == 2
    assert machine_code.spills_in_loops(NESTED) == 0
    inside = listing("FADD R1, R1, R2", "LDL R2, [R1]", "@P0 BRA 0x10", "EXIT")
    assert machine_code.spills_in_loops(inside) == 1


PRODUCT = "HGMMA.64x128x16.F32 R24, R100, gdesc[UR36].tnspB, R24"


@pytest.mark.parametrize("write", ["FADD R103, R1, R2", "LDS.128 R96, [R1]", "ISETP.NE.AND P0, PT, R1, R2, PT"])
@pytest.mark.parametrize("waited", [False, True])
def test_an_operand_overwritten_before_it_was_waited_for(write, waited):
    wait = ["WARPGROUP.DEPBAR.LE gsb0, 0x0"] if waited else []
    found = machine_code.overwritten_operands(listing(f"{PRODUCT}, gsb0", *wait, write))
    assert bool(found) == ("R103" in write and not waited)


def test_waiting_for_all_but_the_last_group():
    other = PRODUCT.replace("R100", "R104")
    code = [f"{PRODUCT}, gsb0", f"{other}, gsb0", "WARPGROUP.DEPBAR.LE gsb0, 0x1"]
    assert not machine_code.overwritten_operands(listing(*code, "MOV R101, R1"))
    assert machine_code.overwritten_operands(listing(*code, "MOV R105, R1"))


def test_bound_of_products_is_the_matrix_units_own_rate():
    bound = machine_code.bound(listing(PRODUCT), 4, GPUS[90])
    assert bound.limit == "tensor"
    assert bound.flop == pytest.approx(989e12, rel=0.01)  # NVIDIA's data sheet of the H100 and H200
    assert machine_code.bound(listing("HMMA.16816.F32 R8, R4, R6, R8"), 4, GPUS[80]).flop == pytest.approx(312e12, 0.01)
    assert machine_code.bound(listing("HMMA.884.F32.F32.STEP0 R8, R4, R6, R8"), 8, GPUS[70]).flop == pytest.approx(
        125e12, 0.01
    )


def test_the_busiest_pipe_sets_the_bound():
    code = listing(PRODUCT, *["MUFU.EX2 R3, R3"] * 100)
    bound = machine_code.bound(code, 4, GPUS[90])
    assert bound.limit == "special"
    # 100 of 32 lanes each, at 16 a clock: 200 clocks for a warp, beside 4 * 64 * 128 * 16 * 2 / 4 FLOP.
    assert bound.flop == pytest.approx(2 * 64 * 128 * 16 / 800 * 132 * 1.83e9)


def test_copies_are_bound_by_memory_unless_other_work_takes_longer():
    copy = ["LDG.E.128 R4, [R2]", "STG.E.128 [R2], R4"]
    assert machine_code.bound(listing(*copy), 4, GPUS[90]).bytes == GPUS[90].memory
    bytewise = ["LDG.E.U8 R4, [R2]", *["IADD3 R2, R2, 0x1, RZ"] * 20]
    slow = machine_code.bound(listing(*bytewise), 4, GPUS[90])
    assert slow.limit == "alu"
    assert slow.bytes == pytest.approx(32 / (20 * 32 / 64) * 132 * 1.83e9)
