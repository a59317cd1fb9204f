"""Small programs in PTX for the tests of what runs them."""

from pallas_kernels.ptx.launch import Launch
from pallas_kernels.ptx.parse import parse
from pallas_kernels.ptx.run import Compiled, execute
from pallas_kernels.ptx.translate import Code

KINDS = {"float32": "f32", "int32": "i32", "uint32": "i32", "bfloat16": "bf16", "int8": "i8", "uint64": "i64"}
# The address of a word of shared memory for each thread, in %r1.
SAY = "cvt.u32.u64 %r1, %rd31; shl.b32 %r2, %r0, 2; add.s32 %r1, %r1, %r2;"
# Until a phase of the barrier at %r2 is over.
WAIT = "{ .reg .pred P1; W: mbarrier.try_wait.parity.shared.b64 P1, [%r2], %r7, %r8; @P1 bra.uni D; bra.uni W; D: }"


def program(body: str, parameters: int = 4) -> str:
    given = ", ".join(f".param .u64 .ptr .align 256 k_param_{n}" for n in range(parameters))
    pointers = "".join(f"ld.param.b64 %rd{n}, [k_param_{n}];\n" for n in range(parameters))
    return f""".visible .entry k({given})
    .maxntid 128, 1, 1
    {{
    .reg .pred %p<9>; .reg .b16 %rs<19>; .reg .b32 %r<99>; .reg .b64 %rd<40>;
    .shared .align 16 .b8 shmem;
    {pointers}
    mov.u32 %r0, %tid.x;  // the thread
    mul.wide.u32 %rd20, %r0, 4;
    {body}
    ret;
    }}"""


def run(
    body,
    arrays,
    out,
    *,
    tensors=(),
    threads=32,
    grid=(1, 1, 1),
    cluster=(1, 1, 1),
    shared=4096,
    late=0.0,
    seed=0,
    changed=None,
):
    """Run a program on arrays; its parameters are the inputs, the outputs, and the tensors."""
    shapes = tuple((x.shape, KINDS[x.dtype.name]) for x in (*arrays, *out))
    parameters = (*range(len(shapes)), *((tuple(tensors),) if tensors else ()))
    text = program(body, len(shapes) + bool(tensors))
    text = text.replace(f"ld.param.b64 %rd{len(shapes)}, [", "mov.b64 %rd39, [") if tensors else text
    text = text.replace(f"mov.b64 %rd39, [k_param_{len(shapes)}]", f"mov.b64 %rd{len(shapes)}, k_param_{len(shapes)}")
    launch = Launch(grid, threads, cluster, shared, parameters, shapes)
    return execute(Compiled(Code.of(parse(text)), launch, changed or {}), arrays, out, late, seed)


def lines(instruction: str, inputs: int, kind: str = "b32") -> str:
    """Return a program that loads a number a lane of each input, does an instruction, and stores the result."""
    loads = "".join(
        f"add.s64 %rd2{n + 1}, %rd{n}, %rd20;\nld.global.b32 %r{n + 1}, [%rd2{n + 1}];\n" for n in range(inputs)
    )
    return f"{loads}\n{instruction}\nadd.s64 %rd30, %rd{inputs}, %rd20;\nst.global.{kind} [%rd30], %r9;\n"
