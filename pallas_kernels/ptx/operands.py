"""What an instruction reads and writes, as Python on a warp's registers."""

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from pallas_kernels.ptx import numbers

if TYPE_CHECKING:
    from pallas_kernels.ptx.translate import Code

LANES = 32
KINDS = {"pred": "b1", "b16": "u2", "b32": "u4", "b64": "u8"}  # of registers: NumPy's type, by its bytes
_NUMBER = re.compile(r"-?(0[xX][0-9a-fA-F]+|\d+)U?$")
_FLOAT = re.compile(r"0[fF]([0-9a-fA-F]{8})$")
_ADDRESS = re.compile(r"\[([^+\]]+)(?:\+(-?\d+))?\]$")
TYPES = {
    "pred": "b1", "b8": "u1", "u8": "u1", "s8": "i1", "b16": "u2", "u16": "u2", "s16": "i2", "f16": "f2",
    "b32": "u4", "u32": "u4", "s32": "i4", "f32": "f4", "b64": "u8", "u64": "u8", "s64": "i8", "bf16": "u2",
    "bf16x2": "u4", "f16x2": "u4", "e4m3x2": "u2",
}  # fmt: skip
_WIDTH = {"b1": 0, "u1": 1, "i1": 1, "u2": 2, "i2": 2, "f2": 2, "u4": 4, "i4": 4, "f4": 4, "u8": 8, "i8": 8}


class Operands:
    """The lines of a function so far, and what names stand for in them.

    `some`: for some lanes, whose mask is `m`. `active` says which lanes the present instruction is done by.
    """

    def __init__(self, code: "Code", some: bool):
        self.code, self.some = code, some
        self.lines: list[str] = []
        self.names: dict[str, Any] = {**vars(numbers), "np": np, "b1": np.bool_}
        self.active = "m" if some else "None"

    def value(self, text: str, kind: str) -> str:
        """Return an operand as an expression of a type; what is wider is cut."""
        places, program = self.code.places, self.code.program
        if text in places:
            have, name = KINDS[program.registers[text]], f"R[{places[text]}]"
            if have == kind:
                return name
            return f"{name}.view({kind})" if _WIDTH[have] == _WIDTH[kind] else f"{name}.astype({kind})"
        if text in program.shared:
            return f"w.shared_base({kind})"
        if text in program.parameters:
            return f"w.parameter_address({program.parameters.index(text)})"
        if text.startswith("%"):
            return f"w.special[{text!r}]"
        if found := _FLOAT.match(text):
            return self.number(int(found[1], 16), kind)
        if _NUMBER.match(text):
            return self.number(int(text.rstrip("U"), 0), kind)
        raise NotImplementedError(f"operand {text!r}: not known here")

    def number(self, number: int, kind: str) -> str:
        """Return the name of an array that has a number, given as bits, in all lanes."""
        if kind == "b1":
            array = np.full(LANES, bool(number))
        else:
            bits = 8 * _WIDTH[kind]
            unsigned = np.dtype(f"uint{bits}")
            array = np.full(LANES, number & ((1 << bits) - 1), unsigned).view(getattr(numbers, kind))
        name = f"k_{kind}_{number & ((1 << 64) - 1):x}"
        self.names[name] = array
        return name

    def address(self, text: str) -> str:
        """Return `[base+offset]` as an expression of int64."""
        found = _ADDRESS.match(text)
        base, offset = found[1], int(found[2] or 0)
        wide = "u8" if self.code.program.registers.get(base, "b64") == "b64" else "u4"
        return f"{self.value(base, wide)}.astype(i8) + {offset}"

    def put(self, name: str, expression: str, kind: str) -> None:
        """Write a register, in the lanes that run."""
        if name == "_":
            return
        have, place = KINDS[self.code.program.registers[name]], self.code.places[name]
        if have != kind:
            if _WIDTH[have] == _WIDTH[kind]:
                expression = f"({expression}).view({have})"
            elif kind[0] == "f":
                expression = f"({expression}).view(u{_WIDTH[kind]}).astype({have})"
            else:
                expression = f"({expression}).astype({have})"
        if self.active != "None":
            expression = f"np.where({self.active}, {expression}, R[{place}])"
        self.lines.append(f"R[{place}] = {expression}")

    def together_put(self, operand: str, expressions: list[str], kinds: list[str]) -> None:
        """Write what `a|b` or `{a,b}` names."""
        names = re.split(r"[|,]", operand.strip("{}"))
        for name, expression, kind in zip(names, expressions, kinds, strict=False):
            self.put(name, expression, kind)

    def _plain(self, operands: tuple[str, ...], kind: str, form: str, result: str | None = None) -> None:
        """Write `form` of the operands after the first; `form` has one {} for each."""
        self.put(operands[0], form.format(*(self.value(x, kind) for x in operands[1:])), result or kind)
