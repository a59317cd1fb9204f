"""PTX as a list of instructions: the part of the language that LLVM and our own assembly use."""

import dataclasses
import re
from collections.abc import Iterator

_REGISTERS = re.compile(r"\.reg\s+\.(\w+)\s+(.+)", re.DOTALL)
_LABEL = re.compile(r"([$\w]+):")
_GUARD = re.compile(r"@(!?)([%$\w]+)\s+")
_SHARED = re.compile(r"\.shared\s+(?:\.align\s+\d+\s+)?\.b8\s+(\w+)")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """`@guard opcode operands`: an operand is a name, a number, a list in braces, or an address in brackets."""

    opcode: str
    operands: tuple[str, ...] = ()
    guard: str | None = None
    negated: bool = False

    def __str__(self) -> str:
        guard = "" if self.guard is None else f"@{'!' if self.negated else ''}{self.guard} "
        return f"{guard}{self.opcode} {', '.join(self.operands)}"


@dataclasses.dataclass(frozen=True)
class Program:
    """A kernel: its instructions, where labels stand, what each register holds, its parameters and shared memory."""

    name: str
    instructions: tuple[Instruction, ...]
    labels: dict[str, int]
    registers: dict[str, str]  # name -> pred, b16, b32 or b64
    parameters: tuple[str, ...]
    shared: frozenset[str]


def parse(text: str) -> Program:
    """Return the kernel of a PTX file that has one.

    Raises:
        ValueError: a file with no kernel.
    """
    found = re.search(r"\.entry\s+(\w+)\s*\((.*?)\)\s*(.*?)\{", text, re.DOTALL)
    if found is None:
        raise ValueError("no .entry in the PTX: there must be a kernel")
    parameters = tuple(re.findall(r"\b(\w+_param_\d+)\b", found[2]))
    return _Reader(found[1], parameters).read(_without_comments(text[found.end() :]))


def _without_comments(text: str) -> str:
    text = re.sub(r"//[^\n]*", "", text)
    return re.sub(r"^[ \t]*\.(?:loc|file)\b[^\n]*$", "", text, flags=re.MULTILINE)


class _Reader:
    """What is being read: scopes of braces have registers and labels of their own."""

    def __init__(self, name: str, parameters: tuple[str, ...]):
        self.name, self.parameters = name, parameters
        self.instructions: list[Instruction] = []
        self.labels: dict[str, int] = {}
        self.registers: dict[str, str] = {}
        self.shared: set[str] = set()
        self.scopes: list[dict[str, str]] = [{}]  # of each scope: what a name in the text is here
        self.opened = 0

    def read(self, text: str) -> Program:
        for statement in _statements(text):
            if statement == "{":
                self.opened += 1
                self.scopes.append({})
            elif statement == "}":
                if len(self.scopes) == 1:
                    break
                self._close()
            else:
                self._statement(statement)
        return Program(
            self.name, tuple(self.instructions), self.labels, self.registers, self.parameters, frozenset(self.shared)
        )

    def _close(self) -> None:
        """Leave a scope: jumps to its labels now know which they are."""
        inside = self.scopes.pop()
        for at in range(len(self.instructions) - 1, -1, -1):
            one = self.instructions[at]
            if not one.opcode.startswith("bra") or one.operands[0] not in inside:
                continue
            self.instructions[at] = dataclasses.replace(one, operands=(inside[one.operands[0]],))

    def _statement(self, text: str) -> None:
        if text.endswith(":"):
            name = text[:-1]
            if len(self.scopes) > 1:
                self.scopes[-1][name] = f"{name}#{self.opened}"
            self.labels[self.scopes[-1].get(name, name)] = len(self.instructions)
        elif declared := _REGISTERS.fullmatch(text):
            for name in declared[2].split(","):
                self._declare(name.strip(), declared[1])
        elif shared := _SHARED.match(text):
            self.shared.add(shared[1])
        elif not text.startswith(".pragma"):
            self._instruction(text)

    def _declare(self, name: str, kind: str) -> None:
        many = re.fullmatch(r"(%?\w+)<(\d+)>", name)
        for one in [f"{many[1]}{n}" for n in range(int(many[2]))] if many else [name]:
            if len(self.scopes) > 1:
                self.scopes[-1][one] = f"{one}#{self.opened}"
            self.registers[self.scopes[-1].get(one, one)] = {"u32": "b32", "f32": "b32"}.get(kind, kind)

    def _instruction(self, text: str) -> None:
        guard, negated = None, False
        if guarded := _GUARD.match(text):
            guard, negated, text = self._name(guarded[2]), guarded[1] == "!", text[guarded.end() :]
        opcode, _, rest = text.partition(" ")
        operands = tuple(re.sub(r"[%$\w#]+", lambda x: self._name(x[0]), part) for part in _split(rest))
        self.instructions.append(Instruction(opcode, operands, guard, negated))

    def _name(self, name: str) -> str:
        for scope in reversed(self.scopes):
            if name in scope:
                return scope[name]
        return name


def _statements(text: str) -> Iterator[str]:
    """Yield labels (with their colon), braces of scopes, and the statements between semicolons."""
    at = 0
    while at < len(text):
        if text[at].isspace() or text[at] == ";":
            at += 1
        elif text[at] in "{}":
            yield text[at]
            at += 1
        elif label := _LABEL.match(text, at):
            yield label[0]
            at = label.end()
        else:
            end = text.find(";", at)
            end = len(text) if end < 0 else end
            yield " ".join(text[at:end].split())
            at = end + 1


def _split(text: str) -> list[str]:
    """Return the operands of a list, at the commas that are in no brackets."""
    parts, depth, start = [], 0, 0
    for at, letter in enumerate(text):
        depth += (letter in "[{") - (letter in "]}")
        if letter == "," and not depth:
            parts.append(text[start:at])
            start = at + 1
    parts.append(text[start:])
    return [part.replace(" ", "") for part in parts if part.strip()]
