"""What a model carries from one step of decoding to the next."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """Caches of keys and values by layer, and how much is in them.

    Attributes:
        max_seqlen, max_batch_size: sizes of the caches.
        seqlen_offset: rows that are in the caches already: 0 for the prompt.
        batch_size_offset: first cache entry of the batch at hand.
        key_value_memory_dict: caches, (max_batch_size, max_seqlen, 2, heads_kv, head_dim), by
            layer_idx. Layers make them when they are first called.
        lengths_per_sample: (batch,) int32, rows that are there of each sequence, if they differ.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict[int, Tensor] = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begins with other sequences; the caches stay."""
        self.max_seqlen, self.max_batch_size = max_seqlen, max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
