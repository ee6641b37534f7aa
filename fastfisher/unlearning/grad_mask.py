"""GradMask: zero the channels with the largest integrated gradient on D_f (paper, section 3.3).

The attribution is layer integrated gradients (Sundararajan et al., Axiomatic Attribution for Deep
Networks, ICML 2017) at the output of each layer: the straight path from what the layer gives for a
baseline image of zeros to what it gives for the sample, while the rest of the network, skip paths
included, sees the sample.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset

from ..data import batches, size_of, subset
from .base import Edit, Job, Method, register
from .channels import Layer, Zero, find_layers, mask_layers_, spatial_mean
from .metrics import device_of, keeping_modes
from .recipe import check_choice, check_integer

Definition = Literal["authors", "paper"]
Target = Literal["logit", "loss"]
Quadrature = Literal["gauss-legendre", "riemann"]
_ZERO: dict[Definition, Zero] = {"authors": "next norm", "paper": "layer"}


@dataclass(frozen=True)
class GradMaskOptions:
    """Hyper-parameters of :class:`GradMask`; ``None`` is what the definition says.

    Attributes:
        definition: "authors": as their code does it, the logit of the sample's class by
            Gauss-Legendre quadrature; the norm that follows is zeroed with the channel. "paper":
            the loss by a Riemann sum; only the layer's weight and bias are zeroed.
        target: what is attributed. A channel counts for the class by how much it raises the
            "logit", or by how much it lowers the "loss" (cross entropy); the paper leaves the sign
            open, and with the other one the mask would spare what the class needs.
        quadrature: along the path; "riemann" takes the right end of each of the equal steps, as
            Sundararajan et al. do (their equation 3).
        steps: points on the path.
        samples: of the forget set, drawn by the job's seed; ``None`` is all. The cost is as many
            forward passes and backward passes as layers, times steps, times samples.
    """

    definition: Definition = "authors"
    target: Target = None  # type: ignore[assignment]  # filled in
    quadrature: Quadrature = None  # type: ignore[assignment]  # filled in
    steps: int = 50
    samples: int | None = None

    def __post_init__(self) -> None:
        """Check the values and fill in those of the definition.

        Raises:
            ValueError: a value is unknown or out of range.
            TypeError: a value is of the wrong type.
        """
        check_choice("options.definition", self.definition, Definition)
        authors = self.definition == "authors"
        defaults = {
            "target": "logit" if authors else "loss",
            "quadrature": "gauss-legendre" if authors else "riemann",
        }
        for name, value in defaults.items():
            if getattr(self, name) is None:
                object.__setattr__(self, name, value)
        check_choice("options.target", self.target, Target)
        check_choice("options.quadrature", self.quadrature, Quadrature)
        check_integer("options.steps", self.steps, 1)
        if self.samples is not None:
            check_integer("options.samples", self.samples, 1)


@register
class GradMask(Method):
    """Masks the share R of all channels that do most for the classification of D_f.

    The score of a channel is the mean over positions and samples of its attribution. The remain set
    plays no part.
    """

    name = "grad-mask"
    edits_weights = True
    Options = GradMaskOptions

    def check(self, job: Job) -> None:
        """Raise unless the model's channels can be told."""
        find_layers(job.model, job.forget_set)

    def edit(self, job: Job) -> Edit:
        """Score and zero the channels in place."""
        options: GradMaskOptions = job.options
        layers = find_layers(job.model, job.forget_set)
        dataset = job.forget_set
        if options.samples is not None and options.samples < size_of(dataset):
            generator = torch.Generator().manual_seed(job.seed)
            drawn = torch.randperm(size_of(dataset), generator=generator)[: options.samples]
            dataset = subset(dataset, drawn.sort().values)
        definition = {
            "score": "layer integrated gradients",
            "target": options.target,
            "quadrature": options.quadrature,
            "steps": options.steps,
        }
        sums = job.scores.tensors(
            job.model,
            dataset,
            definition,
            lambda: integrated_gradients(
                job.model,
                layers,
                dataset,
                target=options.target,
                quadrature=options.quadrature,
                steps=options.steps,
                batch_size=job.batch_size,
                progress=job.progress,
            ),
        )
        sign = 1 if options.target == "logit" else -1
        scores = [sign * sums[layer.name] / size_of(dataset) for layer in layers]
        return Edit(job.model, mask_layers_(job, layers, scores, _ZERO[options.definition]))


def integrated_gradients(
    model: nn.Module,
    layers: Sequence[Layer],
    dataset: Dataset[Any],
    *,
    target: Target,
    quadrature: Quadrature,
    steps: int,
    batch_size: int,
    progress: bool = False,
) -> dict[str, Tensor]:
    """Sum the layer integrated gradients of every channel over a data set.

    A layer's output is put in place of what it would compute, and so are the outputs, computed
    once, of the layers that run before it; steps share a pass where the images leave room.

    Args:
        model: in eval mode; not modified.
        layers: in the order of execution.
        dataset: map-style, of (input, target).
        target: the sample's own logit, or its cross entropy.
        quadrature: as in :class:`GradMaskOptions`.
        steps: points on the path.
        batch_size: rows of a pass, images times points.
        progress: show a bar, if the standard error is a terminal.

    Returns:
        By layer, float64 ``[channels]`` on the CPU: sums over samples of the mean over positions of
        ``(a - a_0)`` times the integral of the gradient along the path.
    """
    from tqdm import tqdm

    device = device_of(model)
    points, weights = _path(quadrature, steps)
    sums = {
        layer.name: torch.zeros(layer.channels, dtype=torch.float64, device=device)
        for layer in layers
    }
    bar = tqdm(
        total=size_of(dataset) * len(layers),
        desc="attribute",
        unit="layer",
        disable=None if progress else True,
    )
    modules = {layer.name: model.get_submodule(layer.name) for layer in layers}
    with bar, keeping_modes(model), _without_parameter_gradients(model):
        model.eval()
        for inputs, targets in batches(dataset, batch_size):
            inputs, targets = inputs.to(device), targets.to(device)
            at_end = _outputs(model, modules, inputs)
            at_start = _outputs(model, modules, torch.zeros_like(inputs[:1]))
            together = max(1, batch_size // len(inputs))
            known: dict[str, Tensor] = {}
            for layer in layers:
                end = at_end[layer.name]
                change = end - at_start[layer.name]
                gradient = torch.zeros_like(end)
                for first in range(0, steps, together):
                    alphas = points[first : first + together].to(device, end.dtype)
                    rows = alphas.view(-1, *[1] * end.dim())
                    place = (at_start[layer.name] + rows * change).flatten(0, 1).requires_grad_()
                    repeat = len(alphas)
                    given = {name: _repeated(output, repeat) for name, output in known.items()}
                    with _replaced(modules, {**given, layer.name: place}):
                        logits = model(_repeated(inputs, repeat))
                    total = _target(logits, targets.repeat(repeat), target)
                    [found] = torch.autograd.grad(total, place)
                    share = weights[first : first + together].to(device, end.dtype)
                    gradient += torch.tensordot(share, found.view(repeat, *end.shape), 1)
                sums[layer.name] += spatial_mean((change * gradient).double()).sum(0)
                known[layer.name] = end
                bar.update(len(inputs))
    return {name: total.cpu() for name, total in sums.items()}


def _path(quadrature: Quadrature, steps: int) -> tuple[Tensor, Tensor]:
    """Points in [0, 1] and their weights, float64 ``[steps]``."""
    if quadrature == "riemann":
        return torch.arange(1, steps + 1).double() / steps, torch.ones(steps).double() / steps
    roots, weights = np.polynomial.legendre.leggauss(steps)
    return torch.from_numpy((roots + 1) / 2), torch.from_numpy(weights / 2)


def _target(logits: Tensor, targets: Tensor, target: Target) -> Tensor:
    if target == "loss":
        return F.cross_entropy(logits, targets, reduction="sum")
    return logits.gather(1, targets[:, None]).sum()


def _repeated(values: Tensor, times: int) -> Tensor:
    """``times`` copies along the batch."""
    return values.repeat(times, *[1] * (values.dim() - 1))


@torch.no_grad()
def _outputs(
    model: nn.Module, modules: Mapping[str, nn.Module], inputs: Tensor
) -> dict[str, Tensor]:
    outputs: dict[str, Tensor] = {}
    handles = []
    try:
        for name, module in modules.items():

            def hook(_: Any, __: Any, output: Tensor, name: str = name) -> None:
                # A copy, since a later operation may overwrite it.
                outputs[name] = output.clone()

            handles.append(module.register_forward_hook(hook))
        model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    return outputs


@contextmanager
def _replaced(modules: Mapping[str, nn.Module], outputs: Mapping[str, Tensor]) -> Iterator[None]:
    """Let modules return copies of these outputs instead of computing."""
    try:
        for name, output in outputs.items():
            # A copy, since a later operation may overwrite it.
            modules[name].forward = lambda _, output=output: output.clone()
        yield
    finally:
        for name in outputs:
            del modules[name].forward


@contextmanager
def _without_parameter_gradients(model: nn.Module) -> Iterator[None]:
    """No graph for the parameters: only gradients at the layers' outputs are wanted."""
    required = [parameter for parameter in model.parameters() if parameter.requires_grad]
    try:
        for parameter in required:
            parameter.requires_grad_(False)
        with torch.enable_grad():
            yield
    finally:
        for parameter in required:
            parameter.requires_grad_(True)
