"""Images with labels for ``knn.py``: MNIST, CIFAR-10, folders of pictures, and scikit-learn's digits.

What a folder holds is seen from the names in it:

- ``train-images-idx3-ubyte``, ``train-labels-idx1-ubyte``, ``t10k-...``, plain or ``.gz``: MNIST's own format;
- ``data_batch_1`` ... ``data_batch_5``, ``test_batch``, plain (Python's) or ``.bin``: CIFAR-10's own formats;
- ``train/CLASS/*``, ``test/CLASS/*``: pictures, which the package Pillow reads; also inside one ``.tar`` file.
"""

from __future__ import annotations

import gzip
import io
import lzma
import math
import pickle
import struct
import tarfile
import zlib
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

PICTURES = (".jpg", ".jpeg", ".png")


class Images(NamedTuple):
    """Images (n, channels, height, width), uint8, and labels (n,), int64."""

    pixels: np.ndarray
    labels: np.ndarray


class Splits(NamedTuple):
    """The data, the names of the classes, and a checksum of what was read."""

    train: Images
    valid: Images
    test: Images
    classes: list[str]
    checksum: str

    def __str__(self) -> str:
        return f"{self.train.pixels.shape}, {self.checksum}"


class DataError(ValueError):
    """What is wrong with a file, in one line."""


def load(folder: Path | None, num_valid: int, seed: int, limit: int = 0) -> Splits:
    """Reads a folder, or the digits if there is none.

    Args:
        folder: see above.
        num_valid: how many images of the training set are for validation, drawn at random.
        seed: of that draw, and of the digits' test set.
        limit: how many of the others are for training, likewise; 0 for all.

    Raises:
        DataError: if the folder holds nothing that is known, or a file is broken.
    """
    if folder is None:
        train, test, classes = read_digits(seed)
    elif not folder.is_dir():
        raise DataError(f"{folder} is not a folder")
    elif find(folder, "train-images-idx3-ubyte"):
        train, test, classes = read_mnist(folder)
    elif find_cifar(folder) is not None:
        train, test, classes = read_cifar(folder)
    else:
        train, test, classes = read_pictures(folder)
    for name, images in (("training", train), ("test", test)):
        if len(images.pixels) != len(images.labels):
            raise DataError(
                f"{folder}: {len(images.pixels)} {name} images but {len(images.labels)} {name} labels"
            )
        if images.pixels.shape[1:] != train.pixels.shape[1:]:
            raise DataError(
                f"{folder}: test images of {images.pixels.shape[1:]}, training images of "
                f"{train.pixels.shape[1:]}"
            )
        if not images.pixels.size:
            raise DataError(f"{folder}: {name} images of {images.pixels.shape}: nothing")
        wrong = images.labels[(images.labels < 0) | (images.labels >= len(classes))]
        if len(wrong):
            raise DataError(f"{folder}: label {wrong[0]} in the {name} set, of {len(classes)} classes")
    if not 0 < num_valid < len(train.labels):
        raise DataError(f"{num_valid} validation images of {len(train.labels)} training images")
    checksum = sha256()
    for array in (*train, *test):
        checksum.update(np.ascontiguousarray(array).data)
    order = np.random.default_rng(seed).permutation(len(train.labels))
    valid, rest = order[:num_valid], np.sort(order[num_valid : num_valid + limit if limit else None])
    return Splits(
        Images(train.pixels[rest], train.labels[rest]),
        Images(train.pixels[valid], train.labels[valid]),
        test,
        classes,
        checksum.hexdigest()[:12],
    )


# -------------------------------------------------------------------------------------------- digits


def read_digits(seed: int) -> tuple[Images, Images, list[str]]:
    """The 1,797 digits of 8 x 8 pixels that come with scikit-learn, 500 of them for the test set."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    pixels, labels = load_digits(return_X_y=True)
    pixels = np.round(pixels * (255 / 16)).astype(np.uint8).reshape(-1, 1, 8, 8)
    train_x, test_x, train_y, test_y = train_test_split(
        pixels, labels, test_size=500, stratify=labels, random_state=seed
    )
    return Images(train_x, train_y), Images(test_x, test_y), [str(digit) for digit in range(10)]


# --------------------------------------------------------------------------------------------- MNIST


def find(folder: Path, name: str) -> Path | None:
    """The file, plain or compressed."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def read_mnist(folder: Path) -> tuple[Images, Images, list[str]]:
    """MNIST, or whatever else comes in its format."""

    def read(name: str, dimensions: int) -> np.ndarray:
        path = find(folder, name)
        if path is None:
            raise DataError(f"{folder / name} is missing, plain or .gz")
        return read_idx(path, dimensions)

    train, test = (
        Images(
            read(f"{split}-images-idx3-ubyte", 3)[:, None],
            read(f"{split}-labels-idx1-ubyte", 1).astype(np.int64),
        )
        for split in ("train", "t10k")
    )
    return train, test, [str(digit) for digit in range(10)]


def read_idx(path: Path, dimensions: int) -> np.ndarray:
    """An IDX file of bytes: a magic number, the sizes, the bytes."""
    try:
        data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} cannot be decompressed: {error}") from error
    header = 4 * (1 + dimensions)
    if len(data) < header:
        raise DataError(f"{path} is truncated: {len(data)} bytes, its header alone has {header}")
    magic, *shape = struct.unpack(f">{1 + dimensions}I", data[:header])
    if magic != 0x800 + dimensions:
        raise DataError(f"{path} has the magic number {magic}, not {0x800 + dimensions}")
    size = math.prod(shape)
    if len(data) != header + size:
        raise DataError(f"{path} has {len(data) - header} bytes of data, {size} are announced")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)


# -------------------------------------------------------------------------------------------- CIFAR-10


# What the pickle of an array names, before and after numpy 2.
ARRAYS = (
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
    ("_codecs", "encode"),
)


class _ArraysOnly(pickle.Unpickler):
    """Reads what CIFAR-10's pickles are made of, and runs nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in ARRAYS:
            raise pickle.UnpicklingError(f"it contains {module}.{name}")
        return super().find_class(module, name)


def find_cifar(folder: Path) -> Path | None:
    """The folder with the batches: this one, or what the archive unpacks to."""
    for place in (folder, folder / "cifar-10-batches-py", folder / "cifar-10-batches-bin"):
        if (place / "data_batch_1").is_file() or (place / "data_batch_1.bin").is_file():
            return place
    return None


def read_cifar(folder: Path) -> tuple[Images, Images, list[str]]:
    """CIFAR-10 in its own formats."""
    place = find_cifar(folder)
    assert place is not None
    suffix = ".bin" if (place / "data_batch_1.bin").is_file() else ""
    read = read_cifar_binary if suffix else read_cifar_python
    batches = [read(place / f"data_batch_{number}{suffix}") for number in range(1, 6)]
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    classes = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
    return Images(pixels, labels), read(place / f"test_batch{suffix}"), classes


def read_cifar_binary(path: Path) -> Images:
    """Records of a label and 3 x 32 x 32 bytes."""
    data = _read_bytes(path)
    if not data or len(data) % 3073:
        raise DataError(f"{path} has {len(data)} bytes, which is not a number of records of 3073")
    records = np.frombuffer(data, np.uint8).reshape(-1, 3073)
    return Images(records[:, 1:].reshape(-1, 3, 32, 32), records[:, 0].astype(np.int64))


def read_cifar_python(path: Path) -> Images:
    """A pickled dictionary with ``data`` and ``labels``."""
    try:
        batch = _ArraysOnly(io.BytesIO(_read_bytes(path)), encoding="bytes").load()
        pixels, labels = np.asarray(batch[b"data"]), np.asarray(batch[b"labels"], np.int64)
        if pixels.dtype != np.uint8 or labels.ndim != 1:
            raise ValueError(f"its data are {pixels.dtype}, its labels have {labels.ndim} dimensions")
        pixels = pixels.reshape(-1, 3, 32, 32)
    except Exception as error:  # a broken pickle may raise anything
        raise DataError(f"{path} is not a batch of CIFAR-10: {error}") from error
    if len(pixels) != len(labels):
        raise DataError(f"{path}: {len(pixels)} images but {len(labels)} labels")
    return Images(pixels, labels)


def _read_bytes(path: Path) -> bytes:
    if not path.is_file():
        raise DataError(f"{path} is missing")
    return path.read_bytes()


# -------------------------------------------------------------------------------------------- pictures


def read_pictures(folder: Path) -> tuple[Images, Images, list[str]]:
    """``SPLIT/CLASS/*``, in the folder or in the one archive that it holds."""
    archives = sorted(path for path in folder.iterdir() if {".tar", ".tgz"} & set(path.suffixes))
    unpacked = (folder / "train").is_dir() or len(archives) != 1
    found: dict[str, list[tuple[str, str, np.ndarray]]] = {"train": [], "test": []}
    for name, data in _in_folder(folder) if unpacked else _in_archive(archives[0]):
        *_, split, label, _ = ("", "", *name.split("/"))
        if split in found:
            found[split].append((label, name, _decode(name, data)))
    for split, pictures in found.items():
        if not pictures:
            raise DataError(
                f"{folder} holds neither MNIST nor CIFAR-10 in their own formats, nor pictures {split}/CLASS/*"
            )
    classes = sorted({label for label, _, _ in found["train"]})
    unknown = sorted({label for label, _, _ in found["test"]} - set(classes))
    if unknown:
        raise DataError(f"{folder}: the test set has a class {unknown[0]} that the training set does not have")

    def collect(pictures: list[tuple[str, str, np.ndarray]]) -> Images:
        _, first, one = pictures[0]
        for _, name, other in pictures:
            if other.shape != one.shape:
                raise DataError(
                    f"{folder}: pictures of different channels, height or width: {first} has {one.shape}, "
                    f"{name} has {other.shape}"
                )
        labels = np.array([classes.index(label) for label, _, _ in pictures], np.int64)
        return Images(np.stack([pixels for _, _, pixels in pictures]), labels)

    return collect(found["train"]), collect(found["test"]), classes


def _in_folder(folder: Path) -> Iterator[tuple[str, bytes]]:
    for path in sorted(folder.glob("*/*/*")):
        if path.suffix.lower() in PICTURES and path.is_file():
            yield path.relative_to(folder).as_posix(), path.read_bytes()


def _in_archive(path: Path) -> Iterator[tuple[str, bytes]]:
    try:
        with tarfile.open(path) as archive:
            for member in archive:
                picture = member.isfile() and member.name.lower().endswith(PICTURES)
                file = archive.extractfile(member) if picture else None
                if file is not None:
                    yield member.name, file.read()
            if path.suffix == ".tar":  # compressed ones have checksums; here a broken header looks like the end
                stream: Any = archive.fileobj
                stream.seek(archive.offset)
                if stream.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise DataError(f"{path} is truncated or broken after {archive.offset} bytes")
    except (tarfile.TarError, EOFError, OSError, zlib.error, lzma.LZMAError) as error:
        raise DataError(f"{path} cannot be unpacked: {str(error).splitlines()[0]}") from error


def _decode(name: str, data: bytes) -> np.ndarray:
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as picture:
            mode = picture.mode
            pixels = np.asarray(picture.convert("L" if mode in ("1", "L") else "RGB"))
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not a picture: {error}") from error
    if mode.startswith(("I", "F")):  # these would become white
        raise DataError(f"{name} has pixels of more than 8 bits")
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
