"""By the name of a compiled module that other packages import: doing so registers the ops."""

from flash_attn_3 import ops

__all__ = ["ops"]
