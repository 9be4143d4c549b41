"""Builds flash_attn/_C: one libtorch-stable-ABI module for every supported Python and torch.

FLASH_ATTN_CUDA_ARCHS  GPU architectures, "80;90"; empty: CPU backend only; unset: the visible GPU's
FLASH_ATTN_KERNELS     prefixes of kernel rows to compile, "fwd/sm80/128/bf16"; empty: all
MAX_JOBS               upper bound of parallel compile jobs
FLASH_ATTN_RELEASE     set by `make wheel`: a wheel for other machines (tools/wheel_plan.py)
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))  # a PEP 517 build doesn't put the project on the path

from third_party import cutlass  # noqa: E402
from tools import build_plan, cuda_toolkit, old_glibc, wheel_plan  # noqa: E402

RELEASE = wheel_plan.is_release()


class BuildPython(build_py):
    """Writes a wheel's own version into its copy of version.py."""

    def run(self) -> None:
        super().run()
        if RELEASE and not self.editable_mode:
            copy = Path(self.build_lib, "flash_attn", "version.py")
            version = self.distribution.get_version()
            copy.write_text(wheel_plan.with_version(copy.read_text(), version))


class BuildModule(build_ext):
    """Fills in the extension and hands it to torch's ninja build.

    torch is imported only here, when something is compiled: asking for the package's metadata needs
    no torch.
    """

    def run(self) -> None:
        try:
            build_plan.check_machine()
            self.build(build_plan.make_plan())
        except (RuntimeError, ValueError) as error:
            raise SystemExit(f"flash-attn: {error}") from error

    def build(self, plan: build_plan.Plan) -> None:
        print(f"flash-attn: {plan.note}", file=sys.stderr, flush=True)
        os.environ["MAX_JOBS"] = str(build_plan.job_count(cuda=bool(plan.archs)))
        (extension,) = self.extensions
        import torch
        from torch.utils import cpp_extension

        build_plan.check_torch(torch.__version__)
        version = self.distribution.get_version()
        fill_in(
            *(extension, plan, version),
            *(cpp_extension.include_paths(), cpp_extension.library_paths()),
        )
        if plan.archs:
            use_toolkit(plan)
        # setuptools gives an editable install a temporary folder: keep the objects instead, so that
        # every way of building compiles only what changed. The compilers of tools/cuda_toolkit.py
        # have folders of their own, for ninja compiles everything again with another one.
        folder = f"temp.{self.plat_name}-{sys.version_info.minor}"
        if plan.cuda_home and plan.cuda_home.is_relative_to(cuda_toolkit.CACHE):
            folder += f"-cuda{plan.cuda_home.name}"
        self.build_temp = str(ROOT / "build" / folder)
        torch_build = cpp_extension.BuildExtension(self.distribution)
        vars(torch_build).update(vars(self))
        torch_build.force = True  # ninja decides what is out of date
        torch_build.run()


def fill_in(
    extension: Extension,
    plan: build_plan.Plan,
    version: str,
    torch_include: list[str],
    torch_lib: list[str],
) -> None:
    """Sources and flags of the module. Headers that aren't ours come as -isystem: warning-free."""
    extension.sources = build_plan.sources(plan.archs)
    extension.include_dirs = [str(ROOT / "csrc")]
    extension.define_macros = build_plan.define_macros(plan.archs)
    extension.library_dirs = list(torch_lib)
    extension.libraries = ["torch_cpu", "c10"]
    # libtorch.so defines nothing here, but brings libtorch_cuda.so where torch has it, also where
    # the module was built with a CPU build of torch.
    extension.extra_link_args = ["-Wl,--exclude-libs,ALL", "-Wl,--no-as-needed", "-ltorch"]
    cxx_flags = [*build_plan.cxx_flags(), *build_plan.module_facts(plan, version)]
    cxx_flags += ["-fvisibility=hidden", *isystem(torch_include)]
    nvcc_flags: list[str] = []
    if plan.cuda_home:
        cxx_flags += isystem([str(plan.cuda_home / "include")])
        archs = ",".join(map(str, plan.archs))
        cuda_version = build_plan.nvcc_version(plan.cuda_home)
        cutlass_include = isystem([str(cutlass.find_include_dir())])
        nvcc_flags = [
            *build_plan.nvcc_flags(cuda_version),
            f"--cuda-archs={archs}",
            *cutlass_include,
        ]
        nvcc_flags += ["-Xcompiler=-fvisibility=hidden"]
        extension.library_dirs += [str(plan.cuda_home / "lib64")]
        extension.libraries += ["cudart_static", "dl", "rt"]
    if RELEASE:
        compiler = os.environ.get("CXX", "c++")
        extension.extra_objects = old_glibc.link_inputs(ROOT / "build" / "old_glibc", compiler)
        extension.extra_link_args += old_glibc.link_args()
    extension.extra_compile_args = {"cxx": cxx_flags, "nvcc": nvcc_flags}


def isystem(folders: list[str]) -> list[str]:
    return [flag for folder in folders for flag in ("-isystem", folder)]


def use_toolkit(plan: build_plan.Plan) -> None:
    """Points torch's build at nvcc, also where torch itself is a CPU build."""
    import torch
    from torch.utils import cpp_extension

    cpp_extension.CUDA_HOME = str(plan.cuda_home)
    # torch refuses an nvcc of another major version than its own, and leaves header dependencies
    # out of the ninja file of a CPU build. The module's only link to torch is the stable ABI, so
    # any nvcc will do.
    torch.version.cuda = build_plan.nvcc_version(plan.cuda_home)
    gate = ROOT / "tools" / "nvcc_gate.py"
    os.environ["PYTORCH_NVCC"] = f"{sys.executable} {gate} {plan.cuda_home / 'bin' / 'nvcc'}"


wheel_tag = {"py_limited_api": wheel_plan.PYTHON_TAG}
if RELEASE:
    wheel_tag["plat_name"] = wheel_plan.platform_tag()

setup(
    version=wheel_plan.package_version(),
    ext_modules=[Extension("flash_attn._C", sources=[], language="c++", py_limited_api=True)],
    cmdclass={"build_ext": BuildModule, "build_py": BuildPython},
    options={"bdist_wheel": wheel_tag},
)
