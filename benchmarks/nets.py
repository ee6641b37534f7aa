"""Models that only the benchmarks need; those of torchvision as they are there."""

from __future__ import annotations

import torch
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

    def __init__(self, dim: int, heads: int, expansion: int, causal: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.causal = causal
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
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
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


class CausalLM(nn.Module):
    """Pre-norm causal blocks, positions learned, output tied to the embedding: GPT-2's shape."""

    def __init__(
        self,
        vocab: int = 4096,
        context: int = 64,
        dim: int = 256,
        heads: int = 4,
        depth: int = 4,
        expansion: int = 4,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocab, dim)
        self.positions = nn.Embedding(context, dim)
        self.blocks = nn.Sequential(
            *(EncoderBlock(dim, heads, expansion, causal=True) for _ in range(depth))
        )
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, vocab, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[N, S]`` to logits of the next token ``[N, vocab, S]``."""
        positions = torch.arange(tokens.shape[1], device=tokens.device)[None]
        x = self.blocks(self.tokens(tokens) + self.positions(positions))
        return self.head(self.norm(x)).transpose(1, 2)


class Tagger(nn.Module):
    """Embedding, two bidirectional LSTM layers and a linear head on every token."""

    def __init__(
        self, vocab: int = 5000, dim: int = 128, hidden: int = 256, tags: int = 17
    ) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocab, dim, padding_idx=0)
        self.lstm = nn.LSTM(dim, hidden, num_layers=2, bidirectional=True, batch_first=True)
        self.head = nn.Linear(2 * hidden, tags)

    def forward(self, tokens: Tensor) -> Tensor:
        """Map token ids ``[N, S]``, 0 for padding, to logits ``[N, tags, S]``."""
        return self.head(self.lstm(self.embed(tokens))[0]).transpose(1, 2)


def torchvision_model(name: str, **settings: int | bool) -> nn.Module:
    """A model of torchvision with random weights."""
    from torchvision import models

    return models.get_model(name, weights=None, **settings)


def resnet50(branch: float = 0.2) -> nn.Module:
    """ResNet-50 of torchvision, each residual branch scaled by its last norm.

    Recipes start that scale at 0. At torchvision's 1, rounding grows from block to block until it
    decides on which side of zero the inputs of many a ReLU are.
    """
    model = torchvision_model("resnet50")
    for name, weight in model.named_parameters():
        if name.endswith("bn3.weight"):
            nn.init.constant_(weight, branch)
    return model


def vit_tiny(classes: int = 10) -> nn.Module:
    """ViT-Tiny (dim 192, 12 blocks, 3 heads) on 32 x 32 images in patches of 4 x 4."""
    from torchvision.models import VisionTransformer

    model = VisionTransformer(
        image_size=32,
        patch_size=4,
        num_layers=12,
        num_heads=3,
        hidden_dim=192,
        mlp_dim=768,
        num_classes=classes,
    )
    # torchvision starts the head and the class token at zero: no gradient would get past the head.
    head = model.get_submodule("heads.head")
    nn.init.normal_(head.get_parameter("weight"), std=0.02)
    nn.init.normal_(model.class_token, std=0.02)
    return model
