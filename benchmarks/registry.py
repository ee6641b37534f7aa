"""What is compared: the cases, each a model with its inputs, its loss and its memory layouts.

To add a case, write a function that builds the model and one that makes a batch, and add a
:class:`Case` to :data:`CASES`. The functions must be importable by name (no lambdas): peak memory
is measured in fresh processes, which get the case by pickle.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from benchmarks.nets import (
    CausalLM,
    SequenceMLP,
    Tagger,
    Transformer,
    resnet50,
    torchvision_model,
    vit_tiny,
)
from fastfisher.reference import PerSampleLoss

SEED = 0
IMAGE_LAYOUTS = ("nchw", "channels_last")


@dataclass(frozen=True)
class Loss:
    """One loss in the three forms that contenders ask for."""

    name: str
    """As ``fisher_diag(loss=...)`` takes it."""
    per_sample: PerSampleLoss
    """``(output, target) -> [N]``."""
    summed: Callable[[], nn.Module]
    """Builds a module whose call gives the sum over samples."""


def _cross_entropy(output: Tensor, target: Tensor) -> Tensor:
    # With positions, [N, C, S], a sample's loss is their sum; targets of -100 count nothing.
    values = F.cross_entropy(output, target, reduction="none")
    return values.flatten(1).sum(1) if values.dim() > 1 else values


CROSS_ENTROPY = Loss("cross_entropy", _cross_entropy, partial(nn.CrossEntropyLoss, reduction="sum"))


@dataclass(frozen=True)
class Problem:
    """A model in eval mode with one batch: what every contender is given."""

    model: nn.Module
    inputs: Tensor
    targets: Tensor
    loss: Loss

    @property
    def names(self) -> list[str]:
        """Parameters whose Fisher is asked for."""
        return [name for name, p in self.model.named_parameters() if p.requires_grad]

    @property
    def scalars(self) -> int:
        """Number of scalars in those parameters."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def take(self, samples: Sequence[int]) -> Problem:
        """The same model with the given samples of the batch, in the batch's memory layout."""
        # Unlike indexing, concatenation keeps channels_last.
        inputs = torch.cat([self.inputs[n : n + 1] for n in samples])
        return replace(self, inputs=inputs, targets=self.targets[list(samples)])

    def to(self, device: str) -> Problem:
        """The same on a device, which takes the model along: there is no copy left behind."""
        return replace(
            self,
            model=self.model.to(device),
            inputs=self.inputs.to(device),
            targets=self.targets.to(device),
        )

    def with_own_model(self) -> Problem:
        """The same batch with a copy of the model that its owner may hook or change."""
        return replace(self, model=copy.deepcopy(self.model))

    def in_float64(self) -> Problem:
        """A copy in double precision, for the reference."""
        inputs = self.inputs.double() if self.inputs.is_floating_point() else self.inputs
        return replace(self, model=copy.deepcopy(self.model).double(), inputs=inputs)


@dataclass(frozen=True)
class Case:
    """One model on one kind of batch.

    Attributes:
        name: how the command line calls it.
        title: one line for people.
        build: makes the model, float32 on the CPU.
        inputs: ``(batch, generator) -> (inputs, targets)``, batch axis first.
        batch: samples in the timed batch.
        layouts: memory layouts to run; ``channels_last`` converts model and inputs.
        loss: the loss whose per-sample gradients are squared.
        check_inputs: inputs of the check where those of the timed batch suit none: with millions
            of activations a sample, some are always within rounding of a kink.
    """

    name: str
    title: str
    build: Callable[[], nn.Module]
    inputs: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    batch: int
    layouts: tuple[str, ...] = ("contiguous",)
    loss: Loss = CROSS_ENTROPY
    check_inputs: Callable[[int, torch.Generator], tuple[Tensor, Tensor]] | None = None

    def check_problem(self, layout: str, batch: int) -> Problem:
        """The model with a batch that its contenders can be checked on."""
        return replace(self, inputs=self.check_inputs or self.inputs).problem(layout, batch)

    def problem(self, layout: str, batch: int) -> Problem:
        """Build the model and a batch; the same ones at every call, in every process."""
        inputs, targets = self.inputs(batch, torch.Generator().manual_seed(SEED))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            model = self.build()
        _settle_batch_norms(model, inputs)
        if layout == "channels_last":
            model = model.to(memory_format=torch.channels_last)
            inputs = inputs.contiguous(memory_format=torch.channels_last)
        return Problem(model.eval(), inputs, targets, self.loss)


def _settle_batch_norms(model: nn.Module, inputs: Tensor) -> None:
    """Set running statistics from one batch.

    With those of a fresh model, activations shrink from layer to layer until squared gradients
    are denormal numbers, which are slow on CPUs and which no trained model has.
    """
    norms = [m for m in model.modules() if isinstance(m, _BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    model.eval()
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        model(inputs)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def _packaged_model(name: str) -> nn.Module:
    from fastfisher.models import build

    return build(name, num_classes=10, in_channels=3, image_size=32)


def _images(
    batch: int, generator: torch.Generator, *, size: int, classes: int
) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(batch, 3, size, size, generator=generator)
    return inputs, torch.randint(classes, (batch,), generator=generator)


CIFAR = partial(_images, size=32, classes=10)
TINY_IMAGENET = partial(_images, size=64, classes=200)
IMAGENET = partial(_images, size=224, classes=1000)


def _features(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randn(batch, 64, 256, generator=generator)
    return inputs, torch.randint(10, (batch,), generator=generator)


def _tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    inputs = torch.randint(1000, (batch, 64), generator=generator)
    return inputs, torch.randint(10, (batch,), generator=generator)


def _next_tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    text = torch.randint(4096, (batch, 65), generator=generator)
    return text[:, :-1].contiguous(), text[:, 1:].contiguous()


def _tagged_tokens(batch: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Sentences of 16 to 64 tokens, padded with token 0, whose target the loss ignores."""
    tokens = torch.randint(1, 5000, (batch, 64), generator=generator)
    tags = torch.randint(17, (batch, 64), generator=generator)
    lengths = torch.randint(16, 65, (batch, 1), generator=generator)
    padding = torch.arange(64) >= lengths
    return tokens.masked_fill(padding, 0), tags.masked_fill(padding, -100)


CASES: dict[str, Case] = {
    case.name: case
    for case in (
        Case(
            "resnet20",
            "ResNet-20 (CIFAR), 3x32x32 images",
            partial(_packaged_model, "resnet20"),
            CIFAR,
            batch=64,
            layouts=IMAGE_LAYOUTS,
        ),
        Case(
            "vgg16_bn",
            "VGG16 with BatchNorm (CIFAR), 3x32x32 images",
            partial(_packaged_model, "vgg16_bn"),
            CIFAR,
            batch=64,
            layouts=IMAGE_LAYOUTS,
        ),
        Case(
            "resnet50",
            "ResNet-50 (torchvision), 3x224x224 images, 1000 classes",
            resnet50,
            IMAGENET,
            batch=4,
            layouts=IMAGE_LAYOUTS,
            check_inputs=partial(_images, size=32, classes=1000),
        ),
        Case(
            "googlenet",
            "GoogLeNet (torchvision, no auxiliary heads), 3x64x64 images, 200 classes",
            partial(
                torchvision_model,
                "googlenet",
                num_classes=200,
                aux_logits=False,
                init_weights=False,
            ),
            TINY_IMAGENET,
            batch=32,
            layouts=IMAGE_LAYOUTS,
            check_inputs=partial(_images, size=32, classes=200),
        ),
        Case(
            "densenet121",
            "DenseNet-121 (torchvision), 3x64x64 images, 200 classes",
            partial(torchvision_model, "densenet121", num_classes=200),
            TINY_IMAGENET,
            batch=32,
            layouts=IMAGE_LAYOUTS,
            check_inputs=partial(_images, size=32, classes=200),
        ),
        Case(
            "vit_tiny",
            "ViT-Tiny (torchvision), patches of 4x4 of 3x32x32 images",
            vit_tiny,
            CIFAR,
            batch=32,
            layouts=IMAGE_LAYOUTS,
        ),
        Case(
            "seq_mlp",
            "Linear(256, 1024), GELU, Linear(1024, 256) on 64 tokens, mean, head",
            SequenceMLP,
            _features,
            batch=16,
        ),
        Case(
            "transformer",
            "2 pre-norm encoder blocks, 64 tokens, dim 256, 4 heads, vocabulary 1000",
            Transformer,
            _tokens,
            batch=16,
        ),
        Case(
            "gpt",
            "4 causal blocks, 64 tokens, dim 256, 4 heads, learned positions, tied head of 4096",
            CausalLM,
            _next_tokens,
            batch=8,
        ),
        Case(
            "lstm_tagger",
            "Embedding, bidirectional 2-layer LSTM(128, 256), a tag a token, padding ignored",
            Tagger,
            _tagged_tokens,
            batch=16,
        ),
    )
}
