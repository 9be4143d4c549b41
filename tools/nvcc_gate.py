"""Runs nvcc on one unit, fails on spills and serialised wgmma, and keeps what ptxas said.

    python tools/nvcc_gate.py NVCC [--cuda-archs=80,90] NVCC_ARGUMENTS...

Stands in for nvcc in ninja and CMake rules. build/ptxas/UNIT.json gets the registers, spills and
compile seconds of every kernel for `make kernel-table`. Spills and local memory fail a unit on the
architectures of the wheels; on others, for which no kernel is tuned, they are only said, for they
must not keep a user of such a GPU from installing.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from tools.build_plan import ROOT, WHEEL_ARCHS, gencode

# Serialised wgmma (C7510 to C7519) is only an information line.
FORBIDDEN = re.compile(r"\(?C751\d\)?.*|^ptxas warning.*", re.M)
ENTRY = re.compile(r"Compiling entry function '(\S+)' for '(\w+)'")
USED = re.compile(r"Used (\d+) registers")
SPILLS = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
STATIC_SMEM = re.compile(r"(\d+) bytes smem")
SECONDS = re.compile(r"Compile time = ([\d.]+) ms")


def parse_ptxas(text: str) -> list[dict[str, object]]:
    """One record a kernel and architecture from the output of -Xptxas -v."""
    kernels: list[dict[str, object]] = []
    for line in text.splitlines():
        if entry := ENTRY.search(line):
            kernels.append({"symbol": entry[1], "arch": entry[2], "static_smem": 0})
        if not kernels:
            continue
        kernel = kernels[-1]
        if spills := SPILLS.search(line):
            stack, stores, loads = map(int, spills.groups())
            kernel |= {"stack": stack, "spill_stores": stores, "spill_loads": loads}
        if used := USED.search(line):
            kernel["registers"] = int(used[1])
        if static := STATIC_SMEM.search(line):
            kernel["static_smem"] = int(static[1])
        if seconds := SECONDS.search(line):
            kernel["ptxas_seconds"] = float(seconds[1]) / 1e3
    return kernels


def demangle(kernels: list[dict[str, object]], nvcc: str) -> None:
    """Adds the readable name of each kernel, if a demangler is at hand."""
    tool = shutil.which("cu++filt", path=str(Path(nvcc).parent)) or shutil.which("c++filt")
    symbols = "\n".join(str(kernel["symbol"]) for kernel in kernels)
    if tool is None or not symbols:
        return
    names = subprocess.run([tool], input=symbols, capture_output=True, text=True).stdout
    for kernel, name in zip(kernels, names.splitlines(), strict=True):
        kernel["name"] = name


def source_of(arguments: Sequence[str]) -> Path | None:
    """The .cu file of a compile command; None for other uses of nvcc."""
    found = [argument for argument in arguments if argument.endswith(".cu")]
    return Path(found[0]) if len(found) == 1 and "-c" in arguments else None


def expand_archs(arguments: Sequence[str], source: Path) -> list[str]:
    """Replaces --cuda-archs=80,90 by the gencode flags of this source's kernel family."""
    expanded: list[str] = []
    for argument in arguments:
        if argument.startswith("--cuda-archs="):
            archs = [int(arch) for arch in argument.partition("=")[2].split(",")]
            expanded += gencode(source, archs)
        else:
            expanded.append(argument)
    return expanded


def show(text: str) -> None:
    """Prints what a person needs from the compiler's output: all but ptxas's information lines."""
    for line in text.splitlines():
        routine = line.startswith("ptxas info") or SPILLS.search(line)
        if not routine or FORBIDDEN.search(line):
            print(line)


def losses(output: str, kernels: Sequence[dict[str, object]]) -> tuple[list[str], list[str]]:
    """What fails the unit, and what is only said."""
    forbidden = [f"ptxas says {found[0]!r}" for found in FORBIDDEN.finditer(output)]
    elsewhere: list[str] = []
    for kernel in kernels:
        if not any(kernel.get(name) for name in ("stack", "spill_stores", "spill_loads")):
            continue
        said = (
            "{arch}: {stack} bytes stack, {spill_stores} + {spill_loads} bytes spilled in {symbol}"
        )
        in_wheels = str(kernel["arch"]).rstrip("af") in {f"sm_{arch}" for arch in WHEEL_ARCHS}
        (forbidden if in_wheels else elsewhere).append(said.format(**kernel))
    return forbidden, elsewhere


def main(arguments: Sequence[str]) -> int:
    nvcc, *rest = arguments
    source = source_of(rest)
    if source is None:
        return subprocess.run([nvcc, *rest]).returncode
    begin = time.monotonic()
    command = [nvcc, *expand_archs(rest, source)]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    seconds = time.monotonic() - begin
    show(done.stdout)
    kernels = keep_record(source, seconds, done.stdout, nvcc)
    if done.returncode != 0:
        return done.returncode
    forbidden, elsewhere = losses(done.stdout, kernels)
    if forbidden:
        print(f"{source}: expected no spills and no serialised wgmma, got", *forbidden, sep="\n  ")
        Path(rest[rest.index("-o") + 1]).unlink(missing_ok=True)
        return 1
    verdict = f"{len(elsewhere)} with spills" if elsewhere else "no spills"
    print(f"{source.name}: {len(kernels)} kernels, {seconds:.1f} s, {verdict}")
    return 0


def keep_record(source: Path, seconds: float, output: str, nvcc: str) -> list[dict[str, object]]:
    """Writes build/ptxas/UNIT.json, also for a unit that fails; returns its kernels."""
    kernels = parse_ptxas(output)
    demangle(kernels, nvcc)
    record = {"unit": source.name, "seconds": round(seconds, 2), "kernels": kernels}
    folder = ROOT / "build" / "ptxas"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{source.stem}.json").write_text(json.dumps(record, indent=1) + "\n")
    return kernels


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
