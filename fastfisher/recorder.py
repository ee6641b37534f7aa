"""Observation of a forward pass: every use of a parameter, wherever it is called from.

:class:`Recorder` is a ``TorchFunctionMode``. It sees each torch function that receives a tracked
parameter (or a view of one): from an ``nn.Module``, from ``torch.nn.functional``, from anybody's
code. A function with a rule becomes a :class:`Site`, whose gradient at the output feeds the kernels
during backward; ordinary weight gradients are never formed, because the function itself runs on
detached parameters. A function of parameters alone gives a :class:`Derived` tensor, which is
followed as if it were a parameter. Any other function sends its parameters to the fallback.

What the mode cannot see (a custom ``autograd.Function``, TorchScript) still reaches the
parameter's own autograd node, which :mod:`fastfisher.fisher_diag` checks. So coverage is known.
"""

from __future__ import annotations

import functools
import types
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, field, replace
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.hooks import RemovableHandle

Function = Callable[..., Any]


@dataclass(frozen=True)
class View:
    """A parameter, or a view of one: ``replay`` takes the same view of another tensor."""

    name: str
    shape: torch.Size
    steps: tuple[Callable[[Tensor], Tensor], ...] = ()

    def replay(self, tensor: Tensor) -> Tensor:
        """The same view of ``tensor``, which has the parameter's shape."""
        for step in self.steps:
            tensor = step(tensor)
        return tensor

    def into(self, tensor: Tensor) -> Tensor | None:
        """:meth:`replay`, where that gives entries of ``tensor`` and no copy of them, else None.

        The parameter's own strides may allow a view that those of ``tensor`` do not.
        """
        if not self.steps:
            return tensor
        try:
            view = self.replay(tensor)
        except RuntimeError:
            return None
        same = view.untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
        return view if same else None


@dataclass(frozen=True)
class Derived:
    """A tensor computed from parameters alone: a normalised weight, a table's fixed rows.

    It is followed like a parameter, under a name of its own. A sample's gradient with respect to
    its sources follows by the chain rule, whatever the samples have in common.
    """

    name: str
    function: str
    #: What the model is given: a leaf.
    leaf: Tensor
    #: The same values with their history.
    output: Tensor
    #: Where that history ends, and which parameter (or derived tensor) begins there.
    sources: tuple[tuple[Tensor, View], ...]

    def pull(self, grad: Tensor) -> list[tuple[View, Tensor]]:
        """One sample's gradient with respect to each source, given that to this tensor."""
        leaves = [leaf for leaf, _ in self.sources]
        # The gradient of a product: to pass `grad` itself makes torch import its symbolic shapes,
        # a second and 60 MB.
        with torch.enable_grad():
            product = (self.output * grad.to(self.output.dtype)).sum()
        grads = torch.autograd.grad(product, leaves, retain_graph=True, allow_unused=True)
        return [
            (view, each)
            for (_, view), each in zip(self.sources, grads, strict=True)
            if each is not None
        ]


class Use(Protocol):
    """What a rule knows about one call: how its output's gradient becomes squared gradients."""

    #: Which parameters the call reads, by the name of the argument.
    views: Mapping[str, View]
    #: Axes of the output along which samples may lie.
    sample_axes: Sequence[int]

    def accumulate(
        self,
        outs: Mapping[str, Tensor],
        grad: Tensor,
        samples: SampleAxis,
        alpha: float,
        power: int,
    ) -> None:
        """Adds ``alpha * sum_n |g_n| ** power`` to ``outs`` (a subset of ``views``)."""

    def per_sample(self, slot: str, grad: Tensor, samples: SampleAxis, part: slice) -> Tensor:
        """Per-sample gradients ``[n, *view.shape]`` of one argument, for samples ``part``."""

    def term(self, slot: str, grad: Tensor, samples: SampleAxis) -> Any:
        """The same gradients as factors (:mod:`fastfisher.rules.terms`), or None if they are small.

        ``grad`` has the dtype that the squares are accumulated in.
        """


@dataclass(frozen=True)
class SampleAxis:
    """Where samples lie in an output: along ``axis``, ``size / total`` entries for each.

    ``minor`` says that the sample index runs fastest within the axis (``[T * N]``), else slowest
    (``[N * T]``). ``axis`` is None where there is a single sample. ``part`` restricts everything to
    some of the ``total`` samples; ``count`` is how many they are.
    """

    total: int
    axis: int | None
    minor: bool = False
    part: slice | None = None

    @property
    def count(self) -> int:
        """Samples that are meant."""
        return self.total if self.part is None else self.part.stop - self.part.start

    def restricted(self, part: slice) -> SampleAxis:
        """The same axis, for the samples ``part``, of which both ends are given."""
        return replace(self, part=part)

    def split(self, tensor: Tensor) -> Tensor:
        """``tensor`` as ``[count, ...]``; a merged axis leaves its other factor behind."""
        samples = self._split(tensor)
        return samples if self.part is None else samples[self.part]

    def _split(self, tensor: Tensor) -> Tensor:
        if self.axis is None:
            return tensor.unsqueeze(0)
        size = tensor.shape[self.axis]
        if size == self.total:
            return tensor.movedim(self.axis, 0)
        if self.minor:
            parts = tensor.unflatten(self.axis, (size // self.total, self.total))
            return parts.movedim(self.axis + 1, 0)
        return tensor.unflatten(self.axis, (self.total, size // self.total)).movedim(self.axis, 0)

    def rows(self, tensor: Tensor) -> Tensor | None:
        """``tensor`` itself, restricted, where its first axis is that of the samples, else None."""
        if tensor.shape[0] != self.total or self.axis:
            return None
        return tensor if self.part is None else tensor[self.part]


@dataclass(slots=True)
class Site:
    """One recorded call.

    An output's hook holds the site and the site the output's node: a circle through the autograd
    graph, which Python's collector cannot see. :meth:`release` opens it.
    """

    function: str
    #: The parameters that the call reads.
    names: tuple[str, ...]
    #: What its rule knows; not there any more after :meth:`forget_inputs`.
    use: Use
    output_shape: torch.Size
    #: Tensors the kernels will read, with their version at the time of the call.
    saved: tuple[tuple[Tensor, int], ...]
    #: Which of the calls of this function with these parameters it was.
    occurrence: int = 0
    #: Whether no input of the call required grad.
    source: bool = False
    #: Where samples lie in its output, as soon as that is known.
    samples: SampleAxis | None = None
    #: The output's place in the graph.
    node: torch.autograd.graph.Node | None = None
    #: Whether backward has come by.
    reached: bool = False
    #: Unhooks the output.
    handle: RemovableHandle | None = None

    def forget_inputs(self) -> None:
        """Lets go of what only the kernels needed; :attr:`use` is gone then."""
        if hasattr(self, "use"):
            del self.use
        self.saved = ()

    def release(self) -> None:
        """Lets go of every tensor."""
        self.forget_inputs()
        if self.handle is not None:
            self.handle.remove()
        self.node, self.handle = None, None

    @property
    def key(self) -> tuple[str, tuple[str, ...], int]:
        """What tells this call from the others of a forward pass."""
        return self.function, self.names, self.occurrence

    def check_saved(self) -> None:
        """Raises if a saved tensor was modified in place since the call."""
        for tensor, version in self.saved:
            if tensor._version != version:
                raise RuntimeError(
                    f"the input of {self.function} with parameter {', '.join(self.names)} was "
                    "modified in place after the call; its gradient cannot be computed"
                )


Rule = Callable[["Recorder", Function, tuple[Any, ...], dict[str, Any]], Any]


class PassingUse(Use, Protocol):
    """A use that computes the gradient of its input itself, in the pass over its output's."""

    def grad_input(self, grad: Tensor) -> Tensor:
        """The gradient of the input; called after ``accumulate``, if that is called at all."""


class _Shared(Exception):
    """The call is one of :attr:`Recorder.shared`."""


class _Source(torch.autograd.Function):
    """Runs a call none of whose inputs require grad, so that backward still reaches its output."""

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, compute: Callable[[], Tensor], hook: Callable[[Tensor], None]
    ) -> Tensor:
        ctx.hook = hook
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        ctx.hook(grads[0])
        return None, None, None


class _Passing(torch.autograd.Function):
    """Runs a call whose :class:`PassingUse` gives the gradient of its input."""

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, compute: Callable[[], Tensor], pull: Callable[[Tensor], Tensor]
    ) -> Tensor:
        ctx.pull = pull
        return compute()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # The wrapper has nothing to do but where a graph of the backward pass is made, and takes
        # as long as the rest.
        return (_pull_once if torch.is_grad_enabled() else _pull)(ctx, grads[0])


def _pull(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return ctx.pull(grad), None, None


_pull_once = once_differentiable(_pull)


# Functions that only rearrange entries: a parameter's view is followed through them.
_VIEW_NAMES = frozenset(
    (
        *("t", "transpose", "swapaxes", "swapdims", "permute", "movedim", "moveaxis", "adjoint"),
        *("view", "view_as", "reshape", "flatten", "unflatten", "unsqueeze", "squeeze"),
        *("narrow", "select", "chunk", "split", "split_with_sizes", "tensor_split", "unbind"),
        *("__getitem__", "contiguous"),
    )
)
_VIEW_PROPERTIES = frozenset(("T", "mT", "H", "mH"))
_NO_GRADIENT_NAMES = frozenset(("detach", "detach_"))


@dataclass
class Recorder(TorchFunctionMode):
    """Records the uses of ``parameters`` in the forward pass that runs inside it.

    Args:
        parameters: every parameter that requires grad, by name.
        rules: torch function -> rule.
        on_grad: called during backward with a site and the gradient at its output.
        constants: tensors that no sample has a part in: the model's buffers.
        shared: keys of calls whose output is not a sample's but common to all; where nothing else
            that requires grad enters them, they give derived tensors instead of sites.
        rounds: whether operands of float32 products are rounded to bfloat16.
    """

    parameters: Mapping[str, nn.Parameter]
    rules: Mapping[Function, Rule]
    on_grad: Callable[[Site, Tensor], None]
    constants: Sequence[Tensor] = ()
    shared: Set[tuple[str, tuple[str, ...], int]] = frozenset()
    rounds: bool = False
    sites: list[Site] = field(default_factory=list)
    #: Parameters with a use that has no rule, and the function that used them.
    unruled: dict[str, str] = field(default_factory=dict)
    #: Parameters used with gradients switched off.
    without_grad: set[str] = field(default_factory=set)
    #: Tensors computed from parameters alone, by name, in the order of their creation.
    derived: dict[str, Derived] = field(default_factory=dict)
    #: Whether another backward pass follows the one that runs, which saved tensors must outlive.
    keeps_graph: bool = True
    anchor: Tensor = field(init=False)

    def __post_init__(self) -> None:
        super().__init__()
        self.anchor = torch.zeros((), requires_grad=True)
        # Keyed by identity; the tensors are held so that an id stays theirs.
        self._tracked: dict[int, tuple[Tensor, View]] = {
            id(parameter): (parameter, View(name, parameter.shape))
            for name, parameter in self.parameters.items()
        }
        self._occurrences: dict[tuple[str, tuple[str, ...]], int] = defaultdict(int)

    @functools.cached_property
    def _storages(self) -> set[int]:
        strided = [tensor for tensor in self.constants if tensor.layout == torch.strided]
        return {tensor.untyped_storage().data_ptr() for tensor in strided}

    # -- for rules ---------------------------------------------------------------------------

    def view(self, value: object) -> View | None:
        """The view that ``value`` is of a tracked parameter, or None."""
        entry = self._tracked.get(id(value))
        return None if entry is None else entry[1]

    def is_constant(self, value: Tensor) -> bool:
        """Whether no sample has a part in ``value``: it is a buffer, or a view of one."""
        if value.requires_grad or value.layout != torch.strided:
            return False
        return value.untyped_storage().data_ptr() in self._storages

    def record(
        self,
        function: Function,
        use: Use,
        inputs: Sequence[Tensor],
        compute: Callable[[], Tensor],
        saved: Sequence[Tensor] | None = None,
        passing: Tensor | None = None,
    ) -> Tensor:
        """Runs ``compute`` and arranges that the gradient at its result reaches ``on_grad``.

        Args:
            function: for messages.
            use: what the rule knows.
            inputs: tensors that the call reads beside parameters.
            compute: runs the function on detached parameters.
            saved: which of them ``use`` reads during backward; None is all.
            passing: the one input that requires grad, where ``use`` is a :class:`PassingUse`.
        """
        name, names = name_of(function), tuple([view.name for view in use.views.values()])
        held = tuple([(x, x._version) for x in (inputs if saved is None else saved)])
        occurrence = self._occurrences[name, names]
        self._occurrences[name, names] = occurrence + 1
        site = Site(name, names, use, torch.Size(), held, occurrence)
        site.source = not any([x.requires_grad for x in inputs])
        if site.source and site.key in self.shared:
            raise _Shared

        def hook(grad: Tensor) -> None:
            site.reached = True
            self.on_grad(site, grad)

        def pull(grad: Tensor) -> Tensor:
            passed = cast(PassingUse, site.use)
            hook(grad)
            return passed.grad_input(grad)

        if site.source:
            output = _Source.apply(self.anchor, compute, hook)
        elif passing is not None:
            output = _Passing.apply(passing, compute, pull)
        else:
            output = compute()
            site.handle = output.register_hook(hook)
        site.output_shape, site.node = output.shape, output.grad_fn
        self.sites.append(site)
        return output

    def close(self) -> None:
        """Lets go of everything that the forward pass left; call it when backward is over."""
        for site in self.sites:
            site.release()
        self.sites.clear()
        self._tracked.clear()
        self.derived.clear()

    # -- the mode ----------------------------------------------------------------------------

    def __torch_function__(
        self,
        func: Function,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        values = (*args, *kwargs.values()) if kwargs else args
        # Most calls have no parameter; this runs once for every function of the forward pass.
        tracked = self._tracked
        for value in values:
            if id(value) in tracked:
                break
            if isinstance(value, (list, tuple, dict)) and any(self._views_in((value,))):
                break
        else:
            return func(*args, **kwargs)
        if not torch.is_grad_enabled():
            names = [view.name for view in self._views_in(values)]
            self.without_grad.update(*(self.roots(name) for name in names))
            return func(*args, **kwargs)
        rule = self.rules.get(func)
        if rule is not None:
            try:
                result = rule(self, func, args, kwargs)
            except _Shared:
                result = self._derive(func, args, kwargs, constant=True)
            if result is not NotImplemented:
                return result
        views = list(self._views_in(values))
        name = name_of(func)
        if name in _NO_GRADIENT_NAMES:
            return func(*args, **kwargs)
        if (name in _VIEW_NAMES or name in _VIEW_PROPERTIES) and self.view(args[0]) is not None:
            result = self._follow_view(func, args, kwargs)
            if result is not NotImplemented:
                return result
        result = self._derive(func, args, kwargs)
        if result is not NotImplemented:
            return result
        expanded = _expanded(func)
        if expanded is not None:
            with self:
                return expanded(*args, **kwargs)
        result = func(*self._detached(args), **self._detached(kwargs))
        if _writes(name) or any(isinstance(leaf, Tensor) for leaf in tree_flatten(result)[0]):
            for view in views:
                for root in self.roots(view.name):
                    self.unruled.setdefault(root, name)
        return result

    def roots(self, name: str) -> set[str]:
        """The parameters that a name, of one or of a derived tensor, stands for."""
        if name not in self.derived:
            return {name}
        sources = self.derived[name].sources
        return set().union(*(self.roots(view.name) for _, view in sources))

    def roots_of(self, site: Site) -> set[str]:
        """The parameters that a call reads, itself or through derived tensors."""
        if not self.derived:
            return set(site.names)
        return set().union(*(self.roots(name) for name in site.names))

    def groups(self) -> dict[str, str]:
        """Names of parameters and derived tensors that belong together, each to its group's."""
        groups: dict[str, str] = {}
        for name, derived in self.derived.items():
            members = {name, *(view.name for _, view in derived.sources)}
            merged = {groups[member] for member in members if member in groups}
            members.update(other for other, group in groups.items() if group in merged)
            groups.update(dict.fromkeys(members, name))
        return groups

    def _views_in(self, values: Sequence[Any]) -> Iterator[View]:
        for value in values:
            if isinstance(value, Tensor):
                entry = self._tracked.get(id(value))
                if entry is not None:
                    yield entry[1]
            elif isinstance(value, (list, tuple)):
                yield from self._views_in(value)
            elif isinstance(value, dict):
                yield from self._views_in(tuple(value.values()))

    def _detached(self, values: Any) -> Any:
        leaves, spec = tree_flatten(values)
        return tree_unflatten(
            [leaf.detach() if id(leaf) in self._tracked else leaf for leaf in leaves], spec
        )

    def _follow_view(self, func: Function, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        base = args[0]
        view = self._tracked[id(base)][1]
        if any(True for _ in self._views_in((*args[1:], *kwargs.values()))):
            return NotImplemented
        result = func(*args, **kwargs)
        if result is base:
            return result
        parts = [result] if isinstance(result, Tensor) else list(result)
        storage = base.untyped_storage().data_ptr()
        for index, part in enumerate(parts):
            if part.untyped_storage().data_ptr() != storage:
                # A copy, or other entries: derived from the parameter, not a view of it.
                return NotImplemented
            at = None if isinstance(result, Tensor) else index

            def step(tensor: Tensor, at: int | None = at) -> Tensor:
                viewed = func(tensor, *args[1:], **kwargs)
                return viewed if at is None else viewed[at]

            self._tracked[id(part)] = (
                part,
                View(view.name, part.shape, (*view.steps, step)),
            )
        return result

    def _derive(
        self,
        func: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        constant: bool = False,
    ) -> Any:
        """Runs a function of parameters alone; NotImplemented if it is not one.

        ``constant``: other tensors are known to be no sample's, as long as none requires grad.
        """
        name = name_of(func)
        if _writes(name):
            return NotImplemented
        # Most calls read an activation first; to flatten their arguments takes longer than they do.
        first = args[0] if args else None
        is_other = isinstance(first, Tensor) and self.view(first) is None
        if is_other and not constant and not self.is_constant(cast(Tensor, first)):
            return NotImplemented
        values, spec = tree_flatten((args, kwargs))
        entries: dict[int, tuple[Tensor, View]] = {}
        originals = {}
        for index, value in enumerate(values):
            if not isinstance(value, Tensor):
                continue
            view = self.view(value)
            if view is not None:
                if id(value) not in entries:
                    entries[id(value)] = (value.detach().requires_grad_(), view)
                values[index] = entries[id(value)][0]
                originals[id(values[index])] = value
            elif value.requires_grad or not (constant or self.is_constant(value)):
                return NotImplemented
        args, kwargs = tree_unflatten(values, spec)
        outputs, spec = tree_flatten(func(*args, **kwargs))
        for index, output in enumerate(outputs):
            if isinstance(output, Tensor) and output.requires_grad:
                outputs[index] = originals.get(id(output))
                if outputs[index] is None:
                    outputs[index] = self._track(name, output, tuple(entries.values()))
        return tree_unflatten(outputs, spec)

    def _track(
        self, function: str, output: Tensor, sources: tuple[tuple[Tensor, View], ...]
    ) -> Tensor:
        leaf = output.detach().requires_grad_()
        names = ", ".join(view.name for _, view in sources)
        name = f"{function}({names})#{len(self.derived)}"
        self.derived[name] = Derived(name, function, leaf, output, sources)
        self._tracked[id(leaf)] = (leaf, View(name, leaf.shape))
        return leaf


def name_of(func: Function) -> str:
    """The name a person knows a torch function by."""
    name = getattr(func, "__name__", None) or repr(func)
    if name == "__get__":
        return getattr(getattr(func, "__self__", None), "__name__", name)
    return name


def _writes(name: str) -> bool:
    """Whether a function of this name writes into one of its arguments."""
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


_expansions: dict[Function, Function | None] = {}


def _expanded(func: Function) -> Function | None:
    """A copy of a composite Python function that does not hand itself to the mode.

    ``torch.nn.functional`` functions start with "if has_torch_function(...): return
    handle_torch_function(...)". Run again under the mode they would come back here for ever; with
    that test answering no, the torch functions in their bodies are observed one by one.
    """
    if func not in _expansions:
        expanded = None
        if isinstance(func, types.FunctionType):
            tests = [name for name in func.__globals__ if name.startswith("has_torch_function")]
            if any(name in func.__code__.co_names for name in tests):
                expanded = types.FunctionType(
                    func.__code__,
                    {**func.__globals__, **dict.fromkeys(tests, _no_torch_function)},
                    func.__name__,
                    func.__defaults__,
                    func.__closure__,
                )
                expanded.__kwdefaults__ = func.__kwdefaults__
        _expansions[func] = expanded
    return _expansions[func]


def _no_torch_function(*_: object) -> bool:
    return False
