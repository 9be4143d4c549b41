"""The layout for Hugging Face's `kernels`: written, and loaded the way that package loads it."""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from flash_attn import __all__ as public
from flash_attn import ops
from flash_attn.version import __version__

ROOT = Path(__file__).resolve().parent.parent
# As `kernels` does: the module is made from the file, by the name that the metadata say.
LOAD = """
import importlib.util, json, sys
from pathlib import Path
folder = Path(sys.argv[1])
name = json.loads((folder / "metadata.json").read_text())["id"]
spec = importlib.util.spec_from_file_location(name, folder / "__init__.py")
kernel = importlib.util.module_from_spec(spec)
sys.modules[name] = kernel
spec.loader.exec_module(kernel)
"""


def python(code: str, *arguments: object, path: str = "") -> subprocess.CompletedProcess[str]:
    """In a folder and environment where this package isn't found. -S: no editable install."""
    packages = [entry for entry in sys.path if "site-packages" in entry]
    start = f"import sys; sys.path[:] = {[path, *packages, *stdlib()]!r}\n"
    command = [sys.executable, "-S", "-c", start + code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, cwd="/", timeout=300)


def stdlib() -> list[str]:
    return [entry for entry in sys.path if entry and str(ROOT) not in entry or "lib" in entry]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    command = [sys.executable, str(ROOT / "tools" / "make_hub.py"), str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


def variants(hub: Path) -> dict[str, dict[str, Any]]:
    folders = (hub / "build").iterdir()
    return {f.name: json.loads((f / "metadata.json").read_text()) for f in folders}


def test_variants_and_metadata(hub: Path) -> None:
    """A CPU variant always, a CUDA one where the module has kernels; names as `kernels` reads."""
    found = variants(hub)
    system = f"{platform.machine()}-{platform.system().lower()}"
    kinds = {name: metadata["backend"]["type"] for name, metadata in found.items()}
    assert kinds.pop(f"torch-stable-abi210-cpu-{system}") == "cpu"
    if ops.build_info()["cuda_archs"]:
        ((name, kind),) = kinds.items()
        assert kind == "cuda" and re.fullmatch(rf"torch-stable-abi210-cu1\d\d-{system}", name)
    else:
        assert kinds == {}
    for metadata in found.values():
        assert metadata["id"].isidentifier() and metadata["name"] == "flash-attn"
    assert len({metadata["id"] for metadata in found.values()}) == len(found)


def test_it_loads_from_its_own_folder(hub: Path) -> None:
    (folder,) = (hub / "build").glob("*-cpu-*")
    code = LOAD + (
        "import torch\n"
        "q = torch.randn(1, 9, 2, 16)\n"
        "expected = torch.softmax(q.transpose(1, 2) @ q.permute(0, 2, 3, 1) / 4, -1)\n"
        "expected = (expected @ q.transpose(1, 2)).transpose(1, 2)\n"
        "torch.testing.assert_close(kernel.flash_attn_func(q, q, q), expected)\n"
        "from flash_attn.bert_padding import unpad_input\n"
        "import flash_attn\n"
        "print(kernel.__version__, flash_attn.__file__, *kernel.__all__)\n"
    )
    done = python(code, folder)
    assert done.returncode == 0, done.stderr
    version, file, *names = done.stdout.split()
    assert version == __version__ and Path(file).parent == folder / "flash_attn"
    assert sorted(names) == sorted(public)


def test_a_loaded_package_of_the_same_version_serves(hub: Path) -> None:
    (folder,) = (hub / "build").glob("*-cpu-*")
    done = python(
        "import flash_attn\n" + LOAD + "print(flash_attn.__file__)", folder, path=str(ROOT)
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).parent == ROOT / "flash_attn"


def test_another_flash_attn_in_the_process_is_refused(hub: Path, tmp_path: Path) -> None:
    (folder,) = (hub / "build").glob("*-cpu-*")
    (tmp_path / "flash_attn.py").write_text("__version__ = '2.8.3'\n")
    done = python("import flash_attn\n" + LOAD, folder, path=str(tmp_path))
    assert f"expected version {__version__} or none in this process, got 2.8.3" in done.stderr
