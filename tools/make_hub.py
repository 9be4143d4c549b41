"""Writes the package in the layout of Hugging Face's `kernels`: a folder that it loads as a kernel.

python tools/make_hub.py [FOLDER]     by default dist/hub

FOLDER/build/VARIANT/ has the package and an __init__.py that loads it, for each VARIANT that the
compiled module in flash_attn/ serves: the CPU one, and one of its CUDA version if it has kernels.
"""

from __future__ import annotations

import json
import platform
import re
import shutil
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "flash_attn"
TORCH = "torch-stable-abi210"  # the oldest torch that the module runs with
NAME = "flash-attn"

# The package keeps its name, by which its modules import each other and torch finds its ops, so one
# process has one of it: what is imported already serves, if it is the same version.
INIT = '''"""flash_attn {version} as a kernel of the `kernels` package."""

import importlib.util
import sys
from pathlib import Path

_FOLDER = Path(__file__).resolve().parent / "flash_attn"


def _load():
    loaded = sys.modules.get("flash_attn")
    if loaded is None:
        spec = importlib.util.spec_from_file_location(
            "flash_attn", _FOLDER / "__init__.py", submodule_search_locations=[str(_FOLDER)]
        )
        loaded = importlib.util.module_from_spec(spec)
        sys.modules["flash_attn"] = loaded
        try:
            spec.loader.exec_module(loaded)
        except BaseException:
            del sys.modules["flash_attn"]
            raise
    if loaded.__version__ != "{version}":
        raise ImportError(
            f"flash_attn: expected version {version} or none in this process, got "
            f"{{loaded.__version__}} from {{loaded.__file__}}; uninstall that or use it instead"
        )
    return loaded


_package = _load()
__version__ = _package.__version__
__all__ = list(_package.__all__)
globals().update({{name: getattr(_package, name) for name in __all__}})
'''


def package_version() -> str:
    text = (PACKAGE / "version.py").read_text()
    (version,) = re.findall(r'^__version__ = "(.*)"', text, re.MULTILINE)
    return str(version)


def backends() -> dict[str, dict[str, object]]:
    """What the compiled module serves, as a part of a variant's name and of its metadata."""
    sys.path.insert(0, str(ROOT))
    from flash_attn import ops

    info = ops.build_info()
    served: dict[str, dict[str, object]] = {"cpu": {"type": "cpu"}}
    if info["cuda_archs"]:
        archs = [f"{int(arch) // 10}.{int(arch) % 10}" for arch in info["cuda_archs"]]
        major, minor = str(info["cuda_version"]).split(".")[:2]
        served[f"cu{major}{minor}"] = {"type": "cuda", "archs": archs}
    return served


def write_variant(folder: Path, backend: dict[str, object], version: str) -> None:
    ignore = shutil.ignore_patterns("__pycache__", "*.pyc")
    shutil.copytree(PACKAGE, folder / "flash_attn", ignore=ignore)
    (folder / "__init__.py").write_text(INIT.format(version=version))
    identity = re.sub(r"\W", "_", f"{NAME}_{version}_{folder.name}")
    metadata = {
        "id": f"_{identity}",
        "name": NAME,
        "version": 1,
        "license": "other",  # the hub's word for one that it has no name of
        "python-depends": [],
        "backend": backend,
    }
    (folder / "metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def make_hub(folder: Path) -> list[str]:
    """The names of the variants. What the folder had under build/ is gone."""
    shutil.rmtree(folder / "build", ignore_errors=True)
    version, names = package_version(), []
    for part, backend in backends().items():
        name = f"{TORCH}-{part}-{platform.machine()}-{platform.system().lower()}"
        write_variant(folder / "build" / name, backend, version)
        names.append(name)
    return names


if __name__ == "__main__":
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "dist" / "hub"
    for variant in make_hub(target):
        print(target / "build" / variant)
