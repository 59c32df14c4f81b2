"""Lists what every kernel takes of a multiprocessor: registers, stack, spills, shared memory.

Reads what ptxas said while the kernels were compiled, which the build keeps beside each object
(cuda/*.ptxas of a build folder), so it needs no tool of the CUDA toolkit. Shared memory is what the
kernel declares; memory that is asked for at the launch is not known here. Exits with 1 if a kernel
spills registers, with 2 if there is nothing to read.

    python tools/kernel_resources.py build/cp* [--json FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

_ENTRY = re.compile(r"Compiling entry function '(\w+)' for '(sm_\w+)'")
_STACK = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED = re.compile(r"Used (\d+) registers")
_SHARED = re.compile(r"(\d+) bytes smem")


@dataclasses.dataclass
class Kernel:
    """One kernel for one architecture; sizes in bytes per thread, shared memory per block."""

    file: str
    name: str
    arch: str
    stack: int
    spill_stores: int
    spill_loads: int
    registers: int
    shared: int

    @property
    def spilled(self) -> int:
        return self.spill_stores + self.spill_loads


def read_kernels(path: Path) -> Iterator[Kernel]:
    """The kernels of one .ptxas file, names still mangled. ValueError when one is incomplete."""
    # Functions that are called without being inlined have properties too, but no entry.
    entries = re.split(r"(?=ptxas info +: Compiling entry function)", path.read_text())
    for entry in entries:
        if (start := _ENTRY.search(entry)) is None:
            continue
        mangled, arch = start.groups()
        own = entry.partition(f"Function properties for {mangled}\n")[2]
        stack, used = _STACK.search(own), _USED.search(own)
        if stack is None or used is None:
            raise ValueError(f"{path}: expected stack and registers of {mangled}, found none")
        shared = _SHARED.search(own)
        yield Kernel(
            path.stem, mangled, arch, *map(int, stack.groups()), int(used[1]),
            int(shared[1]) if shared else 0,
        )  # fmt: skip


def demangle(names: list[str]) -> list[str]:
    """Readable names: template arguments stay, namespaces and parameters go."""
    try:
        done = subprocess.run(
            ["c++filt"], input="\n".join(names), capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return names  # without binutils they are mangled, but all there
    return [_shorten(name) for name in done.stdout.splitlines()]


def _shorten(name: str) -> str:
    name = re.sub(r"^void ", "", name)
    name = re.sub(r"\(anonymous namespace\)::|frspec::cuda::", "", name)
    name = re.sub(r"\((?:bool|int)\)", "", name).replace("__nv_bfloat16", "bf16")
    name = name.replace("__half", "fp16")
    depth = 0
    for index, character in enumerate(name):
        depth += (character == "<") - (character == ">")
        if character == "(" and depth == 0:
            return name[:index]
    return name


def find_files(paths: list[Path]) -> list[Path]:
    """The .ptxas files among the paths, and in cuda/ of those that are build folders."""
    files: list[Path] = []
    for path in paths:
        files += sorted((path / "cuda").glob("*.ptxas")) if path.is_dir() else [path]
    return files


def arch_number(arch: str) -> int:
    return int(re.sub(r"\D", "", arch))


def print_table(kernels: list[Kernel], archs: list[str]) -> None:
    """One line for each kernel: registers by architecture, the most of the rest."""
    by_name: dict[tuple[str, str], dict[str, Kernel]] = {}
    for kernel in kernels:
        by_name.setdefault((kernel.file, kernel.name), {})[kernel.arch] = kernel
    print("registers".ljust(7 * len(archs)) + f" {'stack':>6} {'spilled':>8} {'shared':>7}")
    print("".join(f"{arch:>7}" for arch in archs))
    for (file, name), variants in sorted(by_name.items()):
        registers = [str(variants[arch].registers) if arch in variants else "" for arch in archs]
        most = [
            max(value(k) for k in variants.values())
            for value in (lambda k: k.stack, lambda k: k.spilled, lambda k: k.shared)
        ]
        print("".join(f"{each:>7}" for each in registers)
              + f" {most[0]:>6} {most[1]:>8} {most[2]:>7}  {file}: {name}")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paths", nargs="+", type=Path, help="build folders, or .ptxas files")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the list there")
    args = parser.parse_args()

    try:
        kernels = [kernel for path in find_files(args.paths) for kernel in read_kernels(path)]
    except (OSError, ValueError) as error:
        print(f"kernel_resources: error: {error}", file=sys.stderr)
        return 2
    if not kernels:
        where = ", ".join(map(str, args.paths))
        print(f"kernel_resources: error: no kernels in {where}; build with CUDA", file=sys.stderr)
        return 2
    for kernel, name in zip(kernels, demangle([k.name for k in kernels]), strict=True):
        kernel.name = name
    archs = sorted({k.arch for k in kernels}, key=arch_number)
    print_table(kernels, archs)
    if args.json:
        listed = json.dumps([dataclasses.asdict(k) for k in kernels], indent=1) + "\n"
        try:
            args.json.write_text(listed)
        except OSError as error:
            print(f"kernel_resources: error: {error}", file=sys.stderr)
            return 2

    spilling = [k for k in kernels if k.spilled > 0]
    for k in spilling:
        print(f"{k.file}: {k.name} spills {k.spilled} bytes on {k.arch}", file=sys.stderr)
    print(f"{len(kernels)} kernels for {', '.join(archs)}; {len(spilling)} of them spill registers")
    return 1 if spilling else 0


if __name__ == "__main__":
    sys.exit(main())
