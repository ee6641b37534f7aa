"""The channels of a network: which there are, what is theirs, and how strongly they respond.

One traced forward pass finds the layers and the BatchNorm that follows each, whatever the modules
are called; one pass over a data set sums the activations of all channels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.data import Dataset
from torch.utils.hooks import RemovableHandle

from ..data import batches
from ..masking import Channels, Mask, channel_mask_
from .base import Job
from .metrics import device_of, evaluating, keeping_modes

Zero = Literal["layer", "next norm", "all norms"]

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NORM_TENSORS = ("weight", "bias", "running_mean", "running_var")
# Functions whose output has the channels of their input, each moved but not mixed or cut off. By
# name, since torch calls some of them through several entries.
_KEEP_CHANNELS = {
    *(f"{kind}_pool{dims}d" for kind in ("avg", "max") for dims in (1, 2, 3)),
    *(f"adaptive_{kind}_pool{dims}d" for kind in ("avg", "max") for dims in (1, 2, 3)),
    *(f"dropout{dims}" for dims in ("", "1d", "2d", "3d")),
}
_JOIN = {"cat", "concat", "concatenate"}


@dataclass(frozen=True)
class Layer:
    """A convolution or a hidden linear layer, whose outputs are channels.

    Attributes:
        name: of the module.
        convolution: it is one; else linear.
        channels: how many.
        norms: BatchNorm modules that its output enters, directly or past pooling, dropout and
            concatenation, in the order of execution: name, and the index there of channel 0.
    """

    name: str
    convolution: bool
    channels: int
    norms: tuple[tuple[str, int], ...]

    def owned(self, model: nn.Module, zero: Zero) -> Channels:
        """The tensors that belong to the channels.

        Args:
            model: that the layer is of.
            zero: "layer": weight and bias. "next norm": also scale, shift and running statistics
                of the first BatchNorm that follows. "all norms": of every one, which differs where
                layers share features, as in a DenseNet.
        """
        others = []
        if getattr(model.get_submodule(self.name), "bias", None) is not None:
            others.append((f"{self.name}.bias", 0))
        norms = {"layer": 0, "next norm": 1, "all norms": len(self.norms)}[zero]
        for norm, start in self.norms[:norms]:
            module = model.get_submodule(norm)
            others += [
                (f"{norm}.{part}", start)
                for part in _NORM_TENSORS
                if getattr(module, part, None) is not None
            ]
        return Channels(f"{self.name}.weight", tuple(others))


def find_layers(model: nn.Module, dataset: Dataset[Any]) -> list[Layer]:
    """Find the layers that have channels, by one forward pass of the first sample.

    These are the convolutions and the linear layers that run, without those whose output reaches
    the model's through no other layer: they make the logits.

    Args:
        model: from inputs ``[B, ...]`` to logits ``[B, C]``; not modified.
        dataset: map-style, of (input, target).

    Returns:
        The layers, in the order of execution.

    Raises:
        ValueError: ``model`` has no such layer, or one whose channels cannot be told: it runs
            twice, shares its weight with another, computes its weight from other parameters, or
            mixes samples; or its outputs are not ``[B, C]``.
    """
    names = {module: name for name, module in model.named_modules()}
    trace = _Trace()
    inputs = next(iter(batches(dataset, 1)))[0].to(device_of(model))
    with keeping_modes(model), torch.enable_grad(), _hooked(model, trace), trace:
        model.eval()
        # With respect to the input, there is a graph even where every parameter is frozen; the
        # copy of it may be overwritten.
        outputs = model(inputs.requires_grad_().clone() if inputs.is_floating_point() else inputs)
    if not isinstance(outputs, Tensor) or outputs.dim() != 2 or len(outputs) != 1:
        raise ValueError("model: expected logits [B, C] from it")
    heads = _reached(outputs, {node: module for module, node in trace.nodes.items() if node})
    norms: dict[nn.Module, list[tuple[str, int]]] = {module: [] for module in trace.calls}
    for norm, module, start in trace.norms:
        norms[module].append((names[norm], start))
    layers = []
    weights: dict[int, str] = {}
    for module, shape in trace.calls.items():
        name = names[module]
        if trace.counts[module] > 1:
            raise ValueError(
                f"model: layer {name!r} runs {trace.counts[module]} times in a forward pass"
            )
        if "weight" not in module._parameters:
            raise ValueError(f"model: layer {name!r} has no weight of its own to mask")
        other = weights.setdefault(id(module.weight), name)
        if other != name:
            raise ValueError(f"model: layers {other!r} and {name!r} share their weight")
        if module in heads:
            continue
        convolution = isinstance(module, _CONVOLUTIONS)
        if shape[0] != 1 or (not convolution and len(shape) != 2):
            raise ValueError(
                f"model: layer {name!r} maps one sample to {tuple(shape)}; expected [1, channels]"
                f"{' and positions' if convolution else ''}"
            )
        layers.append(Layer(name, convolution, shape[1], tuple(norms[module])))
    used = [norm for layer in layers for norm, _ in layer.norms]
    for norm_module, count in trace.counts.items():
        if count > 1 and names[norm_module] in used:
            raise ValueError(
                f"model: norm {names[norm_module]!r} runs {count} times in a forward pass"
            )
    if not layers:
        raise ValueError("model: expected convolutions or hidden linear layers, found none")
    return layers


def activations(job: Job, layers: Sequence[Layer], dataset: Dataset[Any]) -> dict[str, Tensor]:
    """Sum the activations of each class, in one pass over a data set.

    The activation of a sample is the spatial mean of the rectified output of each channel.

    Args:
        job: its model, in eval mode, its batch size, and its scores, which may remember these.
        layers: of the model.
        dataset: map-style, of (input, target).

    Returns:
        float64 on the CPU: for each layer ``"raw:NAME"``, the sums ``[classes, channels]`` of
        ReLU(layer), and ``"normed:NAME"``, those of ReLU(BatchNorm(layer)) with the first norm that
        follows, the same as raw where none does; and ``"samples"``, ``[classes]``.

    Raises:
        ValueError: a target is not in ``0 .. classes - 1``.
    """

    def compute() -> dict[str, Tensor]:
        return _activation_sums(job.model, layers, dataset, job.batch_size)

    return job.scores.tensors(job.model, dataset, {"score": "activations"}, compute)


def mask_layers_(
    job: Job,
    layers: Sequence[Layer],
    scores: Sequence[Tensor],
    zero: Zero,
    select: Callable[[list[Tensor]], list[Tensor]] | None = None,
) -> Mask:
    """Zero the channels with the highest scores, by the ratio, exclusions and scope of the job.

    Args:
        job: whose model is modified in place.
        layers: of the model.
        scores: ``[channels]`` of each.
        zero: as in :meth:`Layer.owned`.
        select: as in :func:`fastfisher.masking.channel_mask_`.
    """
    return channel_mask_(
        job.model,
        [layer.owned(job.model, zero) for layer in layers],
        scores,
        ratio=job.ratio,
        exclude=job.exclude,
        scope=job.scope,
        select=select,
    )


def spatial_mean(values: Tensor) -> Tensor:
    """``[B, channels, ...]`` to ``[B, channels]``."""
    return values.flatten(2).mean(2) if values.dim() > 2 else values


class _Trace(TorchFunctionMode):
    """Follows the channels of each layer through one forward pass.

    Attributes:
        calls: shape of the output of each layer, in the order of execution.
        counts: how often each layer and norm ran.
        nodes: of autograd's graph, where the output of each layer was made.
        norms: a norm, a layer that it normalises, and the index in the norm of its channel 0.
    """

    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[nn.Module, torch.Size] = {}
        self.counts: dict[nn.Module, int] = {}
        self.nodes: dict[nn.Module, Any] = {}
        self.norms: list[tuple[nn.Module, nn.Module, int]] = []
        # Of each tensor, whose channels it holds in turn (None: nobody's) and how many. The tensor
        # is kept, so that its id is not used again, and its version, which a write raises.
        self._held: dict[int, tuple[Tensor, int, list[tuple[nn.Module | None, int]]]] = {}

    def _hold(self, tensor: Tensor, parts: list[tuple[nn.Module | None, int]]) -> None:
        self._held[id(tensor)] = tensor, tensor._version, parts

    def _parts(self, tensor: Tensor) -> list[tuple[nn.Module | None, int]]:
        held = self._held.get(id(tensor))
        if held is not None and held[1] == tensor._version:
            return held[2]
        return [(None, tensor.shape[1] if tensor.dim() > 1 else 0)]

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        name = getattr(func, "__name__", "")
        if not isinstance(result, Tensor):
            return result
        if name in _KEEP_CHANNELS:
            self._hold(result, self._parts(args[0] if args else kwargs["input"]))
        elif name in _JOIN:
            dim = kwargs.get("dim", args[1] if len(args) > 1 else 0)
            if isinstance(dim, int) and dim % result.dim() == 1:
                tensors = args[0] if args else kwargs["tensors"]
                self._hold(result, [part for tensor in tensors for part in self._parts(tensor)])
        return result

    def layer_ran(self, module: nn.Module, _: Any, output: Tensor) -> None:
        """Forward hook of a convolution or linear layer."""
        self.counts[module] = self.counts.get(module, 0) + 1
        self.calls[module] = output.shape
        self.nodes[module] = output.grad_fn
        if output.dim() > 1:
            self._hold(output, [(module, output.shape[1])])

    def norm_runs(self, module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        """Forward pre-hook of a norm."""
        self.counts[module] = self.counts.get(module, 0) + 1
        start = 0
        for layer, count in self._parts(inputs[0]):
            if layer is not None:
                self.norms.append((module, layer, start))
            start += count


@contextmanager
def _hooked(model: nn.Module, trace: _Trace) -> Iterator[None]:
    handles: list[RemovableHandle] = []
    try:
        for module in model.modules():
            if isinstance(module, (*_CONVOLUTIONS, nn.Linear)):
                handles.append(module.register_forward_hook(trace.layer_ran))
            elif isinstance(module, _BatchNorm):
                handles.append(module.register_forward_pre_hook(trace.norm_runs))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _reached(outputs: Tensor, made: dict[Any, nn.Module]) -> set[nn.Module]:
    """Layers whose output reaches ``outputs`` through no other layer, by autograd's graph."""
    reached: set[nn.Module] = set()
    seen: set[Any] = set()
    pending = [outputs.grad_fn]
    while pending:
        node = pending.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made:
            reached.add(made[node])
        else:
            pending += [following for following, _ in node.next_functions]
    return reached


def _activation_sums(
    model: nn.Module, layers: Sequence[Layer], dataset: Dataset[Any], batch_size: int
) -> dict[str, Tensor]:
    device = device_of(model)
    of_batch: dict[str, Tensor] = {}
    slices: dict[str, list[tuple[str, int, int]]] = {}
    for layer in layers:
        if layer.norms:
            norm, start = layer.norms[0]
            slices.setdefault(norm, []).append((layer.name, start, start + layer.channels))

    # At once, since a later operation in place may overwrite the outputs.
    def keep_raw(name: str, output: Tensor) -> None:
        of_batch[f"raw:{name}"] = spatial_mean(F.relu(output)).double()

    def keep_normed(norm: str, output: Tensor) -> None:
        means = spatial_mean(F.relu(output)).double()
        for name, start, end in slices[norm]:
            of_batch[f"normed:{name}"] = means[:, start:end]

    sums: dict[str, Tensor] = {}
    keepers = [(layer.name, keep_raw) for layer in layers] + [(n, keep_normed) for n in slices]
    with evaluating(model), _observed(model, keepers):
        for inputs, targets in batches(dataset, batch_size):
            outputs = model(inputs.to(device))
            targets = targets.to(device)
            classes = outputs.shape[1]
            if bool(((targets < 0) | (targets >= classes)).any()):
                raise ValueError(f"a target is not in 0..{classes - 1}")
            of_class = F.one_hot(targets, classes).T.double()
            of_batch["samples"] = torch.ones(len(targets), dtype=torch.float64, device=device)
            for name, values in of_batch.items():
                total = of_class @ values
                sums[name] = sums[name] + total if name in sums else total
    for layer in layers:
        if not layer.norms:
            sums[f"normed:{layer.name}"] = sums[f"raw:{layer.name}"].clone()
    return {name: total.cpu() for name, total in sums.items()}


@contextmanager
def _observed(
    model: nn.Module, keepers: Sequence[tuple[str, Callable[[str, Tensor], None]]]
) -> Iterator[None]:
    """Call each keeper with the name and the output of its module, in every forward pass."""
    handles = []
    try:
        for name, keep in keepers:

            def hook(_: Any, __: Any, output: Tensor, name: str = name, keep: Any = keep) -> None:
                keep(name, output)

            handles.append(model.get_submodule(name).register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
