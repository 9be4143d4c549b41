"""Exact attention in tiles, forward and backward, on NVIDIA GPUs from Ampere on and on CPUs."""

from pkgutil import extend_path

# Other distributions may add subpackages to this package.
__path__ = extend_path(__path__, __name__)

from flash_attn.flash_attn_interface import (  # noqa: E402
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
    flash_attn_with_kvcache,
)
from flash_attn.sdpa import register  # noqa: E402
from flash_attn.version import __version__  # noqa: E402

__all__ = [
    "__version__",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
]

register()
del register
