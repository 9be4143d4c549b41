"""By the name of a compiled module that other packages import: functions that run on any device."""

from flash_attn.positional import bwd, fwd, fwd_kvcache, varlen_bwd, varlen_fwd

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]
