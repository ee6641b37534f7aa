"""Rules: torch function -> how the gradient at its output becomes squared per-sample gradients.

One file a family of layers. A rule reads its arguments, and either records a use with
:meth:`Recorder.record` or returns ``NotImplemented``, which sends the parameters to the fallback.
"""

from __future__ import annotations

from ..recorder import Function, Rule
from . import conv, elementwise, embedding, linear, norm, recurrent

RULES: dict[Function, Rule] = {
    **linear.RULES,
    **conv.RULES,
    **norm.RULES,
    **embedding.RULES,
    **elementwise.RULES,
    **recurrent.RULES,
}

__all__ = ["RULES"]
