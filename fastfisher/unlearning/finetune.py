"""Fine-tuning on the remain set alone: the paper's baseline "Finetune"."""

from __future__ import annotations

from .base import Method, register


@register
class Finetune(Method):
    """No edit; the base class fine-tunes."""

    name = "finetune"
