"""Image classification data sets as tensors, the forget/remain split, batches, user objects.

Files are read from ``data_root`` in torchvision's layout; CIFAR-10 also in its binary version.
torchvision and scikit-learn are imported only by the data set that needs them.
"""

from __future__ import annotations

import importlib
import os
import pickle
import sys
from collections.abc import Callable, Iterable, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    SequentialSampler,
    Subset,
    TensorDataset,
)

Sample = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class DataBundle:
    """A data set with what a model builder and a report need to know of it.

    Attributes:
        train: training samples, ``(image [C, H, W] float32, label int64)``.
        test: test samples, the same.
        num_classes: labels are ``0 .. num_classes - 1``.
        in_channels: C.
        image_size: H and W, in pixels.
        class_names: one name a label.
        name: what :func:`load_dataset` was asked for.
    """

    train: Dataset[Any]
    test: Dataset[Any]
    num_classes: int
    in_channels: int
    image_size: int
    class_names: tuple[str, ...]
    name: str


class NormalisedImages(Dataset[Sample]):
    """Images held as bytes and normalised when read: a quarter of the memory of float32.

    Args:
        images: ``[N, C, H, W]`` uint8.
        targets: ``[N]`` int64.
        mean: one value a channel, of pixels scaled to ``[0, 1]``.
        std: one value a channel.
    """

    def __init__(
        self, images: Tensor, targets: Tensor, mean: Sequence[float], std: Sequence[float]
    ) -> None:
        self.images = images
        self.targets = targets
        self._mean = tuple(mean)
        self._std = tuple(std)

    def __len__(self) -> int:
        return self.images.shape[0]

    def __getitem__(self, index: Any) -> Sample:
        """One sample for an integer, a batch for a list of integers."""
        return _normalise(self.images[index], self._mean, self._std), self.targets[index]


@dataclass(frozen=True)
class _Pixels:
    """What a reader returns: uint8 images ``[N, C, H, W]`` and int64 labels ``[N]``."""

    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]
    class_names: tuple[str, ...]


@dataclass(frozen=True)
class _Source:
    """How one data set on disk is read, fetched and normalised."""

    folder: str
    read: Callable[[Path, int], _Pixels]
    fetch: Callable[[Path], object]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int = 32
    image_sizes: tuple[int, ...] | None = (32,)
    in_memory_as_bytes: bool = False


def load_dataset(
    name: str,
    data_root: str | os.PathLike[str] | None = None,
    *,
    download: bool = False,
    image_size: int | None = None,
) -> DataBundle:
    """Read a data set and normalise its images with the mean and deviation usual for it.

    Args:
        name: "digits" (scikit-learn's, needs no files), "mnist", "fashion-mnist", "cifar10",
            "cifar100" or "tiny-imagenet".
        data_root: folder that holds ``MNIST/raw``, ``FashionMNIST/raw``, ``cifar-10-batches-py``
            or ``cifar-10-batches-bin``, ``cifar-100-python``, ``tiny-imagenet-200``.
        download: fetch what is missing into ``data_root``, through torchvision.
        image_size: height and width in pixels. Digits are 8, CIFAR 32, MNIST and Fashion-MNIST
            28 or, the default and the size used by the paper's authors, 32 (two black pixels on
            each side), Tiny-ImageNet any size (default 32, the authors').

    Returns:
        The training and the test samples. "digits" is split 80/20, stratified, with a fixed seed;
        for Tiny-ImageNet the labelled validation images are the test samples.

    Raises:
        ValueError: unknown ``name``, ``image_size`` or malformed files.
        FileNotFoundError: files are missing; the message names the folder expected.
        ConnectionError: a download failed.
    """
    if name == "digits":
        if image_size not in (None, 8):
            raise ValueError(f"image_size: 'digits' has images of size 8, got {image_size}")
        return _load_digits()
    if name not in _SOURCES:
        raise ValueError(f"name: expected one of {dataset_names()}, got {name!r}")
    source = _SOURCES[name]
    size = source.image_size if image_size is None else image_size
    if not isinstance(size, int) or size < 1 or size not in (source.image_sizes or (size,)):
        raise ValueError(
            f"image_size: {name!r} takes {source.image_sizes or 'any positive integer'}, "
            f"got {size!r}"
        )
    if data_root is None:
        raise ValueError(f"data_root: {name!r} is read from files; give the folder that holds it")
    root = Path(data_root)
    pixels = _read_or_fetch(name, source, root, size, download)
    channels = len(source.mean)
    parts = []
    for images, targets in (pixels.train, pixels.test):
        _check_pixels(name, images, targets, channels, len(pixels.class_names))
        if source.in_memory_as_bytes:
            dataset: Dataset[Any] = NormalisedImages(images, targets, source.mean, source.std)
        else:
            dataset = TensorDataset(_normalise(images, source.mean, source.std), targets)
        parts.append(dataset)
    return DataBundle(
        train=parts[0],
        test=parts[1],
        num_classes=len(pixels.class_names),
        in_channels=channels,
        image_size=size,
        class_names=pixels.class_names,
        name=name,
    )


def dataset_names() -> list[str]:
    """Names that :func:`load_dataset` takes."""
    return ["digits", *_SOURCES]


def targets_of(dataset: Dataset[Any]) -> Tensor:
    """Labels of a data set, without reading its images where the data set allows that.

    Args:
        dataset: a ``TensorDataset`` of (inputs, targets), a ``Subset``, anything with a
            ``targets`` attribute (torchvision), or any map-style data set of (input, target).

    Returns:
        ``[N]`` int64.

    Raises:
        TypeError: the data set has no length.
    """
    if isinstance(dataset, Subset):
        return targets_of(dataset.dataset)[torch.as_tensor(dataset.indices, dtype=torch.int64)]
    if isinstance(dataset, TensorDataset):
        return dataset.tensors[1].to(torch.int64)
    if hasattr(dataset, "targets"):
        return torch.as_tensor(dataset.targets, dtype=torch.int64)
    return torch.tensor([int(dataset[i][1]) for i in range(size_of(dataset))], dtype=torch.int64)


def size_of(dataset: Dataset[Any]) -> int:
    """Number of samples.

    Raises:
        TypeError: the data set has no length.
    """
    if not isinstance(dataset, Sized):
        raise TypeError(f"dataset: expected one with a length, got {type(dataset).__name__}")
    return len(dataset)


def subset(dataset: Dataset[Any], indices: Tensor) -> Dataset[Any]:
    """Samples of a data set by position; a subset of a subset refers to the original.

    Args:
        dataset: a map-style data set.
        indices: ``[K]`` int64.
    """
    if type(dataset) is Subset:
        indices = torch.as_tensor(dataset.indices, dtype=torch.int64)[indices]
        dataset = dataset.dataset
    return Subset(dataset, cast("list[int]", indices.tolist()))


def stratified(targets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw samples at random, each class in proportion to its size.

    Args:
        targets: labels, ``[N]``.
        count: how many, 0 to N.
        generator: source of the draw, on the CPU.

    Returns:
        Their positions, ``[count]`` int64, ascending.
    """
    total = len(targets)
    shuffled = torch.randperm(total, generator=generator)
    by_class = shuffled[targets[shuffled].argsort(stable=True)]
    # Evenly spaced positions in an order by class meet each class in proportion to its size.
    positions = (torch.arange(count) * 2 + 1) * total // (2 * count)
    return by_class[positions].sort().values


def split_forget(
    dataset: Dataset[Any],
    *,
    forget_class: int | None = None,
    indices: Iterable[int] | None = None,
) -> tuple[Dataset[Any], Dataset[Any]]:
    """Split into the forget set D_f and the remain set D_r (paper, section 2).

    Args:
        dataset: a map-style data set of (input, target).
        forget_class: every sample with this label goes to D_f; or
        indices: positions of the samples of D_f.

    Returns:
        ``(forget, remain)``, both in the data set's order. Nothing is copied.

    Raises:
        ValueError: not exactly one of ``forget_class`` and ``indices``; a label or position that
            is not there, a position named twice; or one of the two sets would be empty.
        TypeError: ``forget_class`` is not an integer.
    """
    if (forget_class is None) == (indices is None):
        raise ValueError("give exactly one of forget_class and indices")
    total = size_of(dataset)
    if forget_class is not None:
        if isinstance(forget_class, bool) or not isinstance(forget_class, int):
            raise TypeError(f"forget_class: expected an integer, got {forget_class!r}")
        targets = targets_of(dataset)
        chosen = targets == forget_class
        if not chosen.any():
            present = sorted(set(targets.tolist()))
            raise ValueError(f"forget_class: no sample of class {forget_class}, only of {present}")
    else:
        positions = torch.as_tensor(list(cast("Iterable[int]", indices)))
        if positions.is_floating_point() or positions.dtype == torch.bool:
            raise ValueError("indices: expected at least one position, all of them integers")
        if int(positions.min()) < 0 or int(positions.max()) >= total:
            raise ValueError(f"indices: positions must lie in 0..{total - 1}")
        chosen = torch.zeros(total, dtype=torch.bool)
        chosen[positions] = True
        if int(chosen.sum()) != positions.numel():
            raise ValueError("indices: a position is named twice")
    if chosen.all():
        raise ValueError("the remain set would be empty: every sample is to be forgotten")
    return subset(dataset, chosen.nonzero()[:, 0]), subset(dataset, (~chosen).nonzero()[:, 0])


def batches(
    dataset: Dataset[Any],
    batch_size: int,
    *,
    shuffle: bool = False,
    generator: torch.Generator | None = None,
) -> DataLoader[Any]:
    """Batches ``(inputs [B, ...], targets [B])``; the last one may be smaller.

    Tensor data sets are indexed a batch at a time, which is many times faster than collating
    single samples.

    Args:
        dataset: a map-style data set of (input, target).
        batch_size: B, at least 1.
        shuffle: draw a new order on each pass.
        generator: source of that order. Without one, torch's global generator decides; a pass
            that does not shuffle never touches the global generator.

    Raises:
        ValueError: ``batch_size`` is not a positive integer.
    """
    if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
        raise ValueError(f"batch_size: expected a positive integer, got {batch_size!r}")
    if generator is None and not shuffle:
        # DataLoader draws a seed on each pass, from the global generator if it has no own.
        generator = torch.Generator()
    if not _takes_index_lists(dataset):
        return DataLoader(dataset, batch_size, shuffle=shuffle, generator=generator)
    sized = cast("Sized", dataset)
    order = RandomSampler(sized, generator=generator) if shuffle else SequentialSampler(sized)
    sampler = BatchSampler(order, batch_size, drop_last=False)
    # With batch_size=None the loader passes each item of the sampler, a list, to the data set.
    return DataLoader(
        dataset, batch_size=None, sampler=cast("Iterable[Any]", sampler), generator=generator
    )


def load_object(path: str) -> Any:
    """Import ``package.module:name``; modules in the current directory can be imported.

    Args:
        path: module and, after the colon, the (dotted) name in it.

    Raises:
        ValueError: ``path`` does not have that form.
        ImportError: the module cannot be imported.
        AttributeError: the module has no such name.
    """
    module_name, colon, attribute = path.partition(":")
    if not (colon and module_name and attribute):
        raise ValueError(f"path: expected 'package.module:callable', got {path!r}")
    here = os.getcwd()
    if here not in sys.path and "" not in sys.path:
        sys.path.insert(0, here)
    try:
        value: Any = importlib.import_module(module_name)
    except ImportError as error:
        raise ImportError(
            f"{path!r}: module {module_name!r} cannot be imported: {error}"
        ) from error
    for part in attribute.split("."):
        if not hasattr(value, part):
            raise AttributeError(f"{path!r}: {module_name!r} has no {attribute!r}")
        value = getattr(value, part)
    return value


def _takes_index_lists(dataset: Dataset[Any]) -> bool:
    if type(dataset) is Subset:
        return _takes_index_lists(dataset.dataset)
    return type(dataset) in (TensorDataset, NormalisedImages)


def _normalise(images: Tensor, mean: Sequence[float], std: Sequence[float]) -> Tensor:
    scaled = images.to(torch.float32).div_(255)
    shape = (len(mean), 1, 1)
    return scaled.sub_(torch.tensor(mean).view(shape)).div_(torch.tensor(std).view(shape))


def _check_pixels(name: str, images: Tensor, targets: Tensor, channels: int, classes: int) -> None:
    if images.shape[0] != targets.shape[0] or images.shape[1] != channels or len(images) == 0:
        raise ValueError(
            f"{name}: malformed files: {tuple(images.shape)} images, {targets.shape[0]} labels"
        )
    if int(targets.min()) < 0 or int(targets.max()) >= classes:
        raise ValueError(f"{name}: malformed files: a label is not in 0..{classes - 1}")


def _read_or_fetch(
    name: str, source: _Source, root: Path, image_size: int, download: bool
) -> _Pixels:
    try:
        return source.read(root, image_size)
    except FileNotFoundError as missing:
        if not download:
            raise FileNotFoundError(
                f"data_root: {name!r} not found under {str(root)!r}: expected the folder "
                f"{source.folder} there ({missing}); download=True fetches it where there is "
                "a network"
            ) from missing
    try:
        source.fetch(root)
    except (OSError, RuntimeError) as error:
        raise ConnectionError(f"could not download {name!r} to {str(root)!r}: {error}") from error
    return source.read(root, image_size)


def _load_digits() -> DataBundle:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    images, targets = load_digits(return_X_y=True)
    scaled = (images / 16.0).reshape(-1, 1, 8, 8).astype(np.float32)
    train_x, test_x, train_y, test_y = train_test_split(
        scaled, targets.astype(np.int64), test_size=0.2, random_state=0, stratify=targets
    )
    mean, std = train_x.mean(), train_x.std()

    def dataset(x: np.ndarray[Any, Any], y: np.ndarray[Any, Any]) -> TensorDataset:
        return TensorDataset(torch.from_numpy((x - mean) / std), torch.from_numpy(y))

    return DataBundle(
        train=dataset(train_x, train_y),
        test=dataset(test_x, test_y),
        num_classes=10,
        in_channels=1,
        image_size=8,
        class_names=tuple(str(digit) for digit in range(10)),
        name="digits",
    )


def _read_mnist(class_name: str) -> Callable[[Path, int], _Pixels]:
    def read(root: Path, image_size: int) -> _Pixels:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, class_name)
        parts = []
        for train in (True, False):
            try:
                part = kind(str(root), train=train)
            except RuntimeError as error:  # torchvision's word for missing files
                raise FileNotFoundError(str(error)) from error
            pad = (image_size - 28) // 2
            images = F.pad(part.data.unsqueeze(1), (pad, pad, pad, pad))
            parts.append((images, part.targets.to(torch.int64)))
        return _Pixels(parts[0], parts[1], tuple(str(name) for name in kind.classes))

    return read


def _fetch_torchvision(class_name: str) -> Callable[[Path], object]:
    def fetch(root: Path) -> object:
        import torchvision.datasets

        kind = getattr(torchvision.datasets, class_name)
        return [kind(str(root), train=train, download=True) for train in (True, False)]

    return fetch


_CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)


def _read_cifar10(root: Path, image_size: int) -> _Pixels:
    python, binary = root / "cifar-10-batches-py", root / "cifar-10-batches-bin"
    if binary.is_dir() and not python.is_dir():
        files = [binary / f"data_batch_{i}.bin" for i in range(1, 6)]
        train = [_cifar_binary(path) for path in files]
        test = [_cifar_binary(binary / "test_batch.bin")]
    else:
        files = [python / f"data_batch_{i}" for i in range(1, 6)]
        train = [_cifar_python(path, "labels") for path in files]
        test = [_cifar_python(python / "test_batch", "labels")]
    return _Pixels(_concatenate(train), _concatenate(test), _CIFAR10_CLASSES)


def _read_cifar100(root: Path, image_size: int) -> _Pixels:
    folder = root / "cifar-100-python"
    train = _cifar_python(folder / "train", "fine_labels")
    test = _cifar_python(folder / "test", "fine_labels")
    names = _unpickle_plain(folder / "meta")["fine_label_names"]
    return _Pixels(train, test, tuple(str(name) for name in names))


def _concatenate(parts: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    return torch.cat([images for images, _ in parts]), torch.cat([labels for _, labels in parts])


def _cifar_binary(path: Path) -> tuple[Tensor, Tensor]:
    """Records of 1 label byte and 3072 pixel bytes: red, green, blue, each row by row."""
    data = np.fromfile(path, dtype=np.uint8)
    if data.size == 0 or data.size % 3073:
        raise ValueError(f"{path}: not a CIFAR-10 file: {data.size} bytes are no whole records")
    records = torch.from_numpy(data).view(-1, 3073)
    return records[:, 1:].reshape(-1, 3, 32, 32).contiguous(), records[:, 0].to(torch.int64)


def _cifar_python(path: Path, labels: str) -> tuple[Tensor, Tensor]:
    content = _unpickle_plain(path)
    data = content.get("data")
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,):
        raise ValueError(f"{path}: not a CIFAR file: 'data' is no [N, 3072] array of bytes")
    images = torch.from_numpy(data.copy()).view(-1, 3, 32, 32)
    return images, torch.tensor(content[labels], dtype=torch.int64)


class _PlainUnpickler(pickle.Unpickler):
    """Reads numbers, strings, containers and numpy arrays, and nothing that could run code."""

    _ALLOWED: ClassVar[dict[tuple[str, str], Any]] = {
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        # numpy 2 renamed the module; both names mean the function that rebuilds an array.
        ("numpy.core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("numpy._core.multiarray", "_reconstruct"): np.empty(0).__reduce__()[0],
        ("_codecs", "encode"): str.encode,
    }

    def find_class(self, module: str, name: str) -> Any:
        try:
            return self._ALLOWED[module, name]
        except KeyError:
            raise pickle.UnpicklingError(f"{module}.{name} has no place in a data file") from None


def _unpickle_plain(path: Path) -> dict[str, Any]:
    with open(path, "rb") as file:
        try:
            content = _PlainUnpickler(file, encoding="latin1").load()
        except (pickle.UnpicklingError, EOFError) as error:
            raise ValueError(f"{path}: not a CIFAR file: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: not a CIFAR file: it holds a {type(content).__name__}")
    return content


def _read_tiny_imagenet(root: Path, image_size: int) -> _Pixels:
    folder = root / "tiny-imagenet-200"
    ids = sorted(path.name for path in (folder / "train").iterdir() if path.is_dir())
    if not ids:
        raise FileNotFoundError(f"no class folders in {folder / 'train'}")
    label = {wnid: index for index, wnid in enumerate(ids)}
    train = [
        (path, label[wnid])
        for wnid in ids
        for path in sorted((folder / "train" / wnid / "images").glob("*.JPEG"))
    ]
    test = []
    for line in (folder / "val" / "val_annotations.txt").read_text().splitlines():
        file_name, wnid = line.split("\t")[:2]
        if wnid not in label:
            raise ValueError(f"tiny-imagenet: {file_name} has the unknown class {wnid}")
        test.append((folder / "val" / "images" / file_name, label[wnid]))
    return _Pixels(
        _decode(train, image_size, "train"), _decode(test, image_size, "val"), tuple(ids)
    )


def _decode(files: list[tuple[Path, int]], image_size: int, part: str) -> tuple[Tensor, Tensor]:
    from PIL import Image
    from tqdm import tqdm

    images = torch.empty((len(files), 3, image_size, image_size), dtype=torch.uint8)
    for position, (path, _) in enumerate(
        tqdm(files, desc=f"tiny-imagenet {part}", unit="image", disable=None, leave=False)
    ):
        with Image.open(path) as image:
            pixels = image.convert("RGB")
            if pixels.size != (image_size, image_size):
                pixels = pixels.resize((image_size, image_size), Image.Resampling.BILINEAR)
        images[position] = torch.from_numpy(np.array(pixels)).permute(2, 0, 1)
    return images, torch.tensor([target for _, target in files], dtype=torch.int64)


def _fetch_tiny_imagenet(root: Path) -> object:
    from torchvision.datasets.utils import download_and_extract_archive

    return download_and_extract_archive(
        "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
        str(root),
        md5="90528d7ca1a48142e341f4ef8d21d0de",
    )


_SOURCES = {
    "mnist": _Source(
        folder="MNIST/raw",
        read=_read_mnist("MNIST"),
        fetch=_fetch_torchvision("MNIST"),
        mean=(0.1307,),
        std=(0.3081,),
        image_sizes=(28, 32),
    ),
    "fashion-mnist": _Source(
        folder="FashionMNIST/raw",
        read=_read_mnist("FashionMNIST"),
        fetch=_fetch_torchvision("FashionMNIST"),
        mean=(0.2860,),
        std=(0.3530,),
        image_sizes=(28, 32),
    ),
    "cifar10": _Source(
        folder="cifar-10-batches-py or cifar-10-batches-bin",
        read=_read_cifar10,
        fetch=_fetch_torchvision("CIFAR10"),
        mean=(0.4914, 0.4822, 0.4465),
        std=(0.2023, 0.1994, 0.2010),
    ),
    "cifar100": _Source(
        folder="cifar-100-python",
        read=_read_cifar100,
        fetch=_fetch_torchvision("CIFAR100"),
        mean=(0.5071, 0.4865, 0.4409),
        std=(0.2673, 0.2564, 0.2762),
    ),
    "tiny-imagenet": _Source(
        folder="tiny-imagenet-200",
        read=_read_tiny_imagenet,
        fetch=_fetch_tiny_imagenet,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        image_sizes=None,
        # 110,000 images would take 1.4 GB as float32.
        in_memory_as_bytes=True,
    ),
}
