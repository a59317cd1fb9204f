"""How a kernel is started, from what Mosaic GPU dumps: grid, parameters, and tensors that copies go by."""

import dataclasses
import re


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of an argument that copies go by: axes from the outermost to the innermost, strides in elements."""

    argument: int
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    element: int  # bytes
    swizzle: int  # bytes: 128, 64, 32, or 16 for none


@dataclasses.dataclass(frozen=True)
class Launch:
    """The grid and the threads of a block, blocks of a cluster, bytes of shared memory, and the parameters.

    A parameter is the number of an argument, or the tensors that lie in it, 128 bytes each. `arguments` are the shapes
    and types of the arrays, inputs first.
    """

    grid: tuple[int, int, int]
    threads: int
    cluster: tuple[int, int, int]
    shared: int
    parameters: tuple[int | tuple[Tensor, ...], ...]
    arguments: tuple[tuple[tuple[int, ...], str], ...]


def read(log: str) -> Launch:
    """Return the launch of a kernel, from the log of the passes that made it (`MOSAIC_GPU_DUMP_MLIR_PASSES`).

    Raises:
        ValueError: a log of another form.
    """
    dumps = re.split(r"^// -----// IR Dump[^\n]*\n", log, flags=re.MULTILINE)
    if len(dumps) < 2 or "gpu.launch_func" not in log:
        raise ValueError("the log shows no launch: another version of Mosaic GPU?")
    before, after = _host(dumps[1]), _host(next(d for d in reversed(dumps) if "gpu.launch_func" in d))
    launch = next(line for line in after.lines if "gpu.launch_func" in line)
    tensors = before.tensors()
    parameters = [after.parameter(name, tensors) for name in re.findall(r"(%\w+) : ", launch.split(" args(")[1])]
    sizes = {}
    for what in ("clusters", "blocks", "threads"):
        found = re.search(rf"{what} in \(([^)]*)\)", launch)
        sizes[what] = tuple(after.number(x.strip()) for x in found[1].split(",")) if found else (1, 1, 1)
    shared = after.number(re.search(r"dynamic_shared_memory_size (%\w+)", launch)[1])
    threads = sizes["threads"]
    if threads[1:] != (1, 1):
        raise ValueError(f"threads={threads}: must be of one axis")
    return Launch(sizes["blocks"], threads[0], sizes["clusters"], shared, tuple(parameters), before.arguments())


def _host(module: str) -> "_Host":
    start = re.search(r"^\s*(?:func\.func|llvm\.func) @\w+_mosaic_gpu\(.*$", module, flags=re.MULTILINE)
    if start is None:
        raise ValueError("the dump has no function of the host: another version of Mosaic GPU?")
    return _Host(re.split(r"= gpu\.launch ", module[start.start() :])[0].splitlines())


class _Host:
    """The function that starts the kernel: its lines, each by the name that it defines."""

    def __init__(self, lines: list[str]):
        self.lines = [line.strip() for line in lines]
        self.defined: dict[str, str] = {}
        for line in self.lines:
            names, defines, text = line.partition(" = ")
            if defines and names.startswith("%"):
                for name in re.findall(r"%\w+", names):
                    self.defined.setdefault(name, text)

    def number(self, name: str) -> int:
        """Return a constant."""
        found = re.match(r"(?:arith|llvm\.mlir)\.constant\D* ?\(?(-?\d+)", self.defined[name])
        if found is None:
            return self.number(re.search(r"%\w+", self.defined[name])[0])  # cast from another type
        return int(found[1])

    def arguments(self) -> tuple[tuple[tuple[int, ...], str], ...]:
        """Return the shape and the element type of each argument."""
        found = {}
        for line in self.lines:
            if "original_kernel_arg" in line:
                kind = re.search(r"to memref<([^,>]*)", line)[1]
                *shape, element = kind.split("x")
                number = int(re.search(r"from_kernel_arg_idx = (\d+)", line)[1])
                found[number] = (tuple(map(int, shape)), element)
        return tuple(found[n] for n in range(len(found)))

    def _argument(self, name: str) -> int:
        """Return the argument that a view is of."""
        text = self.defined[name]
        if found := re.search(r"from_kernel_arg_idx = (\d+)", text):
            return int(found[1])
        return self._argument(re.search(r"%\w+", text)[0])

    def tensors(self) -> tuple[Tensor, ...]:
        """Return the tensors that copies go by, in the order of their descriptors."""
        stored: dict[str, dict[int, str]] = {}
        found: dict[int, Tensor] = {}
        for line in self.lines:
            if put := re.match(r"llvm\.store (%\w+), (%\w+) :", line):
                base, index = re.match(r"llvm\.getelementptr (%\w+)\[(\d+)\]", self.defined[put[2]]).groups()
                stored.setdefault(base, {})[int(index)] = put[1]
            elif call := re.match(r"(?:func\.)?call @mosaic_gpu_init_tma_desc\(([^)]*)\)", line):
                place, _, _, rank, sizes, _, swizzle, box = (x.strip() for x in call[1].split(","))
                place = int(re.search(r"\[(\d+)\]", self.defined[place])[1])
                size = self.defined[self._first(self.defined[stored[sizes][0]])]
                found[place] = self._tensor(
                    size, self.number(swizzle), [self.number(stored[box][n]) for n in range(self.number(rank))]
                )
        return tuple(found[place] for place in sorted(found))

    @staticmethod
    def _first(text: str) -> str:
        return re.search(r"%\w+", text)[0]

    def _tensor(self, view: str, swizzle: int, box: list[int]) -> Tensor:
        """Return the tensor of a view, from its type."""
        of, kind = re.search(r"extract_strided_metadata (%\w+) : memref<(.*)> -> ", view).groups()
        shape, _, layout = kind.partition(",")
        *sizes, element = shape.split("x")
        sizes = tuple(map(int, sizes))
        given = re.search(r"strided<\[([^\]]*)\](?:, offset: (\d+))?", layout)
        if given is None:
            strides = [1]
            for size in reversed(sizes[1:]):
                strides.insert(0, strides[0] * size)
        else:
            strides = [int(x) for x in given[1].split(",")]
        offset = int(given[2]) if given and given[2] else 0
        return Tensor(self._argument(of), offset, sizes, tuple(strides), tuple(box), element_bytes(element), swizzle)

    def parameter(self, name: str, tensors: tuple[Tensor, ...]) -> int | tuple[Tensor, ...]:
        """Return what is given to the kernel: an argument's number, or the tensors."""
        found = re.match(r"llvm\.load (%\w+) .*-> !llvm\.ptr", self.defined[name])
        if found is None:
            return tensors
        pointers = re.search(r"\(%\w+: [^,]*, (%\w+):", self.lines[0])[1]
        if found[1] == pointers:  # the first of all: LLVM leaves out the step to it
            return 0
        return int(re.match(rf"llvm\.getelementptr {pointers}\[(\d+)\]", self.defined[found[1]])[1])


def element_bytes(name: str) -> int:
    """Return the bytes of an element of MLIR's type."""
    return max(1, int(re.match(r"[a-zA-Z]+(\d+)", name)[1]) // 8)
