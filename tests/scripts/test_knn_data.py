"""Every format that ``knn_data.py`` reads, written here, and what it says of broken files."""

import gzip
import io
import os
import pickle
import struct
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2] / "scripts"))
from knn_data import DataError, load

RNG = np.random.default_rng(1)


def idx(array):
    return struct.pack(f">{1 + array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


def write_mnist(folder, compress=True, **changes):
    """30 training and 10 test images of 8 x 8 pixels."""
    arrays = {}
    for split, number in (("train", 30), ("t10k", 10)):
        arrays[f"{split}-images-idx3-ubyte"] = RNG.integers(256, size=(number, 8, 8), dtype=np.uint8)
        arrays[f"{split}-labels-idx1-ubyte"] = RNG.integers(10, size=number, dtype=np.uint8)
    folder.mkdir()
    for name, array in arrays.items():
        data = changes.get(name.replace("-", "_"), idx(array))
        path = folder / (f"{name}.gz" if compress else name)
        path.write_bytes(gzip.compress(data) if compress else data)
    return arrays


def everything(splits):
    """The training images in their first order: validation images are drawn from them."""
    together = np.concatenate((splits.train.pixels, splits.valid.pixels))
    return sorted(image.tobytes() for image in together)


@pytest.mark.parametrize("compress", [True, False])
def test_mnist(tmp_path, compress):
    arrays = write_mnist(tmp_path / "mnist", compress)
    splits = load(tmp_path / "mnist", 5, seed=1)
    assert [len(part.labels) for part in splits[:3]] == [25, 5, 10]
    assert everything(splits) == sorted(image.tobytes() for image in arrays["train-images-idx3-ubyte"])
    assert (splits.test.pixels[:, 0] == arrays["t10k-images-idx3-ubyte"]).all()
    assert (splits.test.labels == arrays["t10k-labels-idx1-ubyte"]).all()


def test_the_validation_images_are_those_of_the_seed(tmp_path):
    write_mnist(tmp_path / "mnist")
    one, same, other = (load(tmp_path / "mnist", 5, seed=seed).valid.pixels for seed in (1, 1, 2))
    assert (one == same).all() and (one != other).any()


def test_a_limit_keeps_so_many_training_images_and_all_others(tmp_path):
    write_mnist(tmp_path / "mnist")
    whole, part = (load(tmp_path / "mnist", 5, seed=1, limit=limit) for limit in (0, 10))
    assert [len(images.labels) for images in part[:3]] == [10, 5, 10]
    assert {image.tobytes() for image in part.train.pixels} < {image.tobytes() for image in whole.train.pixels}
    assert (part.valid.pixels == whole.valid.pixels).all()


LABELS = np.zeros(30, np.uint8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"train_images_idx3_ubyte": struct.pack(">4I", 0x801, 1, 1, 1)},
            "has the magic number 2049, not 2051",
        ),
        ({"train_images_idx3_ubyte": b"\0\0\x08"}, "is truncated: 3 bytes, its header alone has 16"),
        ({"t10k_labels_idx1_ubyte": idx(LABELS)[:-3]}, "has 27 bytes of data, 30 are announced"),
        ({"t10k_labels_idx1_ubyte": idx(LABELS)}, "10 test images but 30 test labels"),
        ({"train_labels_idx1_ubyte": idx(LABELS + 11)}, "label 11 in the training set, of 10 classes"),
        (
            {"t10k_images_idx3_ubyte": idx(np.zeros((0, 8, 8))), "t10k_labels_idx1_ubyte": idx(LABELS[:0])},
            r"test images of \(0, 1, 8, 8\): nothing",
        ),
        (
            {"t10k_images_idx3_ubyte": struct.pack(">4I", 0x803, 2**31, 2**31, 4)},
            f"has 0 bytes of data, {2**64} are announced",
        ),
    ],
)
def test_broken_mnist_is_named(tmp_path, changes, message):
    write_mnist(tmp_path / "mnist", **changes)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "mnist", 5, seed=1)


def test_a_gz_with_a_wrong_byte_is_named(tmp_path):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    whole = path.read_bytes()
    for position in range(len(whole) // 2, len(whole) // 2 + 40):
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        with pytest.raises(DataError, match="t10k-images-idx3-ubyte"):
            load(tmp_path / "mnist", 5, seed=1)


def test_images_of_another_size_than_those_of_training_are_named(tmp_path):
    write_mnist(tmp_path / "mnist", t10k_images_idx3_ubyte=idx(np.zeros((10, 12, 12), np.uint8)))
    with pytest.raises(DataError, match=r"test images of \(1, 12, 12\), training images of \(1, 8, 8\)"):
        load(tmp_path / "mnist", 5, seed=1)


def test_half_a_gz_and_a_missing_file_are_named(tmp_path):
    write_mnist(tmp_path / "mnist")
    path = tmp_path / "mnist" / "t10k-images-idx3-ubyte.gz"
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte\.gz cannot be decompressed"):
        load(tmp_path / "mnist", 5, seed=1)
    path.unlink()
    with pytest.raises(DataError, match="t10k-images-idx3-ubyte is missing, plain or"):
        load(tmp_path / "mnist", 5, seed=1)


def write_cifar(folder, binary):
    """Six batches of 4 images."""
    folder.mkdir(parents=True)
    batches = {}
    for name in [*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"]:
        pixels, labels = RNG.integers(256, size=(4, 3072), dtype=np.uint8), RNG.integers(10, size=4)
        batches[name] = pixels, labels
        if binary:
            records = np.concatenate((labels[:, None].astype(np.uint8), pixels), axis=1)
            (folder / f"{name}.bin").write_bytes(records.tobytes())
        else:
            content = {b"data": pixels, b"labels": labels.tolist()}
            (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    return batches


@pytest.mark.parametrize(("name", "binary"), [(".", True), (".", False), ("cifar-10-batches-py", False)])
def test_cifar(tmp_path, name, binary):
    batches = write_cifar(tmp_path / "cifar" / name, binary)
    splits = load(tmp_path / "cifar", 5, seed=1)
    assert [len(part.labels) for part in splits[:3]] == [15, 5, 4]
    pixels, labels = batches["test_batch"]
    assert (splits.test.pixels.reshape(4, -1) == pixels).all() and (splits.test.labels == labels).all()
    train = [
        image.tobytes() for name, (images, _) in batches.items() if name != "test_batch" for image in images
    ]
    assert everything(splits) == sorted(train)


class Evil:
    def __reduce__(self):
        return os.mkdir, ("evil",)


def test_a_pickle_that_runs_code_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_cifar(tmp_path / "cifar", binary=False)
    (tmp_path / "cifar" / "data_batch_3").write_bytes(pickle.dumps({b"data": Evil(), b"labels": []}))
    with pytest.raises(DataError, match=r"data_batch_3 is not a batch of CIFAR-10: it contains posix\.mkdir"):
        load(tmp_path / "cifar", 5, seed=1)
    assert not (tmp_path / "evil").exists()


def test_broken_cifar_is_named(tmp_path):
    write_cifar(tmp_path / "cifar", binary=True)
    path = tmp_path / "cifar" / "data_batch_2.bin"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"data_batch_2\.bin has 12291 bytes, which is not a number of records"):
        load(tmp_path / "cifar", 5, seed=1)
    path.unlink()
    with pytest.raises(DataError, match=r"data_batch_2\.bin is missing"):
        load(tmp_path / "cifar", 5, seed=1)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({b"data": np.zeros((4, 3072)), b"labels": [0] * 4}, "its data are float64"),
        ({b"data": np.zeros((4, 3072), np.uint8), b"labels": [[0] * 4]}, "its labels have 2 dimensions"),
    ],
)
def test_a_batch_of_something_else_is_named(tmp_path, content, message):
    write_cifar(tmp_path / "cifar", binary=False)
    (tmp_path / "cifar" / "test_batch").write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match=message):
        load(tmp_path / "cifar", 5, seed=1)


def test_a_batch_with_a_label_too_few_is_named(tmp_path):
    batches = write_cifar(tmp_path / "cifar", binary=False)
    for name, labels in (("data_batch_1", [1] * 3), ("data_batch_2", [1] * 5)):
        content = {b"data": batches[name][0], b"labels": labels}
        (tmp_path / "cifar" / name).write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(DataError, match="data_batch_1: 4 images but 3 labels"):
        load(tmp_path / "cifar", 5, seed=1)


def test_a_pickle_with_a_wrong_byte_is_named_or_read(tmp_path):
    write_cifar(tmp_path / "cifar", binary=False)
    path = tmp_path / "cifar" / "data_batch_1"
    whole = path.read_bytes()
    refused = 0
    for position in [*range(0, 200), *range(len(whole) - 60, len(whole))]:
        path.write_bytes(whole[:position] + bytes([whole[position] ^ 0x55]) + whole[position + 1 :])
        try:
            load(tmp_path / "cifar", 5, seed=1)
        except DataError:
            refused += 1
    assert refused > 50


def picture(size=8, mode="RGB"):
    out = io.BytesIO()
    Image.fromarray(RNG.integers(256, size=(size, size, 3), dtype=np.uint8)).convert(mode).save(out, "PNG")
    return out.getvalue()


def deep_picture():
    out = io.BytesIO()
    Image.fromarray(RNG.integers(1 << 16, size=(8, 8), dtype=np.uint16)).save(out, "PNG")
    return out.getvalue()


def write_pictures(folder, archive=None, **changes):
    """Four pictures of each of two classes to train with, one of each to test, as files or in an archive."""
    files = {f"{split}/{kind}/{i}.png": picture() for split in ("train",) for kind in "ab" for i in range(4)}
    files |= {f"test/{kind}/0.png": picture() for kind in "ab"} | changes.get("more", {})
    folder.mkdir()
    if archive:
        mode = {".tar": "w", ".tgz": "w:gz", ".xz": "w:xz"}[(folder / archive).suffix]
        with tarfile.open(folder / archive, mode) as out:
            for name, data in files.items():
                member = tarfile.TarInfo(name)
                member.size = len(data)
                out.addfile(member, io.BytesIO(data))
        return
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


@pytest.mark.parametrize("archive", [None, "pictures.tar.xz", "pictures.tgz", "pictures.tar"])
def test_pictures(tmp_path, archive):
    write_pictures(tmp_path / "pictures", archive)
    splits = load(tmp_path / "pictures", 2, seed=1)
    assert splits.classes == ["a", "b"]
    assert splits.train.pixels.shape == (6, 3, 8, 8) and splits.test.labels.tolist() == [0, 1]


def test_pictures_beside_an_archive_of_something_else(tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "other.tar").write_bytes(b"something else")
    assert load(tmp_path / "pictures", 2, seed=1).classes == ["a", "b"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"test/c/0.png": picture()}, "the test set has a class c that the training set does not have"),
        ({"train/a/9.png": picture(16)}, r"train/a/0.png has \(3, 8, 8\), train/a/9.png has \(3, 16, 16\)"),
        ({"train/b/9.png": picture(mode="L")}, r"train/b/9.png has \(1, 8, 8\)"),
        ({"train/b/9.png": deep_picture()}, "train/b/9.png has pixels of more than 8 bits"),
        ({"train/b/9.png": picture()[:60]}, "train/b/9.png is not a picture"),
        ({"train/b/9.png": picture().replace(b"IDAT", b"IDAX")}, "train/b/9.png is not a picture"),
        ({"train/a/9.png": b"GIF"}, "train/a/9.png is not a picture"),
    ],
)
def test_wrong_pictures_are_named(tmp_path, more, message):
    write_pictures(tmp_path / "pictures", more=more)
    with pytest.raises(DataError, match=message):
        load(tmp_path / "pictures", 2, seed=1)


def test_a_broken_archive_is_named(tmp_path):
    write_pictures(tmp_path / "pictures", "pictures.tar.xz")
    path = tmp_path / "pictures" / "pictures.tar.xz"
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2] + b"broken" + whole[len(whole) // 2 + 6 :])
    with pytest.raises(DataError, match=r"pictures.tar.xz cannot be unpacked"):
        load(tmp_path / "pictures", 2, seed=1)


def test_a_tar_that_was_cut_off_or_broken_is_not_a_smaller_one(tmp_path):
    write_pictures(tmp_path / "pictures", "pictures.tar")
    path = tmp_path / "pictures" / "pictures.tar"
    whole = path.read_bytes()
    assert len(load(tmp_path / "pictures", 2, seed=1).train.labels) == 6
    used = len(whole.rstrip(b"\0"))
    for cut in range(512, used, 256):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            load(tmp_path / "pictures", 2, seed=1)
    third = whole.index(b"train/a/2.png")
    path.write_bytes(whole[:third] + b"x" + whole[third + 1 :])  # the header's checksum is not right any more
    with pytest.raises(DataError, match=r"pictures.tar is truncated or broken after \d+ bytes"):
        load(tmp_path / "pictures", 2, seed=1)


def test_what_is_not_a_file_is_not_a_picture(tmp_path):
    write_pictures(tmp_path / "pictures")
    (tmp_path / "pictures" / "train" / "a" / "folder.png").mkdir()
    (tmp_path / "pictures" / "train" / "a" / "link.png").symlink_to("nowhere")
    assert len(load(tmp_path / "pictures", 2, seed=1).train.labels) == 6


def test_other_images_have_another_checksum(tmp_path):
    write_mnist(tmp_path / "one")
    write_mnist(tmp_path / "other")
    one, other = (load(tmp_path / name, 5, seed=1) for name in ("one", "other"))
    assert str(one) == str(load(tmp_path / "one", 5, seed=2)) != str(other)


def test_other_folders_are_named(tmp_path):
    with pytest.raises(DataError, match="nowhere is not a folder"):
        load(tmp_path / "nowhere", 5, seed=1)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="holds neither MNIST nor CIFAR-10 in their own formats, nor pictures"):
        load(tmp_path / "empty", 5, seed=1)
    with pytest.raises(DataError, match="1297 validation images of 1297 training images"):
        load(None, 1297, seed=1)
