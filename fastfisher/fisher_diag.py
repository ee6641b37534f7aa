"""The diagonal Fisher of a model over a data set, in one forward and one backward pass a batch."""

from __future__ import annotations

import contextlib
import functools
import warnings
import weakref
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, overload

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from .attribution import PROBES, Layout, lay_out
from .groups import GroupsOf, resolve_groups, sort_by_group
from .into import check_alpha, check_into
from .losses import Objective, check_kind, objectives, resolve_loss
from .random_stream import RandomStream
from .recorder import Recorder, SampleAxis, Site
from .reference import PerSampleLoss, call, samples_of
from .result import FisherDiag, FisherGroups
from .rules import RULES
from .rules.common import is_rounded
from .rules.fallback import sum_grad_powers
from .rules.joint import CopyingView, Occurrence, add_jointly, add_through_derived
from .sums import Sums

__all__ = ["FallbackWarning", "FisherDiag", "FisherGroups", "fisher_diag"]


class FallbackWarning(UserWarning):
    """Some parameters were computed exactly, but not by a fast rule."""


@overload
def fisher_diag(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]],
    *,
    loss: str | Callable[[Any, Any], Tensor] = ...,
    kind: str = ...,
    samples: int = ...,
    generator: torch.Generator | None = ...,
    reduction: str = ...,
    power: float = ...,
    operands: str = ...,
    groups: None = ...,
    into: Mapping[str, Tensor] | None = ...,
    alpha: float = ...,
    parameters: Iterable[str] | None = ...,
    strict: bool = ...,
    progress: bool = ...,
) -> FisherDiag: ...


@overload
def fisher_diag(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]],
    *,
    loss: str | Callable[[Any, Any], Tensor] = ...,
    kind: str = ...,
    samples: int = ...,
    generator: torch.Generator | None = ...,
    reduction: str = ...,
    power: float = ...,
    operands: str = ...,
    groups: Literal["target"] | GroupsOf,
    alpha: float = ...,
    parameters: Iterable[str] | None = ...,
    strict: bool = ...,
    progress: bool = ...,
) -> FisherGroups: ...


def fisher_diag(
    model: nn.Module,
    data: Iterable[tuple[Any, Any]],
    *,
    loss: str | Callable[[Any, Any], Tensor] = "cross_entropy",
    kind: str = "empirical",
    samples: int = 1,
    generator: torch.Generator | None = None,
    reduction: str = "mean",
    power: float = 2,
    operands: str = "float32",
    groups: Literal["target"] | GroupsOf | None = None,
    into: Mapping[str, Tensor] | None = None,
    alpha: float = 1.0,
    parameters: Iterable[str] | None = None,
    strict: bool = True,
    progress: bool = False,
) -> FisherDiag | FisherGroups:
    """The exact diagonal Fisher information of ``model`` over ``data``.

    For each parameter entry, the sum over samples of the squared gradient of that sample's loss
    (paper, section 3.1, with the observed labels: the empirical Fisher), divided by the number of
    samples. Costs about one forward and one backward pass and, beside the model, one buffer of the
    size of its parameters. Kinds that take the expectation over the model's own targets run the
    forward pass once and one backward pass for each drawn target ("mc"), or C - 1 for C classes
    ("exact"; as many as the output has entries for the other losses). Where a sample has several
    positions, outputs ``[N, C, d1, ...]``, "exact" takes C - 1 for each of them, since positions
    mix within a model; for long sequences and for images, "mc" is the affordable choice.

    Every parameter is exact, by a fast rule or, slower, by ``torch.func`` (see ``.rules`` of the
    result; :class:`FallbackWarning` says so once), or the call raises. ``model`` is put in eval
    mode for the pass and given back as it was: modes, buffers, ``.grad`` and hooks, also if the
    pass raises; so are torch's global random generators, whatever the model draws from them.

    A model in bfloat16 or float16, or under ``torch.autocast``, runs as it always does; what its
    layers read and the gradients at what they wrote are then contracted and added up in float32,
    from copies of both: the products of half-precision numbers are exact, where a backward pass
    would round each sample's gradient. Autocast sends the fused recurrent layers to the fallback.

    The first call on a model runs two samples beforehand to learn which rows of each output belong
    to which sample, and that samples do not depend on each other; every batch is then checked to
    make the same calls, and what differs is probed again.

    Args:
        model: called as ``model(input)``, or ``model(*input)`` for a tuple or list, or
            ``model(**input)`` for a mapping. Its result for one sample must not depend on the
            other samples of the batch.
        data: batches ``(input, target)``; tensors have the ``N`` samples of the batch along their
            first axis.
        loss: ``"cross_entropy"``, ``"mse"`` (half the squared error), ``"bce_with_logits"``, each
            summed over the positions of a sample; a ``torch.nn.CrossEntropyLoss``, for its class
            weights, ``ignore_index`` and label smoothing; or a callable ``(output, target) -> [N]``
            of per-sample losses.
        kind: ``"empirical"`` (observed targets), ``"mc"`` (targets drawn from the model), or
            ``"exact"`` (the expectation over the model's targets). For cross-entropy the model's
            targets are classes drawn from the softmax of the output, at each position for itself;
            class weights and label smoothing change the gradients that are squared, not the
            distribution ("exact" then takes one more pass where there are several positions).
            Where the observed target is ignored, no kind adds anything.
        samples: targets drawn for each sample by ``"mc"``.
        generator: source of the draws of ``"mc"``; None is torch's global one.
        reduction: ``"mean"`` over the samples, or ``"sum"``.
        power: 2, or 1 for absolute values in place of squares, the importance that LFSSD dampens by
            (arXiv 2402.19308): exact by the same rules at the same price. With it, ``"mc"`` is
            the mean over the draws, and ``"exact"`` takes one backward pass for each class, for
            cross-entropy of a single position alone.
        operands: ``"float32"``, or ``"bfloat16"`` to round what float32 linear layers and
            convolutions read, and the gradients at what they wrote, to bfloat16 before they are
            contracted, in float32 all the same. Three times as fast in these layers' kernels on
            processors with a matrix unit (AMX), and no faster on others. Not exact: each factor
            is off by up to 2^-9, so sums of squares by 1e-3 to 3e-3, in norm; an entry whose
            terms cancel by more. ``.rules`` says where.
        groups: one Fisher for each group of samples, from the same passes: ``"target"`` is one for
            each class, a callable gives ``(input, target) -> [N]`` integers. The groups are those
            that occur. Every group has buffers of its own, of the size of the parameters, and adds
            its own kernel calls: batches that hold few groups are the fastest. The draws of
            ``"mc"`` follow the order of the groups within a batch.
        into: buffers that the result is added to, and returned in: a :class:`FisherDiag` of the
            same kind, reduction and power, or any mapping that has, for each parameter, a tensor
            of its shape, float32 or float64 (float64 alone for float64 parameters). A pass that
            raises has not changed them. So one buffer holds the scores ``F_f - w * F_r``::

                scores = fisher_diag(model, forget)
                fisher_diag(model, remain, into=scores, alpha=-w)
                fisher_mask_(model, scores, ratio=0.002)

            The mean is that of the samples of one call, whatever ``into`` holds already. For the
            mean over several calls take ``"sum"`` and divide by ``.samples`` at the end.
        alpha: factor of the result, added or not.
        parameters: names to compute; None is every parameter that requires grad.
        strict: raise where a parameter cannot be computed; otherwise leave it out and warn.
        progress: show a progress bar on a terminal.

    Returns:
        A mapping from parameter names to tensors of the parameter's shape, float64 for float64
        parameters and float32 for all others. With ``groups`` a :class:`FisherGroups`, a mapping
        from each group to such a result, of that group's samples alone. With ``into`` a
        :class:`FisherDiag` of those very buffers: ``into`` itself if it is one, its ``samples``
        then those of all calls.

    Raises:
        ValueError: an argument is not as described, or ``data`` has no sample.
        RuntimeError: a parameter's Fisher cannot be computed exactly; names it and says why.
    """
    resolved = resolve_loss(loss)
    check_kind(kind, resolved, samples, power)
    power = int(power)
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction: expected 'mean' or 'sum', got {reduction!r}")
    expand = functools.partial(
        objectives, kind, resolved, samples=samples, generator=generator, power=power
    )
    if operands not in ("float32", "bfloat16"):
        raise ValueError(f"operands: expected 'float32' or 'bfloat16', got {operands!r}")
    alpha = check_alpha(alpha)
    if not isinstance(model, nn.Module):
        raise ValueError(f"model: expected a torch.nn.Module, got {type(model).__name__}")
    # A walk over a deep model takes as long as a small batch: one for all that needs them.
    modules, everything = list(model.modules()), dict(model.named_parameters())
    chosen = _chosen_parameters(everything, parameters)
    if into is not None:
        if groups is not None:
            raise ValueError("into: groups have buffers of their own; expected None with groups")
        if not strict:
            raise ValueError("into: expected strict=True, lest a parameter's share be missing")
        settings = {"kind": kind, "reduction": reduction, "power": power}
        check_into(into, model, chosen, settings)
    run = _Pass(
        model,
        resolved.per_sample,
        expand,
        {name: p for name, p in everything.items() if p.requires_grad},
        _buffers(modules),
        chosen,
        strict,
        callable(loss),
        power,
        resolve_groups(groups),
        rounds=operands == "bfloat16",
    )
    # Draws from torch's global generator are to move it on; the model's own are not.
    is_drawing = kind == "mc" and generator is None
    stream = contextlib.nullcontext() if is_drawing else RandomStream(chosen.values())
    with (
        _left_as_found(model, modules, everything, run.buffers),
        torch.inference_mode(False),
        torch.enable_grad(),
    ):
        for inputs, targets in _with_progress(data, progress):
            with stream:
                run.add_batch(inputs, targets)
    results = run.finish(kind, reduction, alpha, into)
    return results[0] if groups is None else FisherGroups(results)


def _chosen_parameters(
    everything: Mapping[str, nn.Parameter], names: Iterable[str] | None
) -> dict[str, nn.Parameter]:
    if names is None:
        chosen = {name: p for name, p in everything.items() if p.requires_grad}
    else:
        wanted = [names] if isinstance(names, str) else list(names)
        for name in wanted:
            if name not in everything:
                raise ValueError(f"parameters: the model has no parameter {name!r}")
            if not everything[name].requires_grad:
                raise ValueError(f"parameters: {name!r} does not require grad")
        chosen = {name: everything[name] for name in everything if name in set(wanted)}
    if not chosen:
        raise ValueError("model: expected at least one parameter that requires grad")
    for name, parameter in chosen.items():
        if not parameter.dtype.is_floating_point:
            raise ValueError(f"parameters: {name!r} has dtype {parameter.dtype}, not a real one")
    return chosen


def _with_progress(data: Iterable[Any], progress: bool) -> Iterable[Any]:
    if not progress:
        return data
    from tqdm import tqdm

    return tqdm(data, desc="fisher", unit="batch", leave=False, disable=None)


def _buffers(modules: Iterable[nn.Module]) -> list[Tensor]:
    """Each buffer once."""
    entries = (buffer for module in modules for buffer in module._buffers.values())
    return list({id(buffer): buffer for buffer in entries if buffer is not None}.values())


@contextlib.contextmanager
def _left_as_found(
    model: nn.Module,
    modules: Sequence[nn.Module],
    parameters: Mapping[str, nn.Parameter],
    buffers: Sequence[Tensor],
) -> Iterator[None]:
    """Eval mode inside; afterwards modes, buffers and gradients are what they were."""
    training = [module for module in modules if module.training]
    grads = [(p, p.grad) for p in parameters.values()]
    with torch.no_grad():
        saved = [(b, b._version, b.clone()) for b in buffers]
    tables = [(m._buffers, dict(m._buffers)) for m in modules if m._buffers]
    try:
        if training:
            model.eval()
        for parameter, grad in grads:
            if grad is not None:
                parameter.grad = None
        yield
    finally:
        for module in training:
            module.training = True
        for parameter, grad in grads:
            if parameter.grad is not grad:
                parameter.grad = grad
        for table, entries in tables:
            table.clear()
            table.update(entries)
        with torch.no_grad():
            for buffer, version, value in saved:
                if buffer._version != version:
                    buffer.copy_(value)


def _count(inputs: Any, targets: Any) -> int:
    sizes = {leaf.shape[:1] for leaf in tree_leaves((inputs, targets)) if isinstance(leaf, Tensor)}
    if len(sizes) != 1 or () in sizes:
        raise ValueError(
            "data: expected (input, target) batches whose tensors agree in their first axis, got "
            f"sizes {sorted(tuple(size) for size in sizes)}"
        )
    return int(sizes.pop()[0])


def _with_last(values: Iterator[Objective]) -> Iterator[tuple[Objective, bool]]:
    """Each value, and whether it is the last one."""
    current = next(values, None)
    while current is not None:
        following = next(values, None)
        yield current, following is None
        current = following


def _detached(value: Any) -> Any:
    def detach(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        # No backward pass can keep a tensor of inference mode.
        return leaf.clone() if leaf.is_inference() else leaf.detach()

    return tree_map(detach, value)


def _without_autocast(device: torch.device) -> contextlib.AbstractContextManager[Any]:
    """A backward pass computes in the dtypes that the forward pass chose, and sums in float32."""
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)


def _graph(output: Tensor) -> set[torch.autograd.graph.Node]:
    """Every node of the graph behind ``output``."""
    stack, seen = [output.grad_fn], set()
    while stack:
        node = stack.pop()
        if node is not None and node not in seen:
            seen.add(node)
            stack.extend(parent for parent, _ in node.next_functions)
    return seen


@dataclass
class _Probe:
    """What two samples tell of a model's forward pass."""

    layouts: list[Layout]
    #: Parameters that need the fallback, and why.
    reasons: dict[str, str]
    #: Calls whose output is common to all samples, by :attr:`Site.key`.
    shared: frozenset[tuple[str, tuple[str, ...], int]] = frozenset()
    #: Parameters that no fast rule can serve.
    unserved: frozenset[str] = frozenset()


# What the last pass over a model found. The next one checks, site by site, that it still holds.
_probes: weakref.WeakKeyDictionary[nn.Module, _Probe] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class _Part:
    """The samples of a batch whose powers go into the same sums."""

    sums: Sums
    #: None is all of them.
    samples: slice | None

    def size(self, count: int) -> int:
        """How many they are, of the batch's ``count``."""
        return count if self.samples is None else self.samples.stop - self.samples.start

    def of(self, batch: Any) -> Any:
        """These samples of an input or a target."""
        return batch if self.samples is None else samples_of(batch, self.samples)

    def along(self, axis: SampleAxis) -> SampleAxis:
        """These samples of an output whose samples lie along ``axis``."""
        return axis if self.samples is None else axis.restricted(self.samples)


@dataclass
class _Pass:
    """One run over a data set."""

    model: nn.Module
    loss: PerSampleLoss
    expand: Callable[[Any, Any], Iterator[Objective]]
    #: Every parameter that requires grad. Those that were not chosen are followed too: an output
    #: that required grad through one of them would hide that backward must start at a site.
    tracked: dict[str, nn.Parameter]
    buffers: list[Tensor]
    chosen: dict[str, nn.Parameter]
    strict: bool
    custom_loss: bool
    power: int
    groups_of: GroupsOf | None
    #: Whether operands are rounded to bfloat16.
    rounds: bool = False
    #: By group; without groups there is one, 0.
    sums: dict[int, Sums] = field(default_factory=dict)
    formats: dict[str, torch.memory_format] = field(default_factory=dict)
    rules: dict[str, str] = field(default_factory=dict)
    #: Parameters served by the fallback, and why.
    reasons: dict[str, str] = field(default_factory=dict)
    probe: _Probe | None = None

    def __post_init__(self) -> None:
        self.versions = {name: p._version for name, p in self.tracked.items()}

    # -- a batch -----------------------------------------------------------------------------

    def add_batch(self, inputs: Any, targets: Any) -> None:
        count = _count(inputs, targets)
        if count == 0:
            return
        inputs, targets = _detached(inputs), _detached(targets)
        slices: Sequence[tuple[int, slice | None]] = [(0, None)]
        if self.groups_of is not None:
            inputs, targets, slices = sort_by_group(self.groups_of, inputs, targets, count)
        parts = [_Part(self._sums_of(group), at) for group, at in slices]
        probe = self.probe or _probes.get(self.model)
        if probe is None:
            probe = self._probe(inputs, targets, count)
        if not self._run_batch(inputs, targets, count, parts, probe, is_certain=False):
            # Other calls than in the probe: control flow that depends on data, or a new shape.
            probe = self._probe(inputs, targets, count)
            self._run_batch(inputs, targets, count, parts, probe, is_certain=True)
        self.probe = probe
        _probes[self.model] = probe
        for part in parts:
            part.sums.end_batch(part.size(count))

    def _sums_of(self, group: int) -> Sums:
        if group not in self.sums:
            self.sums[group] = Sums(self.chosen, self.formats)
        return self.sums[group]

    def _run_batch(
        self,
        inputs: Any,
        targets: Any,
        count: int,
        parts: Sequence[_Part],
        probe: _Probe,
        *,
        is_certain: bool,
    ) -> bool:
        """Adds a batch; False, and nothing added, if its calls are not those of the probe.

        ``is_certain`` says that the probe is of this very batch: then what it does not explain
        goes to the fallback.
        """
        batch = _Batch(self, count, parts, probe.shared)
        with contextlib.closing(batch.recorder):
            output = batch.forward(inputs)
            if not batch.attribute(probe):
                if not is_certain:
                    return False
                batch.give_up("the forward pass makes other calls for other samples")
            for objective, last in _with_last(self.expand(output, targets)):
                values = self.losses(objective.function, output, objective.targets, count)
                if last:
                    # The backward pass needs its room.
                    del output
                batch.backward(values, inputs, objective.weight, keep_graph=not last)
                self._fall_back(batch, inputs, objective)
        return True

    def _fall_back(self, batch: _Batch, inputs: Any, objective: Objective) -> None:
        names = [name for name in self.chosen if name in batch.reasons]
        if not names:
            return
        new = [name for name in names if name not in self.reasons]
        for name in new:
            self.reasons[name] = batch.reasons[name]
        try:
            for part in batch.parts:
                sums, way = sum_grad_powers(
                    self.model,
                    part.of(inputs),
                    part.of(objective.targets),
                    objective.function,
                    names,
                    part.size(batch.count),
                    self.power,
                )
                for name in names:
                    part.sums.of(name).add_(sums[name], alpha=objective.weight)
        except RuntimeError as error:
            if self.strict:
                raise
            warnings.warn(f"left out: {error}", FallbackWarning, stacklevel=4)
            for name in names:
                del self.chosen[name]
            return
        for name in names:
            self.rules[name] = f"fallback: {way} ({self.reasons[name]})"
        if new:
            listed = "; ".join(f"{name}: {self.reasons[name]}" for name in new)
            warnings.warn(
                f"no fast rule for {len(new)} parameter(s), computed by the slower {way}: {listed}",
                FallbackWarning,
                stacklevel=4,
            )

    def leaves(self, recorder: Recorder, inputs: Any) -> list[Tensor]:
        """Where backward must arrive for every site to be passed: parameters come first."""
        # A model may ask for the gradient of its input.
        wanted = [x for x in tree_leaves(inputs) if isinstance(x, Tensor) and x.requires_grad]
        derived = [each.leaf for each in recorder.derived.values()]
        return [*self.tracked.values(), *derived, recorder.anchor, *wanted]

    def recorder(
        self,
        on_grad: Callable[[Site, Tensor], None],
        shared: frozenset[tuple[str, tuple[str, ...], int]],
    ) -> Recorder:
        """What observes one forward pass."""
        return Recorder(self.tracked, RULES, on_grad, self.buffers, shared, self.rounds)

    # -- the probe ---------------------------------------------------------------------------

    def _probe(self, inputs: Any, targets: Any, count: int) -> _Probe:
        """Finds the layout of every call, and the calls whose output is common to all samples."""
        probe = self._probe_with(inputs, targets, count, frozenset())
        while True:
            common = {layout.key for layout in probe.layouts if layout.shared}
            if common <= probe.shared:
                return probe
            other = self._probe_with(inputs, targets, count, probe.shared | common)
            if not other.unserved < probe.unserved:
                # What looked common to the samples was their own data.
                return probe
            probe = other

    def _probe_with(
        self,
        inputs: Any,
        targets: Any,
        count: int,
        shared: frozenset[tuple[str, tuple[str, ...], int]],
    ) -> _Probe:
        """Runs two samples and differentiates each one's output on its own."""
        n = min(PROBES, count)
        reached: dict[int, dict[int, Tensor]] = defaultdict(dict)
        current = 0

        def on_grad(site: Site, grad: Tensor) -> None:
            reached[id(site)][current] = grad != 0

        recorder = self.recorder(on_grad, shared)
        inputs, targets = samples_of(inputs, slice(n)), samples_of(targets, slice(n))
        with contextlib.closing(recorder):
            with recorder:
                output = call(self.model, inputs)
                losses = self.losses(self.loss, output, targets, n)
            if self.custom_loss:
                self._check_loss(output, targets, n)
            reasons = self._hidden_uses(losses, recorder, inputs)
            if n > 1 and not self._independent(output, inputs):
                reason = "one sample's output depends on the other samples of its batch"
                reasons = dict.fromkeys(self.tracked, reason)
            values = losses
            if isinstance(output, Tensor) and output.dim() > 0 and output.shape[0] == n:
                # Weights drawn once: a loss that is already zero would reach nothing.
                weights = torch.randn(output.shape[1:], generator=torch.Generator().manual_seed(0))
                values = (output * weights.to(output)).flatten(1).sum(1)
            if values.requires_grad and n == PROBES:
                leaves = self.leaves(recorder, inputs)
                for current in range(n):
                    torch.autograd.grad(
                        values[current], leaves, retain_graph=True, allow_unused=True
                    )
            layouts = [lay_out(site, reached[id(site)]) for site in recorder.sites]
            unserved = {*reasons, *recorder.unruled}
            for site, layout in zip(recorder.sites, layouts, strict=True):
                if not layout.candidates:
                    unserved.update(recorder.roots_of(site))
            return _Probe(layouts if n == PROBES else [], reasons, shared, frozenset(unserved))

    def _independent(self, output: Any, inputs: Any) -> bool:
        """Whether the first sample alone gives what it gave beside another one."""
        with torch.no_grad():
            alone = call(self.model, samples_of(inputs, slice(1)))
        for one, both in zip(tree_leaves(alone), tree_leaves(output), strict=True):
            if isinstance(one, Tensor) and one.is_floating_point() and one.shape[:1] == (1,):
                # Kernels round differently for other batch sizes; samples that mix differ by more.
                tolerance = torch.finfo(one.dtype).eps ** 0.5
                bound = tolerance * one.abs().max().clamp(min=torch.finfo(one.dtype).tiny)
                if not bool(((one - both[:1]).abs() <= bound).all()):
                    return False
        return True

    @staticmethod
    def losses(function: PerSampleLoss, output: Any, targets: Any, count: int) -> Tensor:
        """``function``, whose result must be one number a sample."""
        losses = function(output, targets)
        if not isinstance(losses, Tensor) or losses.shape != (count,):
            shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ValueError(f"loss: expected per-sample losses [N] = [{count}], got {shape}")
        return losses

    def _check_loss(self, output: Any, targets: Any, count: int) -> None:
        """Raises if one sample's loss depends on another sample's output."""
        if count < 2 or not isinstance(output, Tensor) or output.shape[0] != count:
            return
        leaf = output.detach().requires_grad_()
        losses = self.losses(self.loss, leaf, targets, count)
        if losses.requires_grad:
            (grad,) = torch.autograd.grad(losses[0], [leaf])
            if bool(grad[1:].any()):
                raise ValueError("loss: one sample's loss depends on another sample's output")

    def _hidden_uses(self, losses: Tensor, recorder: Recorder, inputs: Any) -> dict[str, str]:
        """Parameters that the graph reaches although every use that the mode saw is detached."""
        names = {id(parameter): {name} for name, parameter in self.tracked.items()}
        for name, derived in recorder.derived.items():
            names[id(derived.leaf)] = recorder.roots(name)
        known = {id(leaf) for leaf in (recorder.anchor, *tree_leaves(inputs))}
        reasons: dict[str, str] = {}
        for node in _graph(losses):
            variable = getattr(node, "variable", None)
            if variable is None or id(variable) in known:
                continue
            if id(variable) not in names:
                raise RuntimeError(
                    "model: it uses a tensor that requires grad and is not one of its "
                    f"parameters (shape {tuple(variable.shape)}); register or detach it"
                )
            for name in names[id(variable)]:
                reasons[name] = "used by a function that torch does not show"
        return reasons

    # -- the end -----------------------------------------------------------------------------

    def finish(
        self, kind: str, reduction: str, alpha: float, into: Mapping[str, Tensor] | None
    ) -> dict[int, FisherDiag]:
        """``alpha`` times what was summed, by group, or added to ``into``."""
        if not self.sums:
            raise ValueError("data: expected at least one sample")
        for name, parameter in self.tracked.items():
            if parameter._version != self.versions[name]:
                raise RuntimeError(f"the forward pass modified parameter {name!r} in place")
        rules = {name: self.rules.get(name, "not used: zero") for name in self.chosen}
        results = {}
        for group, sums in self.sums.items():
            factor = alpha / sums.samples if reduction == "mean" else alpha
            if into is not None:
                sums.add_to(into, factor)
            if isinstance(into, FisherDiag):
                into.samples += sums.samples
                into.rules.update(rules)
                results[group] = into
                continue
            results[group] = FisherDiag(
                sums.finish(factor) if into is None else {name: into[name] for name in self.chosen},
                samples=sums.samples,
                kind=kind,
                reduction=reduction,
                power=self.power,
                rules=rules,
            )
        return results


@dataclass
class _Batch:
    """One forward and one backward pass."""

    run: _Pass
    count: int
    parts: Sequence[_Part]
    shared: frozenset[tuple[str, tuple[str, ...], int]]
    #: Parameters that this batch leaves to the fallback, and why.
    reasons: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.recorder = self.run.recorder(self._on_grad, self.shared)
        self._uses: dict[str, int] = defaultdict(int)
        self._pending: dict[str, list[tuple[Site, str, Tensor]]] = defaultdict(list)
        self._done: set[str] = set()
        self._weight = 1.0
        #: What derived tensors tie together: parameters and derived tensors, by name.
        self._groups: dict[str, str] = {}

    def forward(self, inputs: Any) -> Any:
        with self.recorder:
            return call(self.run.model, inputs)

    def attribute(self, probe: _Probe) -> bool:
        """Finds each site's sample axis; False if these are not the calls that were probed."""
        sites = self.recorder.sites
        if self.count > 1:
            if len(sites) != len(probe.layouts) or not all(
                layout.matches(site) for layout, site in zip(probe.layouts, sites, strict=True)
            ):
                return False
            for layout, site in zip(probe.layouts, sites, strict=True):
                axis = layout.resolve(site.output_shape, self.count)
                if isinstance(axis, str):
                    for name in self.recorder.roots_of(site):
                        self.reasons.setdefault(name, f"{site.function}: {axis}")
                else:
                    site.samples = axis
        else:
            alone = SampleAxis(1, None)
            for site in sites:
                site.samples = alone
        self._collect_reasons(probe.reasons)
        return True

    def give_up(self, reason: str) -> None:
        """Leaves every parameter to the fallback."""
        self.reasons = dict.fromkeys(self.run.chosen, reason)

    def _collect_reasons(self, hidden: Mapping[str, str]) -> None:
        self.reasons.update(hidden)
        for name, function in self.recorder.unruled.items():
            self.reasons[name] = f"{function}: no rule"
        self._groups = self.recorder.groups()
        for site in self.recorder.sites:
            for name in site.names:
                self._uses[self._group(name)] += 1
        for name in self.recorder.without_grad:
            if self._group(name) not in self._uses:
                self.reasons[name] = "used with gradients switched off, perhaps by checkpointing"

    def backward(
        self, losses: Tensor, inputs: Any, weight: float, *, keep_graph: bool = False
    ) -> None:
        """Adds ``weight`` times the squared gradients of ``losses [N]``."""
        with _without_autocast(losses.device):
            self._backward(losses, inputs, weight, keep_graph)

    def _backward(self, losses: Tensor, inputs: Any, weight: float, keep_graph: bool) -> None:
        self._weight, self.recorder.keeps_graph = weight, keep_graph
        self._done.clear()
        for site in self.recorder.sites:
            site.reached = False
        if losses.requires_grad:
            # A parameter that still gets a gradient was used where the mode could not see it.
            leaves = self.run.leaves(self.recorder, inputs)
            grads: Sequence[Tensor | None] = torch.autograd.grad(
                losses.sum(), leaves, allow_unused=True, retain_graph=keep_graph
            )
            names = (*self.run.tracked, *self.recorder.derived)
            hidden = [name for name, grad in zip(names, grads, strict=False) if grad is not None]
            for name in sorted(set().union(*(self.recorder.roots(name) for name in hidden))):
                if name in self._done:
                    _probes.pop(self.run.model, None)
                    raise RuntimeError(
                        f"parameter {name!r} is used by a function that torch does not show, and "
                        "was not in the probe; its Fisher would be wrong"
                    )
                self.reasons.setdefault(name, "used by a function that torch does not show")
            self._check_reached(losses)
        for group in list(self._pending):
            self._add_jointly(group)

    def _check_reached(self, losses: Tensor) -> None:
        """Raises if backward passed by a site that the losses depend on."""
        missed = [site for site in self.recorder.sites if not site.reached]
        nodes = _graph(losses) if missed else set()
        for site in missed:
            if site.node in nodes:
                raise RuntimeError(
                    f"backward did not reach {site.function} with parameter "
                    f"{', '.join(site.names)}; its Fisher would be wrong"
                )

    # -- during backward ---------------------------------------------------------------------

    def _group(self, name: str) -> str:
        return self._groups.get(name, name)

    def _is_wanted(self, name: str) -> bool:
        return name in self.run.chosen and name not in self.reasons

    def _on_grad(self, site: Site, grad: Tensor) -> None:
        """Adds what a site contributes; gradients are switched off, as in any backward pass."""
        roots = self.recorder.roots_of(site) if self.recorder.derived else site.names
        if not any([self._is_wanted(name) for name in roots]):
            return
        samples = site.samples
        if samples is None:
            raise RuntimeError(
                f"the forward pass itself differentiates {site.function} with parameter "
                f"{', '.join(site.names)}; its Fisher cannot be computed"
            )
        site.check_saved()
        alone = {}
        for slot, view in site.use.views.items():
            group = self._groups.get(view.name, view.name)
            if self._uses[group] > 1 or view.name in self._groups:
                self._pending[group].append((site, slot, grad))
                if len(self._pending[group]) == self._uses[group]:
                    self._add_jointly(group)
            elif self._is_wanted(view.name):
                alone[slot] = view.name
        for part in self.parts if alone else ():
            outs = self._outs(site, alone, part.sums)
            if outs:
                along = part.along(samples)
                site.use.accumulate(outs, grad, along, self._weight, self.run.power)
        if not self.recorder.keeps_graph and len(alone) == len(site.use.views):
            # As autograd frees what it saved: the activations need not wait for the end.
            site.forget_inputs()

    def _outs(self, site: Site, names: Mapping[str, str], sums: Sums) -> dict[str, Tensor]:
        """What a call's arguments, of these parameters, are added to."""
        outs = {}
        for slot, name in names.items():
            view = site.use.views[slot]
            # The convolution kernels write rows of channels.
            last = not view.steps and len(view.shape) == 4 and site.function == "conv2d"
            total = sums.of(name, torch.channels_last if last else torch.contiguous_format)
            out = view.into(total)
            if out is None:
                self.reasons[name] = f"{site.function}: used through a view that copies"
                continue
            outs[slot] = out
            self._finished(name, site.function, is_rounded(site.use, slot))
        return outs

    def _finished(self, name: str, function: str, rounded: bool) -> None:
        self._done.add(name)
        if rounded:
            function += ", operands in bfloat16"
        self.run.rules.setdefault(name, function)

    @torch.no_grad()
    def _add_jointly(self, group: str) -> None:
        """Adds the gradients of all uses of one parameter, or of a group, then squares."""
        uses = self._pending.pop(group)
        names = [n for n in self.run.chosen if self._group(n) == group and self._is_wanted(n)]
        derived = [each for n, each in self.recorder.derived.items() if self._groups[n] == group]
        if not names:
            return
        functions = " + ".join(sorted({site.function for site, _, _ in uses}))
        if derived:
            functions += f" of {', '.join(each.function for each in derived)}"
        else:
            functions += f", {self._uses[group]} uses"
        for part in self.parts:
            totals = {name: part.sums.of(name) for name in names}
            occurrences = [
                Occurrence(site.use, slot, grad, part.along(site.samples))
                for site, slot, grad in uses
                if site.samples is not None
            ]
            count, weight, power = part.size(self.count), self._weight, self.run.power
            try:
                if derived:
                    add_through_derived(totals, derived, occurrences, count, weight, power)
                else:
                    add_jointly(totals[group], occurrences, count, weight, power)
            except CopyingView as error:
                # Before the first part: all have buffers of one format.
                self.reasons.update(dict.fromkeys(names, str(error)))
                return
        rounded = any(is_rounded(site.use, slot) for site, slot, _ in uses)
        for name in names:
            self._finished(name, functions, rounded)
