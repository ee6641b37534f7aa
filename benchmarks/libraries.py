"""The contenders that other libraries provide, each at the fastest setting an expert would find.

A library is imported by name inside its function: one that is absent costs its own rows only, and
nothing here needs it for type hints. Every function owns the model it is given.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from importlib import import_module
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.utils.data import DataLoader

from benchmarks.contender import NO_OPTIONS, Call, Options, Values
from benchmarks.registry import Problem


def _in(module: str, parameter: str) -> str:
    """The name of a module's parameter in the whole model."""
    return f"{module}.{parameter}" if module else parameter


def _shapes(problem: Problem) -> dict[str, torch.Size]:
    """The shape of each parameter, under all of its names where modules share it."""
    return {name: p.shape for name, p in problem.model.named_parameters(remove_duplicate=False)}


def _has(problem: Problem, kind: type[nn.Module]) -> bool:
    return any(isinstance(module, kind) for module in problem.model.modules())


def _has_large_images(problem: Problem) -> bool:
    """Whether a convolution with a group for each sample and channel takes minutes a pass."""
    return problem.inputs.dim() == 4 and problem.inputs.shape[-1] > 64


# -- BackPACK ------------------------------------------------------------------------------------


def backpack(problem: Problem, options: Options) -> Call:
    """``SumGradSquared``.

    ``save_memory`` picks its other way through a convolution; ``converter`` traces the model and
    replaces what BackPACK's hooks refuse, such as operations in place.
    """
    # Without opt_einsum, torch.einsum contracts BackPACK's four-operand expression for sequences
    # left to right and builds N x S x D1 x D2 numbers; it is no dependency of BackPACK, but only
    # fair to have.
    import_module("opt_einsum")
    library = import_module("backpack")
    extensions = import_module("backpack.extensions")
    convnd = import_module("backpack.core.derivatives.convnd")

    model = problem.model
    converter = bool(options.get("converter", 0))
    if converter:
        modules: Any = model.modules()
        for module in modules:
            if hasattr(module, "inplace"):
                module.inplace = False
    extended = library.extend(model, use_converter=converter)
    summed = library.extend(problem.loss.summed())
    save_memory = bool(options.get("save_memory", 0))

    def run() -> Values:
        # BackPACK warns of each layer it has no rule for; the check names those parameters.
        with (
            warnings.catch_warnings(),
            convnd.weight_jac_t_save_memory(save_memory),
            library.backpack(extensions.SumGradSquared()),
        ):
            warnings.simplefilter("ignore")
            summed(extended(problem.inputs), problem.targets).backward()
        return {}

    def read(_outcome: Values) -> Values:
        named = model.named_parameters()
        return {n: p.sum_grad_squared for n, p in named if hasattr(p, "sum_grad_squared")}

    def reset() -> None:
        model.zero_grad(set_to_none=True)
        for p in model.parameters():
            if hasattr(p, "sum_grad_squared"):
                del p.sum_grad_squared

    return Call(run, read, reset)


def backpack_modes(problem: Problem) -> Iterable[Options]:
    """BackPACK has two ways through a convolution; which is faster depends on the layers."""
    modes: list[Options] = [NO_OPTIONS]
    if _has(problem, _ConvNd):
        modes = [{"save_memory": 1}]
        if not _has_large_images(problem):
            modes.insert(0, {"save_memory": 0})
    return [*modes, *({**mode, "converter": 1} for mode in modes)]


# -- NNGeometry ----------------------------------------------------------------------------------


def nngeometry(problem: Problem, options: Options) -> Call:
    """The diagonal of the covariance of per-sample loss gradients, by its hooks."""
    backend = import_module("nngeometry.backend")
    layers = import_module("nngeometry.layercollection").LayerCollection.from_model(problem.model)
    convolutions = (
        backend.torch_hooks.use_conv_impl_for_convs
        if options.get("conv", 0)
        else backend.torch_hooks.use_unfold_impl_for_convs
    )

    shapes = _shapes(problem)

    def per_sample(inputs: Tensor, targets: Tensor) -> Tensor:
        return problem.loss.per_sample(problem.model(inputs), targets)

    def run() -> Values:
        # It makes the inputs require grad, and it divides by the number of items: one batch is one
        # item here. Left to itself it would take the batch apart and collate it anew.
        whole: Any = [(problem.inputs.detach(), problem.targets)]
        loader: Any = DataLoader(whole, batch_size=None)
        jacobian = backend.TorchHooksJacobianBackend(problem.model, per_sample, False, layers)
        with convolutions():
            return {"all": jacobian.get_covariance_diag(loader)}

    def read(outcome: Values) -> Values:
        values = {}
        for name, layer in layers.layers.items():
            start = layers.p_pos[name]
            for part in ("weight", "bias"):
                shape = getattr(layer, part)
                if shape is not None:
                    end = start + shape.numel()
                    # Of transposed convolutions it swaps the axes in the description alone.
                    size = shapes.get(_in(name, part))
                    if size is None or size.numel() != shape.numel():
                        size = shape.size
                    values[_in(name, part)] = outcome["all"][start:end].view(size)
                    start = end
        return values

    return Call(run, read)


def nngeometry_modes(problem: Problem) -> Iterable[Options]:
    """NNGeometry unfolds for convolutions, or convolves in one dimension more."""
    return [{"conv": 0}, {"conv": 1}] if _has(problem, nn.Conv2d) else [NO_OPTIONS]


# -- Opacus --------------------------------------------------------------------------------------


def opacus_hooks(problem: Problem, options: Options) -> Call:
    """Per-sample gradients by Opacus's own rules, squared and summed."""
    return _opacus(problem, force_functorch=False)


def opacus_functorch(problem: Problem, options: Options) -> Call:
    """Per-sample gradients by ``vmap`` layer by layer, squared and summed."""
    return _opacus(problem, force_functorch=True)


def _opacus(problem: Problem, force_functorch: bool) -> Call:
    library = import_module("opacus.grad_sample")
    model, summed = problem.model, problem.loss.summed()
    # It records activations of modules in training mode only. Those with parameters are enough:
    # dropout stays as it is, and Opacus refuses layers with running statistics.
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.training = True
    watched = library.GradSampleModule(model, loss_reduction="sum", force_functorch=force_functorch)

    def run() -> Values:
        with warnings.catch_warnings():
            # About hooks on a module whose input, token ids, needs no gradient.
            warnings.simplefilter("ignore")
            summed(watched(problem.inputs), problem.targets).backward()
        named = [(name, getattr(p, "grad_sample", None)) for name, p in model.named_parameters()]
        # In place: the gradients have no other use.
        return {name: each.square_().sum(0) for name, each in named if each is not None}

    return Call(run, reset=lambda: watched.zero_grad(set_to_none=True))


# -- kronfluence ---------------------------------------------------------------------------------


def kronfluence(problem: Problem, options: Options) -> Call:
    """The "lambda matrices" of the diagonal strategy with observed labels, without files."""
    eigen = import_module("kronfluence.factor.eigen")
    analyzer = import_module("kronfluence.analyzer")
    arguments = import_module("kronfluence.arguments").FactorArguments
    state = import_module("kronfluence.utils.state").State(cpu=True)
    Task: Any = import_module("kronfluence.task").Task
    summed = problem.loss.summed()

    class BatchLoss(Task):
        def compute_train_loss(
            self, batch: tuple[Tensor, Tensor], model: nn.Module, sample: bool = False
        ) -> Tensor:
            return summed(model(batch[0]), batch[1])

        def compute_measurement(self, batch: tuple[Tensor, Tensor], model: nn.Module) -> Tensor:
            return self.compute_train_loss(batch, model)

    shapes = _shapes(problem)
    dtype = next(problem.model.parameters()).dtype
    task = BatchLoss()
    model = analyzer.prepare_model(problem.model, task)
    settings = arguments(
        strategy="diagonal",
        use_empirical_fisher=True,
        has_shared_parameters=bool(options.get("shared", 0)),
        per_sample_gradient_dtype=dtype,
        lambda_dtype=dtype,
    )

    def run() -> Values:
        batches = [(problem.inputs, problem.targets)]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it makes a gradient scaler of a deprecated kind
            _, factors = eigen.fit_lambda_matrices_with_loader(
                model, state, task, batches, settings, disable_tqdm=True
            )
        return factors["lambda_matrix"]

    def read(outcome: Values) -> Values:
        # One matrix a layer: a row an output, the bias as the last column.
        values = {}
        for module, matrix in outcome.items():
            weight, bias = _in(module, "weight"), _in(module, "bias")
            inputs = shapes[weight][1:].numel()
            values[weight] = matrix[:, :inputs].reshape(shapes[weight])
            if bias in shapes:
                values[bias] = matrix[:, inputs]
        return values

    return Call(run, read)


def kronfluence_modes(problem: Problem) -> Iterable[Options]:
    """Modules that run twice need a setting that costs all others time."""
    return [NO_OPTIONS, {"shared": 1}]


# -- ASDL ----------------------------------------------------------------------------------------


def asdl(problem: Problem, options: Options) -> Call:
    """The empirical Fisher's diagonal; it takes tokens, and positions of small maps, as samples."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it imports functions that torch has deprecated
        library = import_module("asdl")
    model = problem.model
    config = library.FisherConfig(
        fisher_type=library.FISHER_EMP, fisher_shapes=[library.SHAPE_DIAG], data_size=1
    )
    maker = library.get_fisher_maker(model, config)
    output = maker.setup_model_call(model, problem.inputs)
    maker.setup_loss_call(problem.loss.summed(), output, problem.targets)

    def run() -> Values:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # it registers hooks of a deprecated kind
            maker.forward_and_backward()
        return {}

    def read(_outcome: Values) -> Values:
        values = {}
        for name, module in model.named_modules():
            diagonal = getattr(getattr(module, "fisher", None), "diag", None)
            for part in ("weight", "bias"):
                value = getattr(diagonal, part, None)
                if value is not None:
                    values[_in(name, part)] = value
        return values

    return Call(run, read, reset=maker.zero_fisher)
