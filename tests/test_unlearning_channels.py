"""Channel masks: found, scored and zeroed as the definitions say, equal to slow references."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from fastfisher.masking import Channels, Mask, channel_mask_
from fastfisher.models import build
from fastfisher.unlearning import channels as channels_module
from fastfisher.unlearning import grad_mask, unlearn
from fastfisher.unlearning.channels import Layer, find_layers
from fastfisher.unlearning.scores import Scores
from fastfisher.unlearning.tfidf import _pruned, tf_idf

SIZE = 8
CLASSES = 4


class DenseLayer(nn.Module):
    """BatchNorm and ReLU come before the convolution; its features are put before the others."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.conv = nn.Conv2d(inputs, 3, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add three channels."""
        return torch.cat([self.conv(F.relu(self.norm(x))), x], 1)


class DenseNet(nn.Module):
    """Two dense layers, a pooling transition, another dense layer; BatchNorm before the head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1, bias=False)
        self.one, self.two = DenseLayer(4), DenseLayer(7)
        self.norm = nn.BatchNorm2d(10)
        self.squeeze = nn.Conv2d(10, 5, 1)
        self.three = DenseLayer(5)
        self.last = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 1, H, W]``."""
        x = F.relu(self.norm(self.two(self.one(self.stem(x)))))
        x = self.three(F.avg_pool2d(self.squeeze(x), 2))
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def plain() -> nn.Module:
    """Convolutions with bias and without BatchNorm, ReLU in place, a hidden linear layer."""
    return nn.Sequential(
        nn.Conv2d(1, 6, 3), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3, stride=2),
        nn.ReLU(inplace=True), nn.Flatten(), nn.Linear(20, 7), nn.BatchNorm1d(7),
        nn.ReLU(inplace=True), nn.Linear(7, CLASSES),
    )  # fmt: skip


NETS: dict[str, Callable[[], nn.Module]] = {
    "convnet": lambda: build("convnet", num_classes=CLASSES, in_channels=1, image_size=SIZE),
    "resnet20": lambda: build("resnet20", num_classes=CLASSES, in_channels=1),
    "dense": DenseNet,
    "plain": plain,
}


def net(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A net whose norms have seen something, so that each part of them matters."""
    model = NETS[kind]()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
            assert module.running_mean is not None and module.running_var is not None
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
    return model.to(dtype)


def samples(count: int, target: int | None = None, dtype: Any = torch.float64) -> TensorDataset:
    targets = torch.arange(count) % (CLASSES - 1) + 1 if target is None else torch.full((count,), 0)
    return TensorDataset(torch.randn(count, 1, SIZE, SIZE, dtype=dtype), targets)


def state(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same_bits(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    def bits(value: Tensor) -> Tensor:
        return value.contiguous().view(-1).view(torch.uint8)

    return a.keys() == b.keys() and all(torch.equal(bits(a[n]), bits(b[n])) for n in a)


def run(
    model: nn.Module, method: str, forget: Dataset[Any], remain: Dataset[Any] | None, **more: Any
) -> Mask:
    result = unlearn(model, forget, remain, method=method, **{"epochs": 0, "ratio": 0.2, **more})
    assert result.mask is not None
    return result.mask


# What the layers are.


def test_channels_of_a_plain_stack() -> None:
    assert find_layers(net("convnet"), samples(3)) == [
        Layer("0", True, 32, (("1", 0),)),
        Layer("4", True, 64, (("5", 0),)),
        Layer("8", True, 64, (("9", 0),)),
    ]


def test_channels_without_norms_and_of_a_hidden_linear_layer() -> None:
    assert find_layers(net("plain"), samples(3)) == [
        Layer("0", True, 6, ()),
        Layer("2", True, 5, ()),
        Layer("5", False, 7, (("6", 0),)),
    ]


def test_channels_of_a_residual_net() -> None:
    layers = {layer.name: layer for layer in find_layers(net("resnet20"), samples(3))}
    assert len(layers) == 21  # 19 convolutions and two shortcuts, not the classifier
    assert layers["6.conv2"].norms == (("6.bn2", 0),)
    assert layers["6.shortcut.0"] == Layer("6.shortcut.0", True, 32, (("6.shortcut.1", 0),))


def test_channels_of_a_dense_net_are_slices_of_the_norms_that_follow() -> None:
    # The newest features come first, so that the older ones move on in each following norm.
    assert find_layers(net("dense"), samples(3)) == [
        Layer("stem", True, 4, (("one.norm", 0), ("two.norm", 3), ("norm", 6))),
        Layer("one.conv", True, 3, (("two.norm", 0), ("norm", 3))),
        Layer("two.conv", True, 3, (("norm", 0),)),
        Layer("squeeze", True, 5, (("three.norm", 0), ("last", 3))),
        Layer("three.conv", True, 3, (("last", 0),)),
    ]


class Pooled(nn.Module):
    """Two convolutions that meet, past pooling and dropout, in one norm; the new one comes last."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Conv2d(1, 2, 3, padding=1)
        self.b = nn.Conv2d(2, 3, 3, padding=1)
        self.rest = nn.Sequential(nn.MaxPool2d(2), nn.Dropout2d(), nn.BatchNorm2d(6))
        self.head = nn.Linear(6, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 1, H, W]``; the image itself is a channel of nobody's."""
        a = self.a(x)
        joined = torch.cat(tensors=(x, a, self.b(F.relu(a))), dim=-3)
        return self.head(self.rest(joined).mean((2, 3)))


def test_channels_pass_pooling_dropout_and_concatenation() -> None:
    assert find_layers(Pooled().double(), samples(3)) == [
        Layer("a", True, 2, (("rest.2", 1),)),
        Layer("b", True, 3, (("rest.2", 3),)),
    ]


class Ensemble(nn.Module):
    """Two heads, one of them frozen and convolutional, on a trunk with a norm after a write."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Conv2d(1, CLASSES, 3)
        self.norm = nn.BatchNorm2d(CLASSES)
        self.unused = nn.Linear(3, 3)
        self.a = nn.Linear(CLASSES, CLASSES)
        self.b = nn.Conv2d(CLASSES, CLASSES, 1).requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 1, H, W]``; the hidden layer is as wide as there are classes."""
        x = self.norm(self.trunk(x.add_(1)).relu_())
        return self.a(x.mean((2, 3))) + self.b(x).mean((2, 3))


def test_what_makes_the_logits_is_no_channel_and_a_rectified_one_has_no_norm() -> None:
    model = Ensemble().double()
    assert find_layers(model, samples(3)) == [Layer("trunk", True, CLASSES, ())]
    model.requires_grad_(False)
    assert find_layers(model, samples(3)) == [Layer("trunk", True, CLASSES, ())]


def shared() -> nn.Module:
    model = net("plain")
    model.add_module("more", nn.Linear(CLASSES, CLASSES))
    model.add_module("twin", nn.Linear(CLASSES, CLASSES))
    model.add_module("end", nn.Linear(CLASSES, CLASSES))
    model.twin.weight = model.more.weight
    return model.double()


def twice() -> nn.Module:
    layer = nn.Conv2d(1, 1, 3, padding=1)
    return nn.Sequential(layer, layer, nn.Flatten(), nn.Linear(SIZE**2, CLASSES)).double()


def norm_twice() -> nn.Module:
    norm = nn.BatchNorm2d(2)
    return nn.Sequential(
        nn.Conv2d(1, 2, 1), norm, nn.Conv2d(2, 2, 1), norm, nn.Flatten(),
        nn.Linear(2 * SIZE**2, CLASSES),
    ).double()  # fmt: skip


def computed() -> nn.Module:
    model = net("convnet")
    torch.nn.utils.parametrizations.weight_norm(model[0])
    return model.double()


def positions() -> nn.Module:
    return nn.Sequential(
        nn.Flatten(1, 2), nn.Linear(SIZE, 5), nn.Flatten(), nn.Linear(5 * SIZE, CLASSES)
    ).double()


def only_head() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, CLASSES)).double()


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "shared": (shared, "model: layers 'more' and 'twin' share"),
    "twice": (twice, "model: layer '0' runs 2 times"),
    "norm twice": (norm_twice, "model: norm '1' runs 2 times"),
    "computed": (computed, "model: layer '0' has no weight of its own"),
    "positions": (positions, r"model: layer '1' maps one sample to \(1, 8, 5\)"),
    "only a head": (only_head, "model: expected convolutions or hidden linear"),
}


@pytest.mark.parametrize("case", REFUSED)
@pytest.mark.parametrize("method", ["activation-mask", "grad-mask", "tf-idf", "random-mask"])
def test_a_model_whose_channels_cannot_be_told_is_refused(case: str, method: str) -> None:
    make, message = REFUSED[case]
    model = make()
    before = state(model)
    with pytest.raises(ValueError, match=message):
        run(model, method, samples(4, 0), samples(4), granularity="channel")
    assert same_bits(state(model), before)


# Activations.


def outputs_of(model: nn.Module, image: Tensor) -> dict[str, Tensor]:
    """What each module gives for one image."""
    caught: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(
            lambda _, __, output, name=other: caught.setdefault(name, output.clone())
        )
        for other, module in model.named_modules()
        if other
    ]
    model(image[None])
    for handle in handles:
        handle.remove()
    return caught


def response(model: nn.Module, name: str, caught: dict[str, Tensor]) -> Tensor:
    """ReLU(norm(layer)) of one image, averaged over positions; by hand where features are shared.

    The norm that follows is always the module called next, but in the dense net.
    """
    modules = dict(model.named_modules())
    output = caught[name]
    if isinstance(model, DenseNet):
        norm, start = {
            "stem": (model.one.norm, 0),
            "one.conv": (model.two.norm, 0),
            "two.conv": (model.norm, 0),
            "squeeze": (model.three.norm, 0),
            "three.conv": (model.last, 0),
        }[name]
        if name == "squeeze":
            output = F.avg_pool2d(output, 2)
        scale = norm.weight / (norm.running_var + norm.eps).sqrt()
        shift = norm.bias - scale * norm.running_mean
        part = slice(start, start + output.shape[1])
        output = output * scale[part, None, None] + shift[part, None, None]
    else:
        after = list(modules)[list(modules).index(name) + 1]
        if "conv" in name:
            after = name.replace("conv", "bn")
        if isinstance(modules[after], nn.BatchNorm1d | nn.BatchNorm2d):
            output = caught[after]
    output = output.clamp(min=0)
    return (output.mean((2, 3)) if output.dim() == 4 else output)[0].detach()


def top(scores: dict[str, Tensor], ratio: float) -> dict[str, Tensor]:
    """The share of all channels with the highest score, by sorting."""
    order = sorted(
        (
            (float(value), name, j)
            for name, values in scores.items()
            for j, value in enumerate(values)
        ),
        reverse=True,
    )
    chosen = {name: torch.zeros(len(values), dtype=torch.bool) for name, values in scores.items()}
    for _, name, j in order[: math.floor(ratio * len(order))]:
        chosen[name][j] = True
    return chosen


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("definition", ["recommended", "paper", "authors"])
@pytest.mark.parametrize("remaining", [True, False])
def test_activation_mask_equals_one_image_at_a_time(
    kind: str, definition: str, remaining: bool
) -> None:
    model = net(kind).eval()
    forget, remain = samples(7, 0), samples(10) if remaining else None
    layers = find_layers(model, forget)
    scores: dict[str, Tensor] = {}
    for sign, dataset in ((1, forget), (-1, remain)):
        if dataset is not None:
            # The authors divide by the number of batches, here of 4.
            count = math.ceil(len(dataset) / 4) if definition == "authors" else len(dataset)
            seen = [outputs_of(model, image) for image, _ in dataset]
            for layer in layers:
                total = sum(response(model, layer.name, caught) for caught in seen)
                old = scores.get(layer.name, torch.zeros(layer.channels).double())
                scores[layer.name] = old + sign * total / count
    before = state(model)
    mask = run(
        model, "activation-mask", forget, remain, batch_size=4, options={"definition": definition}
    )
    chosen = top(scores, 0.2)
    assert mask.k == sum(int(c.sum()) for c in chosen.values()) > 2
    assert mask.threshold == pytest.approx(
        min(float(scores[n][c].min()) for n, c in chosen.items() if c.any()), rel=1e-12
    )
    expected = {name: value.clone() for name, value in before.items()}
    for layer in layers:
        own = chosen[layer.name]
        expected[f"{layer.name}.weight"][own] = 0
        if f"{layer.name}.bias" in expected:
            expected[f"{layer.name}.bias"][own] = 0
        norms = {"recommended": layer.norms, "paper": (), "authors": layer.norms[:1]}[definition]
        for norm, start in norms:
            for part in ("weight", "bias", "running_mean", "running_var"):
                expected[f"{norm}.{part}"][start : start + layer.channels][own] = 0
    assert same_bits(state(model), expected)
    mask.undo_(model)
    assert same_bits(state(model), before)


def test_a_channel_that_is_masked_whole_is_silent_and_by_the_paper_it_is_not() -> None:
    image = samples(1)[0][0]
    for definition, silent in (("recommended", True), ("authors", True), ("paper", False)):
        model = net("convnet").eval()
        mask = run(
            model, "activation-mask", samples(7, 0), samples(9), options={"definition": definition}
        )
        chosen = mask.as_dict()["4.weight"].flatten(1).any(1)
        assert chosen.any()
        assert bool((response(model, "4", outputs_of(model, image))[chosen] == 0).all()) == silent


def test_methods_share_one_remembered_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passes = []
    compute = channels_module._activation_sums

    def counted(*arguments: Any) -> dict[str, Tensor]:
        passes.append(arguments)
        return compute(*arguments)

    monkeypatch.setattr(channels_module, "_activation_sums", counted)
    model, forget, remain = net("convnet"), samples(6, 0), samples(9)
    masks = []
    for method in ("activation-mask", "tf-idf", "activation-mask"):
        mask = run(model, method, forget, remain, scores=Scores(tmp_path))
        mask.undo_(model)
        masks.append(mask.as_dict())
    assert len(passes) == 2
    assert all(torch.equal(masks[0][name], masks[2][name]) for name in masks[0])


# TF-IDF.

# Three classes, four channels, of which the last is silent on class 0.
MEANS = torch.tensor([[4.0, 2.0, 2.0, 0.0], [8.0, 1.0, 1.0, 2.0], [6.0, 0.0, 3.0, 3.0]])


def test_tf_idf_by_hand() -> None:
    # Averages over channels are 2, 3, 3: channel 0 reaches them in 3 classes, 1 in class 0 only,
    # 2 in classes 0 and 2, 3 in class 2.
    expected = [
        4 / 8 * math.log(4 / 4), 2 / 8 * math.log(4 / 2), 2 / 8 * math.log(4 / 3), 0.0,
    ]  # fmt: skip
    everywhere = torch.ones(3, dtype=torch.bool)
    got = tf_idf(MEANS.double(), everywhere, 0, "paper")
    assert got.tolist() == pytest.approx(expected, rel=1e-15)
    # Averages over classes are 6, 1, 2, 5/3: reached in 2, 2, 2 and 2 classes.
    expected = [4 / 8 * math.log(3 / 3), 2 / 8 * math.log(3 / 3), 2 / 8 * math.log(3 / 3), 0.0]
    assert tf_idf(MEANS.double(), everywhere, 0, "code").tolist() == pytest.approx(expected)
    # Of class 1, when class 2 is not in the sample: of two classes with averages 2 and 3.
    few = torch.tensor([True, True, False])
    means = MEANS.double() * few[:, None]
    expected = [
        8 / 12 * math.log(3 / 3), 1 / 12 * math.log(3 / 2), 1 / 12 * math.log(3 / 2),
        2 / 12 * math.log(3 / 1),
    ]  # fmt: skip
    assert tf_idf(means, few, 1, "paper").tolist() == pytest.approx(expected, rel=1e-15)
    # The code counts the empty class: averages 4, 1, 1, 2/3, reached in 2, 2, 2 and 1 of 3.
    expected = [0.0, 0.0, 0.0, 2 / 12 * math.log(3 / 2)]
    assert tf_idf(means, few, 1, "code").tolist() == pytest.approx(expected, abs=1e-15)
    assert tf_idf(means, few, 2, "code").tolist() == [0.0] * 4  # a silent layer, not 0 / 0


class Readout(nn.Module):
    """A 1 x 1 convolution of the image's channels, one to one, so that activations are inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(4, 4, 1)
        self.norm = nn.BatchNorm2d(4)
        self.hidden = nn.Linear(4, 3)
        self.head = nn.Linear(3, 3)
        with torch.no_grad():
            self.conv.weight.copy_(torch.eye(4)[:, :, None, None])
            self.conv.bias.zero_()

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[N, 4, H, W]``."""
        return self.head(self.hidden(self.norm(self.conv(x)).mean((2, 3))))


@pytest.mark.parametrize(
    ("options", "pruned"),
    [
        # By hand above: 0, .173, .072, 0 by the printed IDF.
        ({}, [1]),
        ({"direction": "lowest"}, [0]),
        ({"definition": "authors", "idf": "paper", "batches": 0, "direction": "highest"}, [1, 2]),
        # The code keeps what scores above the third highest of the four, which is 0 twice.
        ({"definition": "authors", "idf": "paper", "batches": 0}, [0, 3]),
        # By the code's IDF every channel scores 0, and is equal to the last that is kept.
        ({"definition": "authors", "batches": 0}, [0, 1, 2, 3]),
    ],
)
def test_tf_idf_prunes_in_both_directions(options: dict[str, Any], pruned: list[int]) -> None:
    # Two images a class, of 2 x 2 pixels, whose means are MEANS; rectified before the mean.
    noise = torch.tensor([[1.0, -1.0], [-1.0, 1.0]]).view(2, 1, 1, 2, 1).expand(2, 1, 1, 2, 2) / 2
    images = MEANS[None, :, :, None, None] + noise * (MEANS[None, :, :, None, None] > 0)
    images = torch.where(MEANS[None, :, :, None, None] > 0, images, -1.0).transpose(0, 1)
    forget = TensorDataset(images[0], torch.tensor([0, 0]))
    remain = TensorDataset(images[1:].flatten(0, 1), torch.tensor([1, 1, 2, 2]))
    model = Readout()
    before = state(model)
    mask = run(model, "tf-idf", forget, remain, options=options, ratio=0.25)
    assert mask.as_dict().keys() == {"conv.weight", "conv.bias"}  # no norm, no linear layer
    assert mask.as_dict()["conv.bias"].nonzero()[:, 0].tolist() == pruned
    assert mask.as_dict()["conv.weight"].flatten(1).all(1).nonzero()[:, 0].tolist() == pruned
    mask.undo_(model)
    assert same_bits(state(model), before)


def test_the_pruner_of_the_code_skips_narrow_layers_and_takes_one_more() -> None:
    scores = torch.arange(64.0)
    assert int(_pruned(scores, 0.02).sum()) == 64 - int(64 * 0.98) + 1 == 3
    assert int(_pruned(scores[:49], 0.02).sum()) == 0
    assert bool(_pruned(scores, 1.0).all())


def test_tf_idf_draws_batches_by_the_seed_and_needs_the_class_in_them() -> None:
    model, forget, remain = net("convnet"), samples(3, 0), samples(60)
    masks, failures = [], 0
    for seed in (0, 1, 2, 3, 4, 5, 6, 7, 0):
        try:
            mask = run(
                model, "tf-idf", forget, remain, options={"batches": 2}, batch_size=8, seed=seed
            )
        except ValueError as error:
            assert str(error).startswith("options.batches: 2 batches have no sample of the class")
            failures += 1
        else:
            mask.undo_(model)
            masks.append(torch.cat([m.flatten(1).all(1) for m in mask.as_dict().values()]))
    assert 0 < failures < 8
    assert len({tuple(mask.tolist()) for mask in masks}) > 1


# Integrated gradients.


def attribution(
    model: nn.Module, name: str, image: Tensor, label: int, target: str, points: list[Any]
) -> Tensor:
    """Of one image, a point at a time: sum over points of weight * (a - a_0) * gradient."""
    module = model.get_submodule(name)

    def output_for(x: Tensor) -> Tensor:
        caught = []
        handle = module.register_forward_hook(lambda _, __, o: caught.append(o.detach().clone()))
        model(x[None])
        handle.remove()
        return caught[0]

    start, end = output_for(torch.zeros_like(image)), output_for(image)
    total = torch.zeros_like(end)
    for alpha, weight in points:
        place = (start + alpha * (end - start)).requires_grad_()
        handle = module.register_forward_hook(lambda _, __, ___, place=place: place.clone())
        logits = model(image[None])
        handle.remove()
        value = logits[0, label] if target == "logit" else -logits.log_softmax(1)[0, label]
        total += weight * (end - start) * torch.autograd.grad(value, place)[0]
    return (total.mean((2, 3)) if total.dim() == 4 else total)[0]


@pytest.mark.parametrize("kind", NETS)
@pytest.mark.parametrize("definition", ["authors", "paper"])
def test_grad_mask_equals_one_image_and_step_at_a_time(kind: str, definition: str) -> None:
    model = net(kind).eval()
    forget, steps = samples(3, 0), 3
    if definition == "paper":
        points = [((k + 1) / steps, 1 / steps) for k in range(steps)]
    else:
        points = [
            ((1 + float(x)) / 2, float(w) / 2)
            for x, w in zip(*np.polynomial.legendre.leggauss(steps), strict=True)
        ]
    target = "loss" if definition == "paper" else "logit"
    layers = find_layers(model, forget)
    scores = {
        layer.name: sum(
            attribution(model, layer.name, image, int(label), target, points)
            for image, label in forget
        )
        / len(forget)
        for layer in layers
    }
    # Batches of 2 leave one image alone, which then shares its passes between steps.
    got = grad_mask.integrated_gradients(
        model, layers, forget, target=target, steps=steps, batch_size=2,
        quadrature="riemann" if definition == "paper" else "gauss-legendre",
    )  # fmt: skip
    for name, score in scores.items():
        assert torch.allclose(got[name] / 3, score, rtol=1e-10, atol=1e-13), name
    before = state(model)
    mask = run(
        model, "grad-mask", forget, None, batch_size=2,
        options={"definition": definition, "steps": steps},
    )  # fmt: skip
    # What lowers the loss is what raises the logit.
    sign = -1 if definition == "paper" else 1
    chosen = top({name: sign * score for name, score in scores.items()}, 0.2)
    for name, own in chosen.items():
        assert torch.equal(mask.as_dict()[f"{name}.weight"].flatten(1).all(1), own)
    norms = {part for layer in layers for part, _ in layer.norms[:1]}
    masked = {name for name in before if name in mask.as_dict() and "running_var" in name}
    assert masked == (set() if definition == "paper" else {f"{n}.running_var" for n in norms})
    mask.undo_(model)
    assert same_bits(state(model), before)


def test_attributions_add_up_to_the_difference_of_the_logits() -> None:
    # Completeness (Sundararajan et al., proposition 1), of a layer without a skip path.
    model = net("convnet").eval()
    forget = samples(4, 0)
    layers = find_layers(model, forget)
    got = grad_mask.integrated_gradients(
        model, layers, forget, target="logit", quadrature="gauss-legendre", steps=400, batch_size=64
    )
    images, labels = forget.tensors
    difference = model(images) - model(torch.zeros_like(images))
    expected = difference.gather(1, labels[:, None]).sum().item()
    # Means over positions, of which the layers have 64, 16 and 4.
    for layer, places in zip(layers, (64, 16, 4), strict=True):
        assert float(got[layer.name].sum()) * places == pytest.approx(expected, rel=0.02)


def test_grad_mask_leaves_no_trace_and_takes_a_sample_by_the_seed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = net("plain").train()
    model[0].weight.requires_grad_(False)
    forget = samples(20, 0)
    seen = []
    compute = grad_mask.integrated_gradients

    def noted(model: nn.Module, layers: Any, dataset: Any, **more: Any) -> dict[str, Tensor]:
        seen.append(torch.stack([image for image, _ in dataset]))
        return compute(model, layers, dataset, **more)

    monkeypatch.setattr(grad_mask, "integrated_gradients", noted)
    options = {"steps": 2, "samples": 5}
    for seed in (0, 0, 1):
        run(model, "grad-mask", forget, None, options=options, seed=seed).undo_(model)
    run(model, "grad-mask", forget, None, options={"steps": 2, "samples": 99})
    assert [len(images) for images in seen] == [5, 5, 5, 20]
    assert torch.equal(seen[0], seen[1]) and not torch.equal(seen[0], seen[2])
    assert all(module.training for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())
    assert [p.requires_grad for p in model.parameters()][:2] == [False, True]
    assert all(p.grad is None for p in model.parameters())


# Random channels, and what all channel masks have in common.


def test_random_channels_are_a_uniform_draw_by_the_seed() -> None:
    model, forget = net("plain"), samples(2, 0)
    before = state(model)
    drawn = torch.zeros(18)
    for seed in range(60):
        mask = run(model, "random-mask", forget, None, granularity="channel", seed=seed, ratio=0.5)
        assert (mask.k, mask.units, mask.granularity, mask.threshold) == (9, 18, "channel", None)
        parts = mask.as_dict()
        rows = [parts[f"{name}.weight"].flatten(1).any(1) for name in ("0", "2", "5")]
        drawn += torch.cat(rows)
        assert torch.equal(parts["6.running_var"], rows[2])
        mask.undo_(model)
    assert same_bits(state(model), before)
    # Each is drawn with probability 1/2: five standard deviations of a binomial of 60.
    assert bool(((drawn - 30).abs() < 5 * math.sqrt(15)).all())


def test_fisher_mask_refuses_channels_before_it_scores() -> None:
    model = net("plain")
    with pytest.raises(ValueError, match="granularity: 'fisher-mask' scores parameters or kernels"):
        run(model, "fisher-mask", samples(2, 0), samples(2), granularity="channel")


@pytest.mark.parametrize("method", ["activation-mask", "random-mask", "grad-mask", "tf-idf"])
def test_exclusions_and_scope_hold_for_channels(method: str) -> None:
    model, forget, remain = net("dense"), samples(4, 0), samples(5)
    mask = run(
        model, method, forget, remain, granularity="channel", ratio=0.34, scope="layer",
        exclude=["one.conv.*", "squeeze.bias", "last.*"], **(
            {"options": {"steps": 2}} if method == "grad-mask" else {}
        ),
    )  # fmt: skip
    assert mask.counts == {
        "stem.weight": 1, "two.conv.weight": 1, "squeeze.weight": 1, "three.conv.weight": 1,
    }  # fmt: skip
    assert not {"one.conv.weight", "squeeze.bias", "last.bias"} & mask.as_dict().keys()
    assert len(mask.groups) == 4


@pytest.mark.parametrize(
    ("method", "options", "error", "message"),
    [
        ("activation-mask", {"definition": "original"}, ValueError, "options.definition: expected"),
        ("tf-idf", {"definition": "recommended"}, ValueError, "options.definition: expected"),
        ("tf-idf", {"direction": "up"}, ValueError, "options.direction: expected one of"),
        ("tf-idf", {"idf": "log"}, ValueError, "options.idf: expected one of"),
        ("tf-idf", {"batches": -1}, ValueError, "options.batches: must be at least 0"),
        ("tf-idf", {"batches": 1.5}, TypeError, "options.batches: expected an integer"),
        ("grad-mask", {"definition": "original"}, ValueError, "options.definition: expected"),
        ("grad-mask", {"target": "probability"}, ValueError, "options.target: expected one of"),
        ("grad-mask", {"quadrature": "simpson"}, ValueError, "options.quadrature: expected one"),
        ("grad-mask", {"steps": 0}, ValueError, "options.steps: must be at least 1"),
        ("grad-mask", {"samples": 0}, ValueError, "options.samples: must be at least 1"),
    ],
)
def test_bad_options_are_refused(
    method: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        run(net("plain"), method, samples(2, 0), samples(2), options=options)


def test_tf_idf_refuses_what_it_cannot_forget() -> None:
    with pytest.raises(ValueError, match=r"forget_set: 'tf-idf' forgets one class, got .*\[1, 2\]"):
        run(net("plain"), "tf-idf", samples(2), samples(3))
    with pytest.raises(ValueError, match="remain_set: expected a data set, got None"):
        run(net("plain"), "tf-idf", samples(2, 0), None)
    linear = nn.Sequential(nn.Flatten(), nn.Linear(SIZE**2, 3), nn.ReLU(), nn.Linear(3, CLASSES))
    with pytest.raises(ValueError, match="model: 'tf-idf' prunes convolutions"):
        run(linear.double(), "tf-idf", samples(2, 0), samples(3))


def test_a_target_that_is_no_class_is_refused() -> None:
    model = net("plain")
    bad = TensorDataset(samples(2).tensors[0], torch.tensor([1, CLASSES]))
    with pytest.raises(ValueError, match=r"a target is not in 0\.\.3"):
        channels_module._activation_sums(model, find_layers(model, bad), bad, 2)


# The mask itself.


def channel_mask(model: nn.Module) -> Mask:
    """Every second channel, starting with the second, of the first layers."""
    dtype = next(model.parameters()).dtype
    layers = find_layers(model, samples(1, dtype=dtype))
    owned = [layer.owned(model, "all norms") for layer in layers]
    scores = [(torch.arange(layer.channels) % 2).float() for layer in layers]
    return channel_mask_(model, owned, scores, ratio=0.3)


@pytest.mark.parametrize("kind", NETS)
def test_a_saved_channel_mask_restores_every_bit(kind: str, tmp_path: Path) -> None:
    model = net(kind, torch.float32)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.view(-1)[0], tensor.view(-1)[1] = -0.0, math.nan
    before = state(model)
    mask = channel_mask(model)
    assert not same_bits(state(model), before)
    masked = state(model)
    mask.save(tmp_path / "mask")
    loaded = Mask.load(tmp_path / "mask")
    assert repr(loaded) == repr(mask)
    assert (loaded.counts, loaded.groups) == (mask.counts, mask.groups)
    loaded.undo_(model)
    assert same_bits(state(model), before)
    loaded.apply_(model)
    assert same_bits(state(model), masked)
    with pytest.raises(ValueError, match="has no parameter"):
        loaded.undo_(nn.Linear(2, 2))


def test_equal_scores_go_to_the_first_channels_of_the_model() -> None:
    model = net("plain")
    owned = [layer.owned(model, "layer") for layer in find_layers(model, samples(1))]
    mask = channel_mask_(
        model, owned[::-1], [torch.ones(7), torch.ones(5), torch.ones(6)], ratio=0.4
    )
    assert mask.counts == {"0.weight": 6, "2.weight": 1, "5.weight": 0}
    assert mask.as_dict()["2.bias"].tolist() == [True, False, False, False, False]


def bad(**changes: Any) -> dict[str, Any]:
    return changes


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (bad(ratio=1.5), "ratio must"),
        (bad(channels=[Channels("0.weights")]), "no weight '0.weights'"),
        (bad(channels=[Channels("0.weight")] * 2, scores=[torch.ones(6)] * 2), "named twice"),
        (bad(scores=[torch.ones(5)]), "expected one for each of 6 channels"),
        (bad(scores=[torch.full((6,), math.nan)]), "score of '0.weight' is NaN"),
        (bad(exclude=["0.weight"]), "no channel is left"),
        (bad(exclude=["9.*"]), "matches no parameter"),
        (bad(scope="row"), "scope must"),
        (bad(channels=[Channels("0.weight", (("6.bias", 2),))]), "'6.bias' of 8 channels"),
        (bad(channels=[Channels("0.weight", (("6.scale", 0),))]), "'6.scale' of 6 channels"),
        (bad(channels=[Channels("0.weight", (("6.num_batches_tracked", 0),))]), "of 6 channels"),
    ],
)
def test_bad_input_to_channel_mask_modifies_nothing(changes: dict[str, Any], message: str) -> None:
    model = net("plain")
    before = state(model)
    arguments = {"channels": [Channels("0.weight")], "scores": [torch.ones(6)], "ratio": 0.5}
    with pytest.raises(ValueError, match=message):
        channel_mask_(model, **{**arguments, **changes})
    assert same_bits(state(model), before)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.update(groups=[["0.weight", "0.weight"]]), "groups must be lists"),
        (lambda d: d.update(groups=[["1.weight"]]), "groups must be lists"),
        (lambda d: d.update(granularity="kernel"), "groups must be lists"),
        (lambda d: d["shapes"].update({"0.weight": [3, 1, 3, 6]}), "splits a unit"),
    ],
)
def test_a_malformed_file_of_channels_is_refused(
    change: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "mask"
    channel_mask(net("plain")).save(path)
    with safe_open(path, framework="pt") as file:
        header = dict(file.metadata())
    fields = json.loads(header["mask"])
    change(fields)
    save_file(load_file(path), path, {**header, "mask": json.dumps(fields)})
    with pytest.raises(ValueError, match=message):
        Mask.load(path)


def test_what_follows_from_a_definition_is_written_down() -> None:
    model = net("plain")
    result = unlearn(
        model, samples(2, 0), samples(20), method="tf-idf", epochs=0,
        options={"definition": "authors", "batches": 0},
    )  # fmt: skip
    assert result.config["options"] == {
        "definition": "authors", "direction": "lowest", "idf": "code", "batches": 0,
    }  # fmt: skip
