"""A compact byte-level GPT whose attention is a plain function of q, k, v.

Every attention here takes (batch, seqlen, heads, head_dim) tensors, is causal, and differs from the
others only in how it computes the same thing.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]

VOCABULARY = 256  # one token a byte


def flash_attention(scale_factor: float = 1.0) -> Attention:
    """Tiled attention; `scale_factor` other than 1 makes it wrong on purpose, for tests."""
    from flash_attn import flash_attn_func

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scale = scale_factor / math.sqrt(q.shape[-1])
        return flash_attn_func(q, k, v, softmax_scale=scale, causal=True)

    return attention


def standard_attention() -> Attention:
    """softmax(q k^T) v in plain torch operations: holds seqlen x seqlen scores for every head."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        scores = (q / math.sqrt(q.shape[-1])) @ k.transpose(-2, -1)
        seqlen = q.shape[-2]
        future = torch.ones(seqlen, seqlen, dtype=torch.bool, device=q.device).triu(1)
        probabilities = scores.masked_fill_(future, -math.inf).softmax(-1, dtype=torch.float32)
        return (probabilities.to(v.dtype) @ v).transpose(1, 2)

    return attention


def sdpa_attention() -> Attention:
    """PyTorch's own fused attention, whichever kernel it picks."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2)

    return attention


def cudnn_attention() -> Attention:
    """PyTorch's own with cuDNN's kernels: a GPU and 16-bit elements only."""
    attention = sdpa_attention()

    def with_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attention(q, k, v)

    return with_cudnn


ATTENTIONS: dict[str, Callable[..., Attention]] = {
    "flash": flash_attention,
    "standard": standard_attention,
    "sdpa": sdpa_attention,
    "cudnn": cudnn_attention,
}


class Block(nn.Module):
    def __init__(self, num_heads: int, head_dim: int, attention: Attention) -> None:
        super().__init__()
        width = num_heads * head_dim
        self.num_heads, self.head_dim, self.attention = num_heads, head_dim, attention
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(approximate="tanh"), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        batch_size, seqlen, width = x.shape
        qkv = self.qkv(self.attention_norm(x))
        q, k, v = qkv.view(batch_size, seqlen, 3, self.num_heads, self.head_dim).unbind(2)
        x = x + self.project(self.attention(q, k, v).reshape(batch_size, seqlen, width))
        return x + self.mlp(self.mlp_norm(x))


class Gpt(nn.Module):
    """Same `seed`, same sizes: the same weights, whatever the attention."""

    def __init__(
        self,
        attention: Attention,
        *,
        seqlen: int,
        num_layers: int,
        num_heads: int,
        head_dim: int,
        seed: int,
    ) -> None:
        super().__init__()
        torch.manual_seed(seed)
        width = num_heads * head_dim
        self.seqlen = seqlen
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Embedding(seqlen, width)
        self.blocks = nn.ModuleList(
            Block(num_heads, head_dim, attention) for _ in range(num_layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # A residual branch starts small so that the sum over layers keeps its variance.
                into_residual = name.endswith(("project.weight", "mlp.2.weight"))
                std = 0.02 / math.sqrt(2 * num_layers) if into_residual else 0.02
                nn.init.normal_(parameter, std=std)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits (batch, seqlen, VOCABULARY) of the byte after each of `tokens` (batch, seqlen)."""
        x = self.token(tokens) + self.position.weight[: tokens.shape[1]]
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))

    def loss(self, tokens: Tensor) -> Tensor:
        """Mean cross entropy in nats a byte; `tokens` is (batch, seqlen + 1)."""
        logits = self(tokens[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())

    @torch.no_grad()
    def sample(self, prompt: bytes, length: int, *, temperature: float = 0.7) -> bytes:
        """`prompt` continued by `length` bytes; draws from torch's default generator."""
        text = bytearray(prompt)
        for _ in range(length):
            visible = torch.tensor([list(text[-self.seqlen :])], device=self.head.weight.device)
            probabilities = (self(visible)[0, -1].float() / temperature).softmax(-1)
            text.append(int(torch.multinomial(probabilities, 1)))
        return bytes(text)
