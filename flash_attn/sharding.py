"""Attention of DTensors: every rank computes its own batch entries and heads.

Importing this module makes the functions of flash_attn take DTensors. They import it themselves at
a call with DTensors; import it before torch.compile traces such a call.

On each dimension of the device mesh the work is split as q, k or v is: by batch entries, by heads
where the ranks divide the heads of k (whole groups of query heads stay together), else not at all.
Whatever lies otherwise is redistributed first, which communicates; the result lies as the work was
split. Gradients have the placements of what they belong to.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard

from flash_attn import autograd
from flash_attn.extras import Extras

Placements = tuple[Placement, ...]


def _checked(tensors: tuple[Tensor, ...], extras: Extras) -> tuple[DTensor, ...]:
    mesh = getattr(tensors[0], "device_mesh", None)
    sharded = []
    for name, tensor in zip("qkv", tensors, strict=True):
        if not isinstance(tensor, DTensor) or tensor.device_mesh != mesh:
            raise ValueError(
                f"{name}: expected a DTensor on the device mesh of q ({mesh}), got "
                f"{type(tensor).__name__} on {getattr(tensor, 'device_mesh', 'none')}"
            )
        sharded.append(tensor)
    if "rng_state" in extras:
        raise NotImplementedError(
            "dropout_p: expected 0 for DTensors, got more: which probabilities are dropped "
            "follows from batch entries and heads, of which a rank knows its own"
        )
    # A bias that all share would need its gradient summed over the ranks, maxima their maximum.
    for name, argument in (("bias", "bias"), ("max_logits", "return_max_logits")):
        if name in extras:
            raise NotImplementedError(f"{argument}: expected none for DTensors, got one")
    return tuple(sharded)


def _split(tensors: tuple[DTensor, ...], is_packed: bool) -> Placements:
    """How the work is split over the mesh, as placements of q, k, v and the output."""
    mesh = tensors[0].device_mesh
    heads = tensors[0].dim() - 2
    candidates = {heads} if is_packed else {0, heads}
    placements: list[Placement] = []
    ranks_of_heads = 1
    for mesh_dim in range(mesh.ndim):
        split: Placement = Replicate()
        for tensor in tensors:
            given = tensor.placements[mesh_dim]
            if isinstance(given, Shard) and given.dim % tensor.dim() in candidates:
                split = Shard(given.dim % tensor.dim())
                break
        if split.is_shard(heads):
            if tensors[1].size(heads) % (ranks_of_heads * mesh.size(mesh_dim)) == 0:
                ranks_of_heads *= mesh.size(mesh_dim)
            else:
                split = Replicate()
        placements.append(split)
    return tuple(placements)


def _moved(placements: Placements, dims: dict[int, int]) -> Placements:
    """Placements of a tensor that has dimension d of q at dims[d], and the others nowhere."""
    return tuple(
        [
            Shard(dims[split.dim])
            if isinstance(split, Shard) and split.dim in dims
            else Replicate()
            for split in placements
        ]
    )


def _local_option(
    name: str, tensor: Tensor, mesh: Any, placements: Placements, heads: int
) -> Tensor:
    """What a rank needs of an option that it has whole, or as a DTensor."""
    if not isinstance(tensor, DTensor):
        tensor = DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
    dims: dict[int, int] = {}
    if name in ("sink", "alibi_slopes"):
        dims = {heads: tensor.dim() - 1} if tensor.dim() == 1 else {0: 0, heads: 1}
    wanted = _moved(placements, dims)
    # Ranks with other batch entries have other parts of a sink's gradient.
    gradient = [
        Partial() if split.is_shard(0) and place.is_replicate() else place
        for split, place in zip(placements, wanted, strict=True)
    ]
    local: Tensor = tensor.redistribute(placements=wanted).to_local(grad_placements=gradient)
    return local


def _global(local: Tensor, mesh: Any, placements: Placements, shape: tuple[int, ...]) -> Tensor:
    strides = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(
        local, mesh, placements, run_check=False, shape=torch.Size(shape), stride=strides
    )


def attention(
    tensors: tuple[Tensor, ...],
    softmax_scale: float,
    window_left: int,
    window_right: int,
    deterministic: bool,
    extras: Extras | None = None,
) -> tuple[Tensor, Tensor]:
    """`flash_attn.autograd.attention` of DTensors."""
    extras = extras or {}
    q, k, v = _checked(autograd.unpack(tensors), extras)
    mesh, heads = q.device_mesh, q.dim() - 2
    placements = _split((q, k, v), "cu_seqlens_q" in extras)
    local = tuple([t.redistribute(placements=placements).to_local() for t in (q, k, v)])
    options = {
        name: _local_option(name, value, mesh, placements, heads)
        if isinstance(value, Tensor)
        else value
        for name, value in extras.items()
    }
    out, softmax_lse = autograd.attention(
        local, softmax_scale, window_left, window_right, deterministic, options or None
    )
    rows = tuple(q.shape[:-2]) if heads == 2 else (q.size(0),)
    lse_dims = {0: 0, 2: 1} if heads == 2 else {1: 0}
    lse_shape = (*rows[:-1], q.size(heads), rows[-1])
    return (
        _global(out, mesh, placements, (*q.shape[:-1], v.size(-1))),
        _global(softmax_lse, mesh, _moved(placements, lse_dims), lse_shape),
    )


autograd.sharded = (DTensor, attention)
