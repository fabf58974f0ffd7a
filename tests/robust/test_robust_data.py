"""Image sets: small files in the true formats are read, and damaged ones are refused."""

import hashlib
import io
import os
import pickle
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat
from torchvision.datasets import CIFAR10, CIFAR100, SVHN

from hipp_ext.errors import DataError
from hipp_ext.robust import ImageData, Images, load_data
from hipp_ext.robust.data import check_images

GENERATOR = np.random.default_rng(0)


def cifar(root: Path, kind: type, monkeypatch, n: int = 4) -> dict[str, np.ndarray]:
    """A small set in the true format, taken for the published one."""
    folder, written = root / kind.base_folder, {}
    folder.mkdir()
    key = "labels" if kind is CIFAR10 else "fine_labels"

    def write(name: str, content: dict) -> str:
        text = pickle.dumps(content, protocol=2)
        (folder / name).write_bytes(text)
        return hashlib.md5(text).hexdigest()

    for part in ("train_list", "test_list"):
        listed = []
        for name, _ in getattr(kind, part):
            written[name] = GENERATOR.integers(0, 256, (n, 3072), dtype=np.uint8)
            listed.append([name, write(name, {"data": written[name], key: list(range(n))})])
        monkeypatch.setattr(kind, part, listed)
    names = [f"class{i}" for i in range(10)]
    digest = write(kind.meta["filename"], {kind.meta["key"]: names})
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": digest})
    return written


def svhn(root: Path, monkeypatch, n: int = 5) -> np.ndarray:
    x = GENERATOR.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    splits = dict(SVHN.split_list)
    for split in ("train", "test"):
        path = root / f"{split}_32x32.mat"
        savemat(path, {"X": x, "y": np.array([[1], [10], [2], [3], [9]][:n], dtype=np.uint8)})
        digest = hashlib.md5(path.read_bytes()).hexdigest()
        splits[split] = [*splits[split][:2], digest]
    monkeypatch.setattr(SVHN, "split_list", splits)
    return x


def tiny_imagenet(root: Path) -> None:
    base = root / "tiny-imagenet-200"
    names = ["n01443537", "n01629819"]
    (base / "val" / "images").mkdir(parents=True)
    for i, name in enumerate(names):
        folder = base / "train" / name / "images"
        folder.mkdir(parents=True)
        for k in range(2):
            mode = "L" if k else "RGB"  # the set has grey pictures too
            Image.new(mode, (64, 64), 40 * i + 10 if k else (0, 200, 0)).save(
                folder / f"{name}_{k}.JPEG"
            )
        Image.new("RGB", (64, 64)).save(base / "val" / "images" / f"val_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t63\t63" for i, name in enumerate(names)]
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")


def test_cifar10_from_its_files(tmp_path, monkeypatch):
    written = cifar(tmp_path, CIFAR10, monkeypatch)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load_data("cifar10", root)
        assert (len(data.train), len(data.test), data.shape, data.classes[3]) == (
            20,
            4,
            (3, 32, 32),
            "class3",
        )
    images, labels = data.train.rows(slice(4, 8))
    expected = torch.from_numpy(written["data_batch_2"]).view(4, 3, 32, 32).float() / 255
    assert torch.equal(images, expected) and labels.tolist() == [0, 1, 2, 3] and data.mirror


def test_cifar100_svhn_and_tiny_imagenet_from_their_files(tmp_path, monkeypatch):
    cifar(tmp_path, CIFAR100, monkeypatch)
    assert load_data("cifar100", tmp_path).train.labels.tolist() == [0, 1, 2, 3]
    x = svhn(tmp_path, monkeypatch)
    data = load_data("svhn", tmp_path)
    assert (
        data.train.labels.tolist() == [1, 0, 2, 3, 9] and not data.mirror
    )  # the files say 10 for the digit 0
    assert torch.equal(data.train.images[2], torch.from_numpy(x[..., 2]).permute(2, 0, 1))
    tiny_imagenet(tmp_path)
    data = load_data("tiny-imagenet", tmp_path)
    assert (len(data.train), len(data.test), data.shape) == (4, 2, (3, 64, 64))
    assert data.train.labels.tolist() == [0, 0, 1, 1] and data.test.labels.tolist() == [0, 1]
    green, grey = (
        data.train.images[0].float().mean((1, 2)),
        data.train.images[1].float().mean((1, 2)),
    )
    assert green[1] > 150 > green[0] and torch.equal(grey, grey[:1].expand(3))


def test_digits_are_embedded():
    data, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert (len(data.train), len(data.test), data.shape) == (1200, 597, (1, 16, 16))
    assert torch.equal(data.train.images, again.train.images) and not torch.equal(
        data.train.images, other.train.images
    )
    assert float(data.train.images.min()) == 0 and float(data.train.images.max()) == 1
    assert data.train.labels.bincount().min() > 100


class Evil:
    def __init__(self, witness: Path):
        self.witness = witness

    def __reduce__(self):
        return (Path.touch, (self.witness,))


@pytest.mark.parametrize("file", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_pickle_that_was_not_published_is_never_loaded(tmp_path, monkeypatch, file):
    cifar(tmp_path, CIFAR10, monkeypatch)
    path, witness = tmp_path / "cifar-10-batches-py" / file, tmp_path / "executed"
    whole, hostile = path.read_bytes(), pickle.dumps(Evil(witness))
    for content in (hostile, whole[:-20], whole + hostile, b""):
        path.write_bytes(content)
        with pytest.raises(
            DataError, match="missing, or they are not the published ones.*cifar-10-batches-py/"
        ):
            load_data("cifar10", tmp_path)
    path.unlink()
    for make in (Path.mkdir, os.mkfifo):  # neither is opened
        make(path)
        with pytest.raises(DataError, match="not the published ones"):
            load_data("cifar10", tmp_path)
        path.rmdir() if path.is_dir() else path.unlink()
    assert not witness.exists()
    pickle.loads(hostile)
    assert witness.exists()


def test_damaged_svhn_and_tiny_imagenet(tmp_path, monkeypatch):
    with pytest.raises(
        DataError, match=r"svhn: files in .*Expected there: train_32x32.mat and test_32x32.mat"
    ):
        load_data("svhn", tmp_path)
    svhn(tmp_path, monkeypatch)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"svhn: files in .* not the published ones"):
        load_data("svhn", tmp_path)
    tiny_imagenet(tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    picture = base / "train" / "n01443537" / "images" / "n01443537_0.JPEG"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:300])
    with pytest.raises(DataError, match=r"n01443537_0.JPEG: it cannot be decoded.*Expected in"):
        load_data("tiny-imagenet", tmp_path)
    Image.new("RGB", (32, 32)).save(picture)
    with pytest.raises(DataError, match=r"n01443537_0.JPEG has 32x32 pixels, and 64x64 are needed"):
        load_data("tiny-imagenet", tmp_path)
    picture.write_bytes(whole)
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\n")
    with pytest.raises(DataError, match="a file name and a class per line, got 'val_0.JPEG"):
        load_data("tiny-imagenet", tmp_path)
    for file in (base / "train" / "n01629819" / "images").iterdir():
        file.unlink()
    with pytest.raises(
        DataError, match=r"tiny-imagenet: Found no valid file for the classes n01629819"
    ):
        load_data("tiny-imagenet", tmp_path)


def test_names_folders_and_values():
    with pytest.raises(
        DataError,
        match="Known image sets are digits, svhn, cifar10, cifar100, tiny-imagenet; got 'mnist'",
    ):
        load_data("mnist")
    with pytest.raises(DataError, match="cifar10 is read from a local folder, got None"):
        load_data("cifar10")
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])
    good = Images(images=x, labels=y)
    for bad, message in (
        (Images(images=2 * x - 1, labels=y), r"train: images must lie in \[0, 1\], got -.* to"),
        (Images(images=x * float("nan"), labels=y), r"images must lie in \[0, 1\]"),
        (
            Images(images=x.long(), labels=y),
            r"images must be bytes or floating point in \[0, 1\], got torch.int64",
        ),
        (Images(images=x, labels=y + 1), "labels must be 0 to 2 for 3 classes, got 1 to 3"),
        (Images(images=x, labels=y - 1), "labels must be 0 to 2 for 3 classes, got -1 to 1"),
        (
            Images(images=x, labels=y[:3]),
            r"images of shape .* are needed; got \(4, 1, 8, 8\), 3 labels",
        ),
        (Images(images=x[0], labels=y), "images of shape"),
    ):
        with pytest.raises(DataError, match=message):
            ImageData(name="mine", train=bad, test=good, classes=("a", "b", "c"))


def test_tiny_imagenet_opens_pictures_of_its_own_folder_only(tmp_path):
    tiny_imagenet(tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    annotations = base / "val" / "val_annotations.txt"
    good = annotations.read_text()
    Image.new("RGB", (64, 64)).save(tmp_path / "mine.JPEG")
    for line in ("../../../mine.JPEG", str(tmp_path / "mine.JPEG"), "a\0b.JPEG", "..", "x" * 300):
        annotations.write_text(f"{line}\tn01443537\n")
        with pytest.raises(DataError, match="val_annotations.txt needs|cannot be read|is a folder"):
            load_data("tiny-imagenet", tmp_path)
    annotations.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="tiny-imagenet: .utf-8. codec can't decode"):
        load_data("tiny-imagenet", tmp_path)
    annotations.write_text(good)
    picture = base / "val" / "images" / "val_1.JPEG"
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(DataError, match="val_1.JPEG is a pipe or a device"):
        load_data("tiny-imagenet", tmp_path)
    picture.unlink()
    Image.new("RGB", (64, 64)).save(picture, format="EPS")  # Pillow would start Ghostscript
    with pytest.raises(DataError, match="val_1.JPEG: it is no picture of a kind that is read"):
        load_data("tiny-imagenet", tmp_path)
    large = io.BytesIO()
    Image.new("1", (64, 64)).save(large, format="PNG")
    header = large.getvalue().replace(
        (64).to_bytes(4, "big") * 2, (2**15).to_bytes(4, "big") * 2, 1
    )
    picture.write_bytes(header[:29] + zlib.crc32(header[12:29]).to_bytes(4, "big") + header[33:])
    with pytest.raises(DataError, match="val_1.JPEG: it (cannot be decoded|has .* pixels)"):
        load_data("tiny-imagenet", tmp_path)


def test_images_a_rounding_error_outside_are_taken_for_black_and_white():
    x = torch.rand(8, 3, 4, 4)
    x[:, :, 0, 0], x[:, :, 0, 1] = -3e-8, 1 + 6e-8
    images = Images(images=x, labels=torch.arange(8) % 2)
    check_images(images, 2, "mine")
    assert float(images.images.min()) == 0 and float(images.images.max()) == 1
    assert (
        torch.equal(images.images, x.clamp(0, 1)) and float(x.max()) > 1
    )  # the caller's stay as they are
    for wrong in (x - 2e-4, x + 2e-4):
        with pytest.raises(DataError, match=r"mine: images must lie in \[0, 1\], got"):
            check_images(Images(images=wrong, labels=torch.arange(8) % 2), 2, "mine")
