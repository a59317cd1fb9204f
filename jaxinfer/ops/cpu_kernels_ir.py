"""A small writer of LLVM IR text: values with operators, variables, counted loops, vectors."""

import contextlib
import dataclasses
import re
import struct
from collections.abc import Iterator

_OPERATORS = {  # operator -> instruction on integers, on floats
    "+": ("add", "fadd"), "-": ("sub", "fsub"), "*": ("mul", "fmul"), "//": ("sdiv", None), "/": (None, "fdiv"),
    "&": ("and", None), "^": ("xor", None), ">>": ("lshr", None),
}  # fmt: skip


@dataclasses.dataclass(frozen=True, eq=False)
class Value:
    """An LLVM value of a type such as "i64", "ptr" or "<16 x float>"; a Python number beside it takes its type."""

    code: "Code"
    type: str
    name: str

    def __add__(self, other):
        return self.code.binary("+", self, other)

    def __sub__(self, other):
        return self.code.binary("-", self, other)

    def __mul__(self, other):
        return self.code.binary("*", self, other)

    def __floordiv__(self, other):
        return self.code.binary("//", self, other)

    def __truediv__(self, other):
        return self.code.binary("/", self, other)

    def __and__(self, other):
        return self.code.binary("&", self, other)

    def __xor__(self, other):
        return self.code.binary("^", self, other)

    def __rshift__(self, other):
        return self.code.binary(">>", self, other)

    def __lt__(self, other):
        return self.code.emit("i1", f"icmp slt {self.type} {self.name}, {self.code.operand(other, self.type)}")

    def equals(self, other):
        return self.code.emit("i1", f"icmp eq {self.type} {self.name}, {self.code.operand(other, self.type)}")

    @property
    def lanes(self) -> int:
        """The number of entries of a vector; 1 for a scalar."""
        found = re.match(r"<(\d+) x", self.type)
        return int(found[1]) if found else 1


@dataclasses.dataclass(frozen=True)
class Variable:
    """A value that changes: a stack slot, which the optimizer turns into a register."""

    code: "Code"
    type: str
    slot: Value

    def get(self) -> Value:
        return self.code.load(self.slot, self.type)

    def set(self, value: Value | int | float) -> None:
        self.code.store(value if isinstance(value, Value) else self.code.constant(value, self.type), self.slot)


class Code:
    """One function while it is written. `text` is the whole of it once the body is complete."""

    def __init__(self, name: str, result: str, *arguments: str, declared: dict[str, str]):
        self.arguments = [Value(self, kind, f"%a{n}") for n, kind in enumerate(arguments)]
        self._head = f"define {result} @{name}({', '.join(f'{a.type} {a.name}' for a in self.arguments)}) nounwind"
        self._slots: list[str] = []
        self._lines: list[str] = []
        self._count = 0
        self._declared = declared  # of the module: signatures of the functions that it calls

    @property
    def text(self) -> str:
        return "\n".join(
            [self._head + " {", *self._slots, "br label %start", "start:", *self._lines, "unreachable", "}", ""]
        )

    @property
    def zero(self) -> Value:
        """The first index."""
        return self.constant(0, "i64")

    def emit(self, kind: str, instruction: str) -> Value:
        self._count += 1
        self._lines.append(f"%v{self._count} = {instruction}")
        return Value(self, kind, f"%v{self._count}")

    def line(self, instruction: str) -> None:
        self._lines.append(instruction)

    def constant(self, value: int | float | str, kind: str) -> Value:
        """Return a number, or each lane of a vector set to it, or the text of a constant."""
        return Value(self, kind, value if isinstance(value, str) else self.operand(value, kind))

    def operand(self, value: Value | int | float, kind: str) -> str:
        if isinstance(value, Value):
            return value.name
        vector = re.match(r"<(\d+) x (\w+)>", kind)
        if vector:
            return "<" + ", ".join([f"{vector[2]} {self.operand(value, vector[2])}"] * int(vector[1])) + ">"
        if kind == "float":  # written as the bits of the double that equals the float
            rounded = struct.unpack("<f", struct.pack("<f", value))[0]
            return f"0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"
        return str(value)

    def binary(self, operator: str, left: Value, right: Value | int | float) -> Value:
        instruction = _OPERATORS[operator]["float" in left.type]
        return self.emit(left.type, f"{instruction} {left.type} {left.name}, {self.operand(right, left.type)}")

    def cast(self, instruction: str, value: Value, kind: str) -> Value:
        return self.emit(kind, f"{instruction} {value.type} {value.name} to {kind}")

    def select(self, condition: Value, yes: Value, no: Value) -> Value:
        return self.emit(yes.type, f"select i1 {condition.name}, {yes.type} {yes.name}, {no.type} {no.name}")

    def smaller(self, left: Value, right: Value) -> Value:
        return self.select(left < right, left, right)

    def larger(self, left: Value, right: Value) -> Value:
        return self.select(left < right, right, left)

    # Memory, which is addressed by bytes and never assumed to be aligned.
    def at(self, pointer: Value, index: Value | int, kind: str = "i8") -> Value:
        return self.emit("ptr", f"getelementptr {kind}, ptr {pointer.name}, i64 {self.operand(index, 'i64')}")

    def load(self, pointer: Value, kind: str) -> Value:
        return self.emit(kind, f"load {kind}, ptr {pointer.name}, align 1")

    def store(self, value: Value, pointer: Value) -> None:
        self.line(f"store {value.type} {value.name}, ptr {pointer.name}, align 1")

    def read_atomic(self, pointer: Value) -> Value:
        return self.emit("i64", f"load atomic i64, ptr {pointer.name} acquire, align 8")

    def add_atomic(self, pointer: Value, amount: int) -> Value:
        """Add and return what was there before."""
        return self.emit("i64", f"atomicrmw add ptr {pointer.name}, i64 {amount} acq_rel")

    def reserve(self, kind: str) -> Value:
        self._count += 1
        self._slots.append(f"%s{self._count} = alloca {kind}")
        return Value(self, "ptr", f"%s{self._count}")

    def variable(self, value: Value | int | float, kind: str | None = None) -> Variable:
        variable = Variable(self, kind or value.type, self.reserve(kind or value.type))
        variable.set(value)
        return variable

    # Control flow.
    def label(self) -> str:
        self._count += 1
        return f"b{self._count}"

    def begin(self, label: str) -> None:
        """End the current block by falling through to a new one."""
        self._lines += [f"br label %{label}", f"{label}:"]

    @contextlib.contextmanager
    def when(self, condition: Value) -> Iterator[None]:
        """Run the body only where the condition holds."""
        yes, end = self.label(), self.label()
        self._lines += [f"br i1 {condition.name}, label %{yes}, label %{end}", f"{yes}:"]
        yield
        self.begin(end)

    @contextlib.contextmanager
    def unless(self, condition: Value) -> Iterator[None]:
        """Run the body only where the condition does not hold."""
        with self.when(condition ^ 1):
            yield

    def jump(self, label: str) -> None:
        """Go to a label; what follows is another block."""
        self._lines += [f"br label %{label}", f"{self.label()}:"]

    @contextlib.contextmanager
    def loop(self, start: Value, stop: Value, step: int = 1) -> Iterator[Value]:
        """Run the body for each index of `range(start, stop, step)`."""
        index, head, body, end = self.variable(start), self.label(), self.label(), self.label()
        self.begin(head)
        i = index.get()
        self._lines += [f"br i1 {(i < stop).name}, label %{body}, label %{end}", f"{body}:"]
        yield i
        index.set(i + step)
        self._lines += [f"br label %{head}", f"{end}:"]

    def give_back(self, value: Value | None = None) -> None:
        """Return from the function."""
        self._lines += [f"ret {value.type} {value.name}" if value else "ret void", f"{self.label()}:"]

    # Functions.
    def call(self, result: str, function: Value | str, *operands: Value) -> Value:
        """Call a pointer, or a function of the C library or an intrinsic by its name."""
        if isinstance(function, str):
            self._declared[function] = f"declare {result} @{function}({', '.join(o.type for o in operands)})"
        name = function.name if isinstance(function, Value) else f"@{function}"
        call = f"call {result} {name}({', '.join(f'{o.type} {o.name}' for o in operands)})"
        if result == "void":
            self.line(call)
            return Value(self, "void", "")
        return self.emit(result, call)

    def assembly(self, result: str, text: str, constraints: str, *operands: Value) -> Value:
        listed = ", ".join(f"{o.type} {o.name}" for o in operands)
        return self.emit(result, f'call {result} asm "{text}", "{constraints}"({listed})')

    # Vectors.
    def shuffle(self, vector: Value, lanes: list[int], other: Value | None = None) -> Value:
        """Return the lanes that are named, of which `other` has those after the vector's own."""
        kind = vector.type.split(" x ")[1].rstrip(">")
        mask = "<" + ", ".join(f"i32 {lane}" for lane in lanes) + ">"
        second = other.name if other else "poison"
        text = f"shufflevector {vector.type} {vector.name}, {vector.type} {second}, <{len(lanes)} x i32> {mask}"
        return self.emit(f"<{len(lanes)} x {kind}>", text)

    def splat(self, scalar: Value, lanes: int) -> Value:
        kind = f"<{lanes} x {scalar.type}>"
        first = self.emit(kind, f"insertelement {kind} poison, {scalar.type} {scalar.name}, i64 0")
        return self.shuffle(first, [0] * lanes)

    def fold(self, vector: Value) -> Value:
        """Return the sum of a vector's two halves."""
        half = vector.lanes // 2
        return self.shuffle(vector, list(range(half))) + self.shuffle(vector, list(range(half, 2 * half)))

    def sum(self, vector: Value) -> Value:
        while vector.lanes > 1:
            vector = self.fold(vector)
        return self.emit(vector.type.split(" x ")[1].rstrip(">"), f"extractelement {vector.type} {vector.name}, i64 0")
