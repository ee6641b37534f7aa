"""Data sets are read as they are on disk, split without loss, and batched in full."""

from __future__ import annotations

import os
import pickle
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, TensorDataset

from fastfisher.data import (
    NormalisedImages,
    batches,
    load_dataset,
    load_object,
    split_forget,
    subset,
    targets_of,
)

CIFAR10_MEAN = torch.tensor([0.4914, 0.4822, 0.4465]).view(3, 1, 1)
CIFAR10_STD = torch.tensor([0.2023, 0.1994, 0.2010]).view(3, 1, 1)


class Plain(Dataset[tuple[Tensor, int]]):
    """A data set that only has items and a length."""

    def __init__(self, labels: list[int]) -> None:
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if not isinstance(index, int):
            raise TypeError("one item at a time")
        return torch.full((2,), float(index)), self.labels[index]


def labelled(labels: list[int]) -> TensorDataset:
    return TensorDataset(torch.arange(float(len(labels))).view(-1, 1), torch.tensor(labels))


def cifar10_batches() -> list[tuple[np.ndarray[Any, Any], list[int]]]:
    """Five training batches and the test batch, 2 to 7 images each, pixels all different."""
    random = np.random.default_rng(0)
    sizes = [2, 3, 4, 5, 6, 7]
    return [
        (random.integers(0, 256, (n, 3072), dtype=np.uint8), random.integers(0, 10, n).tolist())
        for n in sizes
    ]


def write_cifar10_binary(root: Path) -> Path:
    folder = root / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}.bin" for i in range(1, 6)] + ["test_batch.bin"]
    for name, (pixels, labels) in zip(names, cifar10_batches(), strict=True):
        records = np.concatenate([np.array(labels, np.uint8)[:, None], pixels], axis=1)
        (folder / name).write_bytes(records.tobytes())
    return folder


def write_cifar10_python(root: Path) -> Path:
    folder = root / "cifar-10-batches-py"
    folder.mkdir(parents=True)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    for name, (pixels, labels) in zip(names, cifar10_batches(), strict=True):
        with open(folder / name, "wb") as file:
            pickle.dump({"data": pixels, "labels": labels}, file, protocol=2)
    return folder


def test_cifar10_binary_and_python_layouts_give_the_written_pixels(tmp_path: Path) -> None:
    write_cifar10_binary(tmp_path / "binary")
    write_cifar10_python(tmp_path / "python")
    binary = load_dataset("cifar10", tmp_path / "binary")
    python = load_dataset("cifar10", str(tmp_path / "python"))
    written = cifar10_batches()
    for part, parts in (("train", written[:5]), ("test", written[5:])):
        pixels = torch.from_numpy(np.concatenate([p for p, _ in parts]))
        # Each row is the red plane, then green, then blue.
        images = pixels.view(-1, 3, 32, 32).float() / 255
        expected = (images - CIFAR10_MEAN) / CIFAR10_STD
        for bundle in (binary, python):
            got_images, got_labels = getattr(bundle, part).tensors
            assert got_images.dtype == torch.float32
            assert got_labels.dtype == torch.int64
            torch.testing.assert_close(got_images, expected, rtol=0, atol=1e-6)
            assert got_labels.tolist() == [label for _, labels in parts for label in labels]
        assert torch.equal(getattr(binary, part).tensors[0], getattr(python, part).tensors[0])
    assert (binary.num_classes, binary.in_channels, binary.image_size) == (10, 3, 32)
    assert binary.class_names[0] == "airplane"


def test_cifar10_truncated_file_is_an_error(tmp_path: Path) -> None:
    path = write_cifar10_binary(tmp_path) / "data_batch_3.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"data_batch_3\.bin: not a CIFAR-10 file"):
        load_dataset("cifar10", tmp_path)


def test_cifar10_label_out_of_range_is_an_error(tmp_path: Path) -> None:
    path = write_cifar10_binary(tmp_path) / "test_batch.bin"
    path.write_bytes(b"\x0a" + path.read_bytes()[1:])
    with pytest.raises(ValueError, match=r"a label is not in 0\.\.9"):
        load_dataset("cifar10", tmp_path)


def test_missing_file_of_a_folder_is_named(tmp_path: Path) -> None:
    (write_cifar10_binary(tmp_path) / "data_batch_2.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"data_batch_2\.bin"):
        load_dataset("cifar10", tmp_path)


class Explosive:
    """Runs a command when it is unpickled by an unguarded reader."""

    def __reduce__(self) -> Any:
        return os.mkdir, ("exploded",)


def test_a_pickle_that_runs_code_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = write_cifar10_python(tmp_path)
    (folder / "data_batch_1").write_bytes(pickle.dumps({"data": Explosive()}, protocol=2))
    with pytest.raises(ValueError, match="mkdir has no place in a data file"):
        load_dataset("cifar10", tmp_path)
    assert not (tmp_path / "exploded").exists()


def test_cifar100_uses_fine_labels_and_their_names(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-100-python"
    folder.mkdir()
    pixels = np.zeros((2, 3072), np.uint8)
    for name in ("train", "test"):
        content = {"data": pixels, "fine_labels": [99, 1], "coarse_labels": [0, 0]}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class {i}" for i in range(100)]
    (folder / "meta").write_bytes(pickle.dumps({"fine_label_names": names}, protocol=2))
    bundle = load_dataset("cifar100", tmp_path)
    assert bundle.num_classes == 100
    assert bundle.class_names[99] == "class 99"
    assert targets_of(bundle.train).tolist() == [99, 1]


def write_idx(path: Path, values: np.ndarray[Any, Any]) -> None:
    header = struct.pack(">BBBB", 0, 0, 8, values.ndim) + struct.pack(
        f">{values.ndim}I", *values.shape
    )
    path.write_bytes(header + values.tobytes())


@pytest.mark.parametrize(
    ("name", "folder", "mean", "std"),
    [("mnist", "MNIST", 0.1307, 0.3081), ("fashion-mnist", "FashionMNIST", 0.2860, 0.3530)],
)
def test_mnist_files_are_read_padded_and_normalised(
    tmp_path: Path, name: str, folder: str, mean: float, std: float
) -> None:
    raw = tmp_path / folder / "raw"
    raw.mkdir(parents=True)
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (3, 28, 28), dtype=np.uint8)
    for part in ("train", "t10k"):
        write_idx(raw / f"{part}-images-idx3-ubyte", pixels)
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.array([7, 0, 9], np.uint8))
    plain = load_dataset(name, tmp_path, image_size=28)
    padded = load_dataset(name, tmp_path)
    expected = (torch.from_numpy(pixels).float().div(255).unsqueeze(1) - mean) / std
    torch.testing.assert_close(plain.train.tensors[0], expected, rtol=0, atol=1e-6)
    images = padded.test.tensors[0]
    assert images.shape == (3, 1, 32, 32)
    torch.testing.assert_close(images[:, :, 2:-2, 2:-2], expected, rtol=0, atol=1e-6)
    black = torch.tensor(-mean / std)
    torch.testing.assert_close(images[:, :, :2].unique(), black.view(1), rtol=0, atol=1e-6)
    assert targets_of(padded.train).tolist() == [7, 0, 9]


def write_tiny_imagenet(root: Path) -> None:
    from PIL import Image

    folder = root / "tiny-imagenet-200"
    # Scrambled: a file system may list folders in the order they were made, or its reverse.
    for wnid in ("n03", "n01", "n05", "n02", "n06", "n04"):
        colour = (255, 0, 0) if wnid == "n02" else (0, 0, 255)
        images = folder / "train" / wnid / "images"
        images.mkdir(parents=True)
        for i in range(2):
            Image.new("RGB", (64, 64), colour).save(images / f"{wnid}_{i}.JPEG", quality=100)
    (folder / "val" / "images").mkdir(parents=True)
    Image.new("L", (64, 64), 255).save(folder / "val" / "images" / "val_0.JPEG")
    (folder / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn02\t0\t0\t62\t62\n")


@pytest.mark.parametrize("size", [32, 64])
def test_tiny_imagenet_is_resized_and_labelled_by_folder(tmp_path: Path, size: int) -> None:
    write_tiny_imagenet(tmp_path)
    bundle = load_dataset("tiny-imagenet", tmp_path, image_size=size)
    assert bundle.class_names == ("n01", "n02", "n03", "n04", "n05", "n06")
    assert targets_of(bundle.train).tolist() == [0, 0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5]
    assert targets_of(bundle.test).tolist() == [1]
    assert bundle.image_size == size
    image, label = bundle.train[2]
    assert (image.shape, image.dtype, int(label)) == ((3, size, size), torch.float32, 1)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    red = (torch.tensor([1.0, 0.0, 0.0]) - mean) / std
    torch.testing.assert_close(image[:, size // 2, size // 2], red, rtol=0, atol=0.05)
    grey = bundle.test[0][0]
    torch.testing.assert_close(grey[:, 0, 0], (1 - mean) / std)


def test_digits_split_is_fixed_stratified_and_standardised() -> None:
    first, second = load_dataset("digits"), load_dataset("digits")
    images, labels = first.train.tensors
    test_images, test_labels = first.test.tensors
    assert (images.shape, images.dtype) == ((1437, 1, 8, 8), torch.float32)
    assert (test_images.shape, test_labels.dtype) == ((360, 1, 8, 8), torch.int64)
    assert torch.equal(images, second.train.tensors[0])
    assert abs(float(images.mean())) < 1e-5
    assert abs(float(images.std(correction=0)) - 1) < 1e-5
    share = test_labels.bincount() / (test_labels.bincount() + labels.bincount())
    assert float((share - 0.2).abs().max()) < 0.01


@pytest.mark.parametrize("name", ["mnist", "fashion-mnist", "cifar10", "cifar100", "tiny-imagenet"])
def test_missing_data_names_the_root_and_the_folder(tmp_path: Path, name: str) -> None:
    folder = {
        "mnist": "MNIST/raw",
        "fashion-mnist": "FashionMNIST/raw",
        "cifar10": "cifar-10-batches-bin",
        "cifar100": "cifar-100-python",
        "tiny-imagenet": "tiny-imagenet-200",
    }[name]
    with pytest.raises(FileNotFoundError) as caught:
        load_dataset(name, tmp_path / "nowhere")
    assert folder in str(caught.value)
    assert str(tmp_path / "nowhere") in str(caught.value)
    with pytest.raises(ValueError, match="data_root"):
        load_dataset(name)


def test_download_is_asked_for_what_is_missing_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    calls = []

    def fake(root: str, train: bool, download: bool) -> None:
        calls.append((train, download))
        if train:
            write_cifar10_python(Path(root))

    monkeypatch.setattr(torchvision.datasets, "CIFAR10", fake)
    assert len(load_dataset("cifar10", tmp_path, download=True).train) == 20
    assert calls == [(True, True), (False, True)]
    load_dataset("cifar10", tmp_path, download=True)
    assert len(calls) == 2


def test_failed_download_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torchvision.datasets

    def fail(root: str, train: bool, download: bool) -> None:
        raise OSError("no route to host")

    monkeypatch.setattr(torchvision.datasets, "CIFAR100", fail)
    with pytest.raises(ConnectionError, match=r"could not download 'cifar100'.*no route to host"):
        load_dataset("cifar100", tmp_path, download=True)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "imagenet"}, "name: expected one of .*'digits'"),
        ({"name": "digits", "image_size": 32}, "image_size: 'digits'"),
        ({"name": "cifar10", "image_size": 64}, "image_size: 'cifar10'"),
        ({"name": "mnist", "image_size": 30}, "image_size: 'mnist'"),
        ({"name": "tiny-imagenet", "image_size": 0}, "image_size: 'tiny-imagenet'"),
    ],
)
def test_bad_arguments_of_load_dataset(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_dataset(**arguments, data_root="unused")


@pytest.mark.parametrize("make", [labelled, Plain])
def test_split_forget_by_class_is_a_partition_in_order(make: Any) -> None:
    dataset = make([0, 1, 2, 1, 0, 1])
    forget, remain = split_forget(dataset, forget_class=1)
    assert targets_of(forget).tolist() == [1, 1, 1]
    assert targets_of(remain).tolist() == [0, 2, 0]
    assert [float(forget[i][0][0]) for i in range(3)] == [1, 3, 5]
    assert [float(remain[i][0][0]) for i in range(3)] == [0, 2, 4]


def test_split_forget_by_indices() -> None:
    forget, remain = split_forget(labelled([0] * 5), indices=[3, 0])
    assert [float(forget[i][0]) for i in range(len(forget))] == [0, 3]
    assert [float(remain[i][0]) for i in range(len(remain))] == [1, 2, 4]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({}, ValueError, "exactly one"),
        ({"forget_class": 0, "indices": [0]}, ValueError, "exactly one"),
        ({"forget_class": 7}, ValueError, r"no sample of class 7, only of \[0, 1\]"),
        ({"forget_class": "0"}, TypeError, "forget_class"),
        ({"forget_class": True}, TypeError, "forget_class"),
        ({"indices": []}, ValueError, "at least one"),
        ({"indices": [0.5]}, ValueError, "integers"),
        ({"indices": [3]}, ValueError, r"0\.\.2"),
        ({"indices": [-1]}, ValueError, r"0\.\.2"),
        ({"indices": [1, 1]}, ValueError, "twice"),
        ({"indices": [0, 1, 2]}, ValueError, "remain set would be empty"),
    ],
)
def test_split_forget_rejects(
    arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        split_forget(labelled([0, 1, 0]), **arguments)


def test_subset_of_a_subset_refers_to_the_original() -> None:
    dataset = labelled([5, 6, 7, 8])
    inner = subset(subset(dataset, torch.tensor([3, 1, 0])), torch.tensor([2, 0]))
    assert isinstance(inner, Subset)
    assert inner.dataset is dataset
    assert targets_of(inner).tolist() == [5, 8]


def test_targets_attribute_is_preferred_to_reading_items() -> None:
    class Unreadable(Dataset[Any]):
        targets = (2, 1)

    assert targets_of(Unreadable()).tolist() == [2, 1]
    with pytest.raises(TypeError, match="length"):
        targets_of(Dataset())


def all_batches(loader: Any) -> tuple[list[int], Tensor, Tensor]:
    parts = list(loader)
    sizes = [len(inputs) for inputs, _ in parts]
    return sizes, torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])


@pytest.mark.parametrize("make", [labelled, Plain])
def test_batches_hold_every_sample_once_in_order(make: Any) -> None:
    loader = batches(make([0, 1, 2, 3, 4, 5, 6]), 3)
    sizes, inputs, targets = all_batches(loader)
    assert len(loader) == 3
    assert sizes == [3, 3, 1]
    assert inputs[:, 0].tolist() == [0, 1, 2, 3, 4, 5, 6]
    assert targets.tolist() == [0, 1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize("make", [labelled, Plain])
def test_shuffled_batches_follow_the_generator(make: Any) -> None:
    dataset = subset(make(list(range(20))), torch.arange(19, -1, -1))

    def order(seed: int) -> list[int]:
        loader = batches(dataset, 6, shuffle=True, generator=torch.Generator().manual_seed(seed))
        _, inputs, targets = all_batches(loader)
        assert inputs[:, 0].tolist() == targets.tolist()
        return targets.tolist()

    assert order(1) == order(1) != order(2)
    assert sorted(order(1)) == list(range(20))


@pytest.mark.parametrize("make", [labelled, Plain])
def test_unshuffled_batches_leave_the_global_generator_alone(make: Any) -> None:
    before = torch.get_rng_state()
    list(batches(make([0, 1, 2]), 2))
    assert torch.equal(torch.get_rng_state(), before)


def test_images_held_as_bytes_batch_like_floats() -> None:
    images = torch.randint(0, 256, (5, 3, 2, 2), dtype=torch.uint8)
    dataset = NormalisedImages(images, torch.arange(5), (0.5, 0.4, 0.3), (0.1, 0.2, 0.3))
    _, inputs, targets = all_batches(batches(subset(dataset, torch.tensor([4, 0, 2])), 2))
    assert targets.tolist() == [4, 0, 2]
    mean, std = torch.tensor([0.5, 0.4, 0.3]), torch.tensor([0.1, 0.2, 0.3])
    expected = (images[[4, 0, 2]] / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    torch.testing.assert_close(inputs, expected)
    torch.testing.assert_close(dataset[4][0], expected[0])


@pytest.mark.parametrize("size", [0, -1, 1.5, True])
def test_batch_size_must_be_a_positive_integer(size: Any) -> None:
    with pytest.raises(ValueError, match="batch_size"):
        batches(labelled([0]), size)


def test_load_object_finds_modules_in_the_current_directory(tmp_path: Path) -> None:
    (tmp_path / "my_project.py").write_text("class Nets:\n    small = staticmethod(lambda: 42)\n")
    code = "from fastfisher.data import load_object; print(load_object('my_project:Nets.small')())"
    package = Path(__file__).parents[1]
    # -P keeps the current directory off the path: only load_object can add it, as for a command.
    run = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(package)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.stdout == "42\n", run.stderr


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("fastfisher.data", ValueError, "package.module:callable"),
        (":x", ValueError, "package.module:callable"),
        ("fastfisher.no_such:x", ImportError, "fastfisher.no_such"),
        ("fastfisher.data:nothing", AttributeError, "has no 'nothing'"),
        ("fastfisher.data:batches.nothing", AttributeError, "has no 'batches.nothing'"),
    ],
)
def test_load_object_rejects(path: str, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        load_object(path)
