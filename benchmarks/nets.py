"""Small sequence models that only the benchmarks need."""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F


class SequenceMLP(nn.Module):
    """Linear, GELU, Linear on every token, then the mean over tokens and a linear head."""

    def __init__(self, dim: int = 256, hidden: int = 1024, classes: int = 10) -> None:
        super().__init__()
        self.up = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.down = nn.Linear(hidden, dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, S, dim]`` to logits ``[N, classes]``."""
        return self.head(self.down(self.act(self.up(x))).mean(dim=1))


class EncoderBlock(nn.Module):
    """Pre-norm attention and MLP, each with its residual connection."""

    def __init__(self, dim: int, heads: int, expansion: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1 = nn.LayerNorm(dim)
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)
        self.norm2 = nn.LayerNorm(dim)
        self.up = nn.Linear(dim, expansion * dim)
        self.act = nn.GELU()
        self.down = nn.Linear(expansion * dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, S, dim]`` to ``[N, S, dim]``."""
        n, s, dim = x.shape
        qkv = self.qkv(self.norm1(x)).view(n, s, 3, self.heads, dim // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)
        attended = F.scaled_dot_product_attention(q, k, v)
        x = x + self.proj(attended.transpose(1, 2).reshape(n, s, dim))
        return x + self.down(self.act(self.up(self.norm2(x))))


class Transformer(nn.Module):
    """Token embedding, encoder blocks, a last norm, the mean over tokens and a linear head."""

    def __init__(
        self,
        vocab: int = 1000,
        dim: int = 256,
        heads: int = 4,
        depth: int = 2,
        expansion: int = 4,
        classes: int = 10,
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim)
        self.blocks = nn.Sequential(*(EncoderBlock(dim, heads, expansion) for _ in range(depth)))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[N, S]`` to logits ``[N, classes]``."""
        return self.head(self.norm(self.blocks(self.embed(tokens))).mean(dim=1))
