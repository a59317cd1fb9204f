"""Machine code that XLA's CPU backend calls: the call's frame, the work shared out over XLA's threads, the compiler.

`compile_kernel` wraps a kernel in the function that XLA calls (its typed FFI). That function cuts the rows of the
weight (the columns of the result) into blocks, offers them to XLA's thread pool, and works on them itself: a block is
claimed by one atomic addition, so a busy pool costs speed and never a wait for a thread that does not come. A call
leaves nothing behind: the last thread to let go of its job frees it.
"""

import functools
import itertools
import pathlib
import re
from collections.abc import Callable
from typing import NamedTuple

import jaxlib
import llvmlite.binding as llvm

from jaxinfer.ops.cpu_kernels_ir import Code, Value

_BLOCK_BYTES = 1 << 16  # of weights in one block: some microseconds of work
_HEADER = 256  # bytes of a job before its workspace

# A job is a row of 8-byte slots. The first three are written by every thread and have a cache line of their own.
_REFERENCES, _NEXT, _DONE = 0, 1, 2
_READY, _BLOCKS, _BLOCK_ROWS = 8, 9, 10
_M, _I, _O, _G, _OUT, _WORKSPACE, _OPERANDS = 11, 12, 13, 14, 15, 16, 17


class Job(NamedTuple):
    """What a kernel works on: `x [M, I]` and `w [O, ...]` and what else it takes, and a place for its result."""

    M: Value
    I: Value
    O: Value
    G: Value  # groups of one row of the weight: an axis of the third operand; 1 where there is none
    operands: list[Value]
    out: Value
    workspace: Value


class Kernel(NamedTuple):
    """A product `x w^T` as three writers of code."""

    operands: int
    workspace: Callable[[Value, Value, Value], Value]  # M, I, G -> bytes
    prepare: Callable[[Code, Job], None]  # once a call: may write the workspace
    rows: Callable[[Code, Job, Value, Value], None]  # computes out[:, start:stop]
    parts: int = 0  # where not 0, `rows` is called for each of O * parts items of their own
    group_axis: int = 1  # of the third operand


def instruction_set() -> str | None:
    """Return the widest vectors that the kernels can use here: "avx512_vnni", "avx2", "neon_dotprod", or None."""
    has = llvm.get_host_cpu_features()
    needs = {
        "avx512_vnni": ("avx512vnni", "avx512bw", "avx512vl", "f16c"),
        "avx2": ("avx2", "fma", "f16c"),
        "neon_dotprod": ("neon", "dotprod"),
    }
    return next((name for name, features in needs.items() if all(has.get(f) for f in features)), None)


def compile_kernel(kernel: Kernel) -> tuple[int, object]:
    """Return the address of the code that XLA calls, and the object that keeps that code alive."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    llvm.initialize_native_asmparser()  # for the instructions that kernels write as text
    machine = llvm.Target.from_default_triple().create_target_machine(
        cpu=llvm.get_host_cpu_name(), features=llvm.get_host_cpu_features().flatten(), opt=3
    )
    engine = llvm.create_mcjit_compiler(optimize(kernel, machine), machine)
    engine.finalize_object()
    return engine.get_function_address("handler"), engine


def optimize(kernel: Kernel, machine: llvm.TargetMachine) -> llvm.ModuleRef:
    """Return the optimized module of a kernel for any machine."""
    module = llvm.parse_assembly(write_module(kernel))
    module.triple = machine.triple
    module.verify()
    passes = llvm.create_pass_builder(machine, llvm.create_pipeline_tuning_options(speed_level=3))
    passes.getModulePassManager().run(module, passes)
    return module


def write_module(kernel: Kernel) -> str:
    """Return the IR of `handler`, which XLA calls, `task`, which its threads call, and the work that both share."""
    declared: dict[str, str] = {}
    functions = [
        _write_work(Code("work", "void", "ptr", declared=declared), kernel),
        _write_task(Code("task", "void", "ptr", declared=declared)),
        _write_handler(Code("handler", "ptr", "ptr", declared=declared), kernel),
    ]
    return "\n".join([*functions, *(text for name, text in declared.items() if name != "work")])


def _get(code: Code, job: Value, slot: int) -> Value:
    return code.load(code.at(job, slot, "i64"), "ptr" if slot >= _OUT else "i64")


def _put(code: Code, job: Value, slot: int, value: Value | int) -> None:
    value = value if isinstance(value, Value) else code.constant(value, "i64")
    code.store(value, code.at(job, slot, "i64"))


def _open(code: Code, job: Value, operands: int) -> Job:
    slots = (_M, _I, _O, _G)
    sizes = (_get(code, job, slot) for slot in slots)
    listed = [_get(code, job, _OPERANDS + n) for n in range(operands)]
    return Job(*sizes, listed, _get(code, job, _OUT), _get(code, job, _WORKSPACE))


def _write_work(code: Code, kernel: Kernel) -> str:
    """Claim blocks of rows and compute them until there are none."""
    (job,) = code.arguments
    opened, blocks, block_rows = (
        _open(code, job, kernel.operands),
        _get(code, job, _BLOCKS),
        _get(code, job, _BLOCK_ROWS),
    )
    again = code.label()
    code.begin(again)
    block = code.add_atomic(code.at(job, _NEXT, "i64"), 1)
    with code.when(block < blocks):
        start = block * block_rows
        kernel.rows(code, opened, start, code.smaller(start + block_rows, opened.O))
        code.add_atomic(code.at(job, _DONE, "i64"), 1)
        code.jump(again)
    code.give_back()
    return code.text


def _write_task(code: Code) -> str:
    (job,) = code.arguments
    _spin(code, job, _READY, code.constant(1, "i64"))
    code.call("void", "work", job)
    _release(code, job)
    code.give_back()
    return code.text


def _write_handler(code: Code, kernel: Kernel) -> str:
    (frame,) = code.arguments
    null = code.constant("null", "ptr")
    extension = code.load(code.at(frame, 8), "ptr")
    with code.unless(extension.equals(null)):  # not a call: XLA asks for the version
        metadata = code.load(code.at(extension, 24), "ptr")
        for place, value in ((24, _abi()["MAJOR"]), (28, _abi()["MINOR"]), (32, 0)):
            code.store(code.constant(value, "i32"), code.at(metadata, place))
        code.give_back(null)
    listed = code.load(code.at(frame, 72), "ptr")
    buffers = [code.load(code.at(listed, n, "ptr"), "ptr") for n in range(kernel.operands)]

    def axis(operand: int, n: int) -> Value:
        return code.load(code.at(code.load(code.at(buffers[operand], 40), "ptr"), n, "i64"), "i64")

    M, I, O, row_bytes = axis(0, 0), axis(0, 1), axis(1, 0), axis(1, 1)
    G = axis(2, kernel.group_axis) if kernel.operands > 2 else code.constant(1, "i64")
    job = code.call("ptr", "malloc", kernel.workspace(M, I, G) + _HEADER)
    block_rows = (code.constant(_BLOCK_BYTES // 4, "i64") // (row_bytes + 1) + 1) * 4
    if kernel.parts:
        O, block_rows = O * kernel.parts, code.constant(1, "i64")
    blocks = (O + block_rows - 1) // block_rows
    out = code.load(code.load(code.at(frame, 112), "ptr"), "ptr")
    slots = {
        _NEXT: 0, _DONE: 0, _READY: 0, _BLOCKS: blocks, _BLOCK_ROWS: block_rows, _M: M, _I: I, _O: O, _G: G,
        _OUT: code.load(code.at(out, 24), "ptr"), _WORKSPACE: code.at(job, _HEADER),
    }  # fmt: skip
    slots |= {_OPERANDS + n: code.load(code.at(buffer, 24), "ptr") for n, buffer in enumerate(buffers)}
    for slot, value in slots.items():
        _put(code, job, slot, value)
    _offer(code, frame, job, blocks - 1)
    kernel.prepare(code, _open(code, job, kernel.operands))
    code.add_atomic(code.at(job, _READY, "i64"), 1)
    code.call("void", "work", job)
    _spin(code, job, _DONE, blocks)
    _release(code, job)
    code.give_back(null)
    return code.text


def _offer(code: Code, frame: Value, job: Value, useful: Value) -> None:
    """Ask XLA's threads for help, at most `useful` of them. Each that comes holds a reference to the job."""
    context, threads = code.load(code.at(frame, 24), "ptr"), code.variable(1, "i64")
    failed = _ask_xla(code, frame, "ThreadPool_NumThreads", context, threads.slot)
    _put(code, job, _REFERENCES, 1)
    others = code.smaller(threads.get() - 1, useful)
    with code.loop(code.constant(0, "i64"), others):
        code.add_atomic(code.at(job, _REFERENCES, "i64"), 1)
        task = code.constant("@task", "ptr")
        failed = _ask_xla(code, frame, "ThreadPool_Schedule", context, task, job)
        with code.when(failed):
            code.add_atomic(code.at(job, _REFERENCES, "i64"), -1)


def _ask_xla(code: Code, frame: Value, name: str, *fields: Value) -> Value:
    """Call a function of XLA's table, drop the error that it may return, and say whether it returned one."""
    null = code.constant("null", "ptr")
    error = _call_table(code, frame, name, "ptr", *fields)
    with code.unless(error.equals(null)):
        _call_table(code, frame, "Error_Destroy", "void", error)
    return error.equals(null) ^ 1


def _call_table(code: Code, frame: Value, name: str, result: str, *fields: Value) -> Value:
    """Every function takes one struct: its size, a list of extensions, which is empty, and the fields."""
    struct = code.reserve(f"[{2 + len(fields)} x i64]")
    for n, value in enumerate((8 * (2 + len(fields)), 0, *fields)):
        _put(code, struct, n, value)
    table = code.load(code.at(frame, 16), "ptr")
    return code.call(result, code.load(code.at(table, 48 + 8 * _abi()[name]), "ptr"), struct)


def _spin(code: Code, job: Value, slot: int, target: Value) -> None:
    """Wait until a slot has reached `target`, which a running thread is about to bring about."""
    again = code.label()
    code.begin(again)
    with code.when(code.read_atomic(code.at(job, slot, "i64")) < target):
        if instruction_set() == "neon_dotprod":
            code.call("void", "llvm.aarch64.hint", code.constant(1, "i32"))  # yield
        else:
            code.call("void", "llvm.x86.sse2.pause")
        code.jump(again)


def _release(code: Code, job: Value) -> None:
    with code.when(code.add_atomic(code.at(job, _REFERENCES, "i64"), -1).equals(1)):
        code.call("void", "free", job)


@functools.cache
def _abi() -> dict[str, int]:
    """Return the version of XLA's FFI and the place of each function in its table, from the header in jaxlib."""
    header = pathlib.Path(jaxlib.__file__).parent / "include" / "xla" / "ffi" / "api" / "c_api.h"
    text = header.read_text()
    table = re.findall(r"_XLA_FFI_API_STRUCT_FIELD\(XLA_FFI_(\w+)\);", text)
    version = re.findall(r"#define XLA_FFI_API_(MAJOR|MINOR) (\d+)", text)
    return dict(itertools.chain(zip(table, itertools.count(), strict=False), ((k, int(n)) for k, n in version)))
