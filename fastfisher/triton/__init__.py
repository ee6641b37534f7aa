"""Triton twins of the CUDA kernels, for devices that no compiled kernel fits.

Importing this module imports triton, and registers the twins as ``torch.ops.fastfisher_triton.*``:
for CUDA tensors, and with ``TRITON_INTERPRET=1`` for those on the CPU, where triton's interpreter
runs them. Each has the schema and the meaning of the operator of its name in
``torch.ops.fastfisher``; nothing is autotuned unless asked for (:mod:`fastfisher.triton.launch`).
"""

from __future__ import annotations

from types import ModuleType

import torch

from .. import ops
from .. import topr as selection
from . import channel, gather, launch, outer, recurrent, topr

NAMESPACE = "fastfisher_triton"

_FAMILIES: tuple[ModuleType, ...] = (outer, channel, gather, recurrent, topr)
_SCHEMAS = (*ops.SCHEMAS, *selection.SCHEMAS)
_FAKES = {**ops.FAKES, **selection.FAKES}
# A family's module has a function of the operator's name for each operator it implements.
KERNELS = {
    name: getattr(family, name)
    for name in (schema.partition("(")[0] for schema in _SCHEMAS)
    for family in _FAMILIES
    if hasattr(family, name)
}
"""The operators that have a twin, and its function, which takes the operator's arguments."""

_library = torch.library.Library(NAMESPACE, "DEF")

for _schema in _SCHEMAS:
    _name = _schema.partition("(")[0]
    _library.define(_schema)
    _library.impl(_name, KERNELS[_name], "CUDA")
    if launch.INTERPRETED:
        _library.impl(_name, KERNELS[_name], "CPU")
    torch.library.register_fake(f"{NAMESPACE}::{_name}", _FAKES[_name], lib=_library)
