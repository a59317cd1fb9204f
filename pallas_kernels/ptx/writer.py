"""Writes Python for PTX: a line or a few for each instruction. What is not known here is refused."""

import re
from collections.abc import Callable
from typing import Any

from pallas_kernels.ptx.operands import LANES, TYPES, Operands
from pallas_kernels.ptx.parse import Instruction

_WIDER = {"i2": "i4", "u2": "u4", "i4": "i8", "u4": "u8"}
_COMPARED = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
_BINARY = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
# What may follow an instruction's name besides types: another word would change what it does.
_WORDS = {
    "add": "rn", "sub": "rn", "and": "", "or": "", "xor": "", "not": "", "neg": "", "abs": "", "mul": "rn lo hi wide",
    "mad": "lo", "fma": "rn", "div": "rn full", "max": "relu NaN", "min": "relu NaN", "ex2": "approx ftz",
    "lg2": "approx ftz", "rcp": "approx ftz", "rsqrt": "approx ftz", "tanh": "approx", "shl": "", "shr": "", "bfe": "",
    "prmt": "", "lop3": "", "setp": "eq ne lt le gt ge nan", "selp": "", "mov": "", "cvta": "to param global shared",
    "cvt": "rn rni satfinite", "ld": "param param::entry shared global v2 v4", "mapa": "shared::cluster",
    "st": "shared shared::cluster global v2 v4", "ldmatrix": "sync aligned m8n8 x1 x2 x4 trans shared",
    "stmatrix": "sync aligned m8n8 x1 x2 x4 trans shared", "elect": "sync", "shfl": "sync bfly idx",
    "redux": "sync max",
    "fence": "proxy async shared::cta", "mma": "sync aligned m16n8k16 m16n8k32 row col",
    "barrier": "cluster arrive relaxed release aligned",
    "mbarrier": "init arrive expect_tx release cta shared shared::cta",
    "cp": "async bulk tensor 1d 2d 3d 4d 5d global shared::cluster shared::cta mbarrier::complete_tx::bytes bulk_group "
    "commit_group wait_group read",
}  # fmt: skip
# What all lanes of a warp do together, and so without a guard.
TOGETHER = ("shfl", "mma", "wgmma", "elect", "redux", "ldmatrix", "stmatrix", "bar", "barrier", "setmaxnreg")
_NOTHING = ("griddepcontrol", "prefetch", "setmaxnreg", "fence.mbarrier_init", "wgmma.fence")


class Writer(Operands):
    """Writes the lines of a function."""

    def function(self, name: str) -> Callable[..., Any]:
        body = "\n".join(f"    {line}" for line in self.lines) or "    pass"
        text = f"def {name}(w, R, m):\n{body}\n"
        exec(compile(text, f"<ptx {self.code.program.name} {name}>", "exec"), self.names)
        return self.names[name]

    def write(self, one: Instruction) -> None:
        """Write an instruction.

        Raises:
            NotImplementedError: nothing here says what it does.
        """
        self.active = "m" if self.some else "None"
        if one.guard is not None:
            self.lines.append(f"g = {'~' if one.negated else ''}{self.value(one.guard, 'b1')}")
            if self.some:
                self.lines.append("g = g & m")
            self.active = "g"
        parts = one.opcode.split(".")
        if one.opcode.startswith(_NOTHING):
            return
        method, words = getattr(self, f"_{parts[0]}", None), _WORDS.get(parts[0])
        known = words is None or set(parts[1:]) <= TYPES.keys() | set(words.split())
        if method is None or not known or (one.guard is not None and parts[0] in (*TOGETHER, "fence")):
            raise NotImplementedError(f"{one}: the instruction is not known here")
        method(parts, one.operands)

    # Arithmetic.

    def _add(self, parts, operands):
        kind, sign = parts[-1], _BINARY[parts[0]]
        if kind in ("bf16x2", "f16x2"):
            self._plain(operands, "u4", f"{kind}(lambda a, b: a {sign} b, {{}}, {{}})")
        elif kind == "bf16":
            self._plain(operands, "u2", f"to_bf16(bf16({{}}).astype(f8) {sign} bf16({{}}))")
        else:
            self._plain(operands, TYPES[kind], f"{{}} {sign} {{}}")

    _sub = _and = _or = _xor = _add

    def _mul(self, parts, operands):
        kind = parts[-1]
        if parts[1] == "wide":
            narrow = TYPES[kind]
            a, b = (f"{self.value(x, narrow)}.astype({_WIDER[narrow]})" for x in operands[1:])
            self.put(operands[0], f"{a} * {b}", _WIDER[narrow])
        elif parts[1] == "hi":
            self._plain(operands, TYPES[kind], "multiply_high({}, {})")
        else:
            self._add(parts, operands)

    def _mad(self, parts, operands):
        self._plain(operands, TYPES[parts[-1]], "{} * {} + {}")

    def _fma(self, parts, operands):
        if parts[-1] == "bf16x2":
            self._plain(operands, "u4", "bf16x2(lambda a, b, c: a * b + c, {}, {}, {})")
        else:
            self._plain(operands, "f4", "({}.astype(f8) * {} + {}).astype(f4)")

    def _div(self, parts, operands):
        self._plain(operands, "f4", "{} / {}")

    def _neg(self, parts, operands):
        self._plain(operands, TYPES[parts[-1]], "-{}")

    def _not(self, parts, operands):
        self._plain(operands, TYPES[parts[-1]], "~{}")

    def _abs(self, parts, operands):
        self._plain(operands, TYPES[parts[-1]], "np.abs({})")

    def _max(self, parts, operands):
        kind = TYPES[parts[-1]]
        name = {"max": "maximum", "min": "minimum"}[parts[0]]
        if kind == "f4" and "NaN" not in parts:
            name = "f" + name[:3]
        form = f"np.{name}({{}}, {{}})"
        self._plain(operands, kind, f"np.maximum({form}, {kind}(0))" if "relu" in parts else form)

    _min = _max

    def _ex2(self, parts, operands):
        self._plain(operands, "f4", "np.exp2({})")

    def _lg2(self, parts, operands):
        self._plain(operands, "f4", "np.log2({})")

    def _rcp(self, parts, operands):
        self._plain(operands, "f4", "f4(1) / {}")

    def _rsqrt(self, parts, operands):
        self._plain(operands, "f4", "f4(1) / np.sqrt({})")

    def _tanh(self, parts, operands):
        self._plain(operands, "f4", "np.tanh({})")

    # Bits.

    def _shl(self, parts, operands):
        kind = TYPES[parts[-1]]
        a, count = self.value(operands[1], kind), self.value(operands[2], "u4")
        self.put(operands[0], f"shift_left({a}, {count})", kind)

    def _shr(self, parts, operands):
        kind = TYPES[parts[-1]]
        a, count = self.value(operands[1], kind), self.value(operands[2], "u4")
        self.put(operands[0], f"shift_right({a}, {count})", kind)

    def _bfe(self, parts, operands):
        kind = TYPES[parts[-1]]
        unsigned = kind.replace("i", "u")
        a, start, length = self.value(operands[1], unsigned), *(self.value(x, "u4") for x in operands[2:])
        self.put(operands[0], f"bfe({a}, {start}, {length}, {kind[0] == 'i'})", unsigned)

    def _prmt(self, parts, operands):
        self._plain(operands, "u4", "prmt({}, {}, {})")

    def _lop3(self, parts, operands):
        self._plain(operands[:-1], "u4", f"lop3({{}}, {{}}, {{}}, {int(operands[-1], 0)})")

    # Choice and conversion.

    def _setp(self, parts, operands):
        kind = TYPES[parts[-1]]
        if parts[1] == "nan":
            self._plain(operands, kind, "np.isnan({}) | np.isnan({})", "b1")
        else:
            self._plain(operands, kind, f"{{}} {_COMPARED[parts[1]]} {{}}", "b1")

    def _selp(self, parts, operands):
        kind = TYPES[parts[-1]]
        a, b, which = *(self.value(x, kind) for x in operands[1:3]), self.value(operands[3], "b1")
        self.put(operands[0], f"np.where({which}, {a}, {b})", kind)

    def _mov(self, parts, operands):
        target, source = operands
        kind = TYPES[parts[-1]]
        if target.startswith("{"):
            self.together_put(target, [f"halves({self.value(source, 'u4')})[{n}]" for n in range(2)], ["u2", "u2"])
        elif source.startswith("{"):
            low, high = (self.value(x, "u2") for x in source.strip("{}").split(","))
            self.put(target, f"joined({low}, {high})", "u4")
        else:
            self.put(target, self.value(source, kind), kind)

    def _cvta(self, parts, operands):
        self.put(operands[0], self.value(operands[1], "u8"), "u8")

    def _cvt(self, parts, operands):
        to, source = parts[-2], parts[-1]
        if to in ("bf16x2", "f16x2") and source == "f32":
            self._plain(operands, "f4", f"pair('{to[:-2]}', {{}}, {{}})", "u4")
        elif source == "e4m3x2":
            self.put(operands[0], f"from_e4m3({self.value(operands[1], 'u2')})", "u4")
        elif to == "e4m3x2":
            self._plain(operands, "f4", "to_e4m3({}, {})", "u2")
        elif to == "bf16":
            self.put(operands[0], f"to_bf16({self.value(operands[1], 'f4')}.astype(f8))", "u2")
        elif source == "bf16":
            self.put(operands[0], f"bf16({self.value(operands[1], 'u2')})", "f4")
        elif "rni" in parts:
            self.put(operands[0], f"to_integer({self.value(operands[1], 'f4')})", "i4")
        else:
            kind, other = TYPES[source], TYPES[to]
            self.put(operands[0], f"{self.value(operands[1], kind)}.astype({other})", other)

    # Memory. The warp does it.

    def _ld(self, parts, operands):
        if parts[1].startswith("param"):
            name = operands[1].strip("[]")
            self.put(operands[0], f"w.parameter({self.code.program.parameters.index(name)})", "u8")
            return
        space = parts[1] if parts[1] in ("shared", "global") else "any"
        kind, names = TYPES[parts[-1]], operands[0].strip("{}").split(",")
        self.lines.append(f"x = w.load({space!r}, {self.address(operands[1])}, {kind}, {len(names)}, {self.active})")
        for n, name in enumerate(names):
            self.put(name, f"x[{n}]", kind)

    def _st(self, parts, operands):
        space = parts[1].split("::")[0] if parts[1].split("::")[0] in ("shared", "global") else "any"
        kind = TYPES[parts[-1]]
        values = ", ".join(self.value(x, kind) for x in operands[1].strip("{}").split(","))
        self.lines.append(f"w.store({space!r}, {self.address(operands[0])}, [{values}], {self.active})")

    def _ldmatrix(self, parts, operands):
        names = operands[0].strip("{}").split(",")
        self.lines.append(f"x = w.load_matrices({self.address(operands[1])}, {len(names)}, {'trans' in parts})")
        self.together_put(operands[0], [f"x[{n}]" for n in range(len(names))], ["u4"] * len(names))

    def _stmatrix(self, parts, operands):
        values = ", ".join(self.value(x, "u4") for x in operands[1].strip("{}").split(","))
        self.lines.append(f"w.store_matrices({self.address(operands[0])}, [{values}], {'trans' in parts})")

    def _mapa(self, parts, operands):
        self.put(operands[0], f"w.of_rank({self.value(operands[1], 'u4')}, {self.value(operands[2], 'u4')})", "u4")

    # A warp together.

    def _elect(self, parts, operands):
        self.lines.append(f"x = w.elect({self.active})")
        self.together_put(operands[0], ["x[0]", "x[1]"], ["u4", "b1"])

    def _shfl(self, parts, operands):
        a, b, wide = (self.value(x, "u4") for x in operands[1:4])
        self.lines.append(f"x = w.shuffle({parts[2]!r}, {a}, {b}, {wide}, {self.active})")
        self.together_put(operands[0], ["x[0]", "x[1]"], ["u4", "b1"])

    def _redux(self, parts, operands):
        value = self.value(operands[1], "u4")
        lanes = ":" if self.active == "None" else self.active
        self.put(operands[0], f"np.full({LANES}, {value}[{lanes}].max(), u4)", "u4")

    def _mma(self, parts, operands):
        d, a, b, c = ([self.value(x, "u4") for x in part.strip("{}").split(",")] for part in operands)
        a, b, c = (f"[{', '.join(part)}]" for part in (a, b, c))
        self.lines.append(f"x = w.mma({parts[7]!r}, {a}, {b}, {c})")
        self.together_put(operands[0], [f"x[{n}]" for n in range(len(d))], ["u4"] * len(d))

    def _wgmma(self, parts, operands):
        if parts[1] == "mma_async":
            if not re.fullmatch(r"m64n\d+k16", parts[4]) or parts[5] != "f32" or parts[6] not in ("bf16", "f16"):
                raise NotImplementedError(f"{'.'.join(parts)}: the product is not known here")
            places = self.code.places
            targets = [places[x] for x in operands[0].strip("{}").split(",")]
            if operands[1].startswith("{"):
                a = str([places[x] for x in operands[1].strip("{}").split(",")])
            else:
                a = self.value(operands[1], "u8")
            add = self.value(operands[3], "b1")
            signs_and_turns = ", ".join(str(int(x, 0)) for x in operands[4:])
            b = self.value(operands[2], "u8")
            width = int(parts[4].removeprefix("m64n").removesuffix("k16"))
            what = f"{width}, {parts[6]!r}, {targets}, {a}, {b}, {add}, [{signs_and_turns}]"
            self.lines.append(f"w.wgmma({what})")
        elif parts[1] == "commit_group":
            self.lines.append("w.wgmma_commit()")
        else:
            self.lines.append(f"w.wgmma_wait({int(operands[0], 0)})")

    # Barriers and copies that need no wait.

    def _fence(self, parts, operands):
        self.lines.append("w.fence()")

    def _barrier(self, parts, operands):
        self.lines.append("w.cluster_arrive()")

    def _mbarrier(self, parts, operands):
        if parts[1] == "init":
            self.lines.append(f"w.init({self.address(operands[0])}, {self.value(operands[1], 'u4')}, {self.active})")
            return
        expected = "expect_tx" in parts
        count = self.value(operands[2], "u4")
        self.lines.append(f"w.arrive({self.address(operands[1])}, {count}, {expected}, {self.active})")

    def _cp(self, parts, operands):
        if "commit_group" in parts:
            self.lines.append(f"w.bulk_commit({self.active})")
        elif "wait_group" in parts:
            self.lines.append(f"w.bulk_wait({int(operands[0])}, {self.active})")
        elif "tensor" not in parts:
            a, b, size = *(self.address(x) for x in operands[:2]), self.value(operands[2], "u4")
            self.lines.append(f"w.bulk_store({a}, {b}, {size}, {self.active})")
        elif parts[-1] == "bulk_group":
            what, where = self._tensor(operands[0])
            self.lines.append(f"w.tensor_store({what}, {where}, {self.address(operands[1])}, {self.active})")
        else:
            what, where = self._tensor(operands[1])
            to, barrier = self.address(operands[0]), self.address(operands[2])
            self.lines.append(f"w.tensor_load({to}, {what}, {where}, {barrier}, {self.active})")

    def _tensor(self, text: str) -> tuple[str, str]:
        """Return a tensor's descriptor and the coordinates, of `[address, {x, y, ...}]`."""
        found = re.fullmatch(r"\[([^,]+),\{(.*)\}\]", text)
        places = ", ".join(self.value(x, "i4") for x in found[2].split(","))
        return f"{self.value(found[1], 'u8')}.astype(i8)", f"[{places}]"
