"""What the compiler made of each kernel, without a GPU: `python -m lazypipe.kernels.gpu.audit`.

Compiles every kernel and tile of tiles.py for sm_80 and sm_90 and reads the result back with the cuobjdump that
ships inside triton: registers, stack (spills), shared memory, and the instruction mix of the machine code. Numbers are
static counts over the whole kernel, not executed instructions. TRITON_INTERPRET must be unset in this process.
"""

import argparse
import concurrent.futures
import dataclasses
import itertools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lazypipe.kernels.gpu.tiles import (
    KERNELS,
    Tile,
    decode_tile,
    fits,
    keep_values,
    product_precision,
    separate_outputs,
    shipped_tiles,
)

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes one program may use, per architecture
# Machine instructions worth counting: tensor-core products, exponentials, loads, shared-memory traffic, arithmetic.
INSTRUCTIONS = ("HGMMA", "HMMA", "MUFU.EX2", "LDG", "LDGSTS", "LDS", "STS", "LDL", "STL", "FFMA", "FADD", "FMUL")


@dataclasses.dataclass(frozen=True)
class Case:
    """One kernel to compile; `variant` says which of its outputs it computes."""

    kernel: str
    head_dim: int
    dtype: str
    tile: Tile
    arch: int
    mask_tile: Tile
    variant: str = "training"


@dataclasses.dataclass(frozen=True)
class Finding:
    """What came out. Bytes of shared memory and stack; `products` are wgmma in PTX on sm_90, HMMA elsewhere."""

    case: Case
    registers: int
    shared: int
    stack: int
    wgmma: int
    plain_tf32: int
    instructions: dict[str, int]

    @property
    def fits_shared(self) -> bool:
        return self.shared <= SHARED_LIMIT[self.case.arch]


def cases_for(
    archs: Sequence[int], dims: Sequence[int], dtypes: Sequence[str] = ("bf16", "fp32"), every_tile: bool = False
) -> list[Case]:
    """The default tile of every kernel, or every tile that ships, with the variants that do."""
    cases = []
    for arch, dim, dtype in itertools.product(archs, dims, dtypes):
        wide = dtype == "fp32"
        forwards = shipped_tiles("forward", dim, wide, arch // 10)
        for kernel in KERNELS:
            tiles = shipped_tiles(kernel, dim, wide, arch // 10)
            if not every_tile:
                del tiles[1:]
            variants = ["training"]
            if kernel == "forward":
                variants = ["training", "inference"]
            if kernel == "key" and separate_outputs(dim, wide):
                variants = ["dk", "dv"]
            for tile, variant in itertools.product(tiles, variants):
                # A backward tile is compiled with the mask of the first forward tile whose mask it can read.
                mask_tile = tile if kernel == "forward" else next(f for f in forwards if fits(kernel, tile, f))
                cases.append(Case(kernel, dim, dtype, tile, arch, mask_tile, variant))
        cases += [
            Case(kernel, dim, dtype, decode_tile(dim, wide), arch, forwards[0], "decode")
            for kernel in ("scores", "values")
        ]
    return cases


def _function_and_constants(case: Case) -> tuple[Any, dict[str, Any]]:
    from lazypipe.kernels.gpu.backward import key_kernel, query_kernel
    from lazypipe.kernels.gpu.bias_grad import bias_kernel
    from lazypipe.kernels.gpu.forward import forward_kernel
    from lazypipe.kernels.gpu.toeplitz import tile_step

    if case.variant == "decode":
        from lazypipe.kernels.gpu.decode import decode_scores_kernel, decode_values_kernel

        sizes: dict[str, Any] = {"D": case.head_dim, "DP": case.head_dim, "BR": 16, "BN": case.tile.block_n}
        sizes["SPLITS"] = 64
        sizes["PRECISION"] = product_precision(case.kernel, case.head_dim, case.dtype == "fp32")
        return {"scores": decode_scores_kernel, "values": decode_values_kernel}[case.kernel], sizes
    tile, training, wide = case.tile, case.variant != "inference", case.dtype == "fp32"
    part = case.variant if case.variant in ("dk", "dv") else case.kernel
    constants: dict[str, Any] = {
        "D": case.head_dim,
        "DP": case.head_dim,
        "BM": tile.block_m,
        "BN": tile.block_n,
        "T": tile.block_m,
        "STEP": tile_step(tile.block_m, tile.block_n),
        "WORDS": 2,
        "MM": case.mask_tile.block_m,
        "MN": case.mask_tile.block_n,
        "PACKED": False,
        "TRAINING": training,
        "STATS": False,
        "NEED_DQ": True,
        "NEED_DK": case.variant != "dv",
        "NEED_DV": case.variant != "dk",
        "PRECISION": product_precision(part, case.head_dim, wide),
        "KEEP_V": keep_values(case.head_dim, wide),
    }
    functions = {"forward": forward_kernel, "query": query_kernel, "key": key_kernel, "bias": bias_kernel}
    return functions[case.kernel], constants


def _pointer_type(name: str, dtype: str, variant: str) -> str:
    if name == "p_out" and variant == "decode":
        return "*fp32"  # partial outputs
    if name in ("p_q", "p_k", "p_v", "p_do", "p_out", "p_dq", "p_dk", "p_dv"):
        return f"*{dtype}"
    return "*i32" if name in ("p_words", "p_first", "p_end", "p_read") else "*fp32"


def compile_case(case: Case) -> Finding:
    """Compiles one kernel for one architecture and takes the result apart. Needs triton and no GPU."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise ValueError("TRITON_INTERPRET is 1; unset it, the interpreter replaces the compiler")
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    function, constants = _function_and_constants(case)
    names = list(function.arg_names)
    signature = {}
    for name in names:
        if name in constants:
            signature[name] = "constexpr"
        elif name.startswith("p_"):
            signature[name] = _pointer_type(name, case.dtype, case.variant)
        else:
            signature[name] = "fp32" if name in ("scale", "qk_scale") else "i32"
    # As at run time: pointers are 16-byte aligned, row strides are multiples of 16 elements.
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if name.startswith(("p_", "s_"))}
    source = ASTSource(
        function,
        signature,
        constexprs={(names.index(name),): value for name, value in constants.items() if name in names},
        attrs=aligned,
    )
    options = {"num_warps": case.tile.num_warps, "num_stages": case.tile.num_stages, "enable_fp_fusion": True}
    compiled = triton.compile(source, target=GPUTarget("cuda", case.arch, 32), options=options)
    registers, stack, instructions = _take_apart(compiled.asm["cubin"])
    ptx = compiled.asm["ptx"]
    return Finding(
        case=case,
        registers=registers,
        shared=int(compiled.metadata.shared),
        stack=stack,
        wgmma=ptx.count("wgmma.mma_async"),
        plain_tf32=_products_of_plain_tf32(compiled.asm["ttir"]),
        instructions=instructions,
    )


def _products_of_plain_tf32(ttir: str) -> int:
    """Products of float32 operands that the compiler may round to TF32, before it makes three of each tf32x3 one."""
    return len(re.findall(r"inputPrecision = tf32\b", ttir))


def _tool(name: str) -> str:
    import triton

    found = sorted(Path(triton.__file__).parent.glob(f"backends/nvidia/bin/{name}"))
    if not found:
        raise FileNotFoundError(f"{name} is not inside the triton package {triton.__version__}; use a Linux wheel")
    return str(found[0])


def _take_apart(cubin: bytes) -> tuple[int, int, dict[str, int]]:
    """(registers per thread, bytes of stack per thread, instruction counts) of one cubin."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(cubin)
        usage = subprocess.run(
            [_tool("cuobjdump"), "-res-usage", str(path)], capture_output=True, text=True, check=True
        ).stdout
        sass = subprocess.run(
            [_tool("cuobjdump"), "-sass", str(path)], capture_output=True, text=True, check=True
        ).stdout
    numbers = {key: int(value) for key, value in re.findall(r"\b(REG|STACK):(\d+)", usage)}
    opcodes = re.findall(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][A-Z0-9_.]*)", sass, flags=re.M)
    counts = {name: sum(op == name or op.startswith(name + ".") for op in opcodes) for name in INSTRUCTIONS}
    return numbers["REG"], numbers["STACK"], counts


def compile_all(cases: Sequence[Case], workers: int) -> list[Finding]:
    """Compiles the cases in `workers` fresh processes, keeping their order."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=context) as pool:
        return list(pool.map(compile_case, cases))


def format_table(findings: Sequence[Finding]) -> str:
    """One line per kernel."""
    shown = ("HGMMA", "HMMA", "MUFU.EX2", "LDG", "LDGSTS", "LDS", "STS", "FFMA")
    head = f"{'arch':5}{'kernel':9}{'variant':11}{'D':>4} {'dtype':6}{'tile':>9} {'warps':>5} {'stages':>6}"
    head += f" {'regs':>5} {'stack':>6} {'shared':>7}" + "".join(f" {name:>8}" for name in shown)
    lines = [head]
    for f in findings:
        c = f.case
        line = f"sm{c.arch:<3}{c.kernel:9}{c.variant:11}{c.head_dim:>4} {c.dtype:6}"
        line += f"{f'{c.tile.block_m}x{c.tile.block_n}':>9} {c.tile.num_warps:>5} {c.tile.num_stages:>6}"
        line += f" {f.registers:>5} {f.stack:>6} {f.shared:>7}"
        lines.append(line + "".join(f" {f.instructions[name]:>8}" for name in shown))
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the table; returns 1 when a kernel exceeds the shared memory of its architecture, else 0."""
    parser = argparse.ArgumentParser(prog="python -m lazypipe.kernels.gpu.audit", description=__doc__)
    parser.add_argument("--arch", type=int, nargs="+", default=[80, 90], choices=sorted(SHARED_LIMIT))
    parser.add_argument("--dims", type=int, nargs="+", default=[64, 128, 256], choices=[16, 32, 64, 128, 256])
    parser.add_argument("--dtypes", nargs="+", default=["bf16", "fp32"], choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--kernels", nargs="+", choices=(*KERNELS, "scores", "values"), help="only these kernels")
    parser.add_argument("--all", action="store_true", help="every candidate tile, not only the defaults")
    parser.add_argument("--workers", type=int, default=min(8, os.cpu_count() or 1))
    parser.add_argument("--json", type=Path, help="also write the findings here")
    arguments = parser.parse_args(argv)
    cases = cases_for(arguments.arch, arguments.dims, arguments.dtypes, arguments.all)
    cases = [case for case in cases if not arguments.kernels or case.kernel in arguments.kernels]
    findings = compile_all(cases, arguments.workers)
    print(format_table(findings))
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(f) for f in findings], indent=1) + "\n")
    return 0 if all(f.fits_shared for f in findings) else 1


if __name__ == "__main__":
    sys.exit(main())
