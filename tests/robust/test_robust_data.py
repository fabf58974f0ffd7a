"""Image sets: small files in the true formats are read, and every kind of damage is refused with the expected layout."""

import io
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from scipy.io import savemat

from hipp_ext.errors import DataError
from hipp_ext.robust import ImageData, Images, load_data

GENERATOR = np.random.default_rng(0)


def pictures(n: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, (n, 3072), dtype=np.uint8)


def cifar10(root: Path, n: int = 4) -> dict[str, np.ndarray]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    written = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        written[name] = pictures(n)
        content = {b"data": written[name], b"labels": list(range(n)), b"batch_label": b"x", b"filenames": [b"a.png"] * n}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class{i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol=2))
    return written


def cifar100(root: Path, n: int = 4) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {b"data": pictures(n), b"fine_labels": [99] * n, b"coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(pickle.dumps({b"fine_label_names": [str(i).encode() for i in range(100)]}, protocol=2))


def svhn(root: Path, n: int = 5) -> np.ndarray:
    x = GENERATOR.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(root / f"{split}_32x32.mat", {"X": x, "y": np.array([[1], [10], [2], [3], [9]][:n], dtype=np.uint8)})
    return x


def tiny_imagenet(root: Path) -> None:
    base = root / "tiny-imagenet-200"
    names = ["n01443537", "n01629819"]
    (base / "val" / "images").mkdir(parents=True)
    (base / "wnids.txt").write_text("\n".join(names) + "\n")
    for i, name in enumerate(names):
        folder = base / "train" / name / "images"
        folder.mkdir(parents=True)
        for k in range(2):
            mode = "L" if k else "RGB"  # the set has grey pictures too
            Image.new(mode, (64, 64), 40 * i + 10 if k else (0, 200, 0)).save(folder / f"{name}_{k}.JPEG")
        Image.new("RGB", (64, 64)).save(base / "val" / "images" / f"val_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t63\t63" for i, name in enumerate(names)]
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")


def test_cifar10_from_its_files(tmp_path):
    written = cifar10(tmp_path)
    for root in (tmp_path, tmp_path / "cifar-10-batches-py"):
        data = load_data("cifar10", root)
        assert (len(data.train), len(data.test), data.shape, data.classes[3]) == (20, 4, (3, 32, 32), "class3")
    images, labels = data.train.rows(slice(4, 8))
    expected = torch.from_numpy(written["data_batch_2"]).view(4, 3, 32, 32).float() / 255
    assert torch.equal(images, expected) and labels.tolist() == [0, 1, 2, 3] and data.mirror


def test_cifar100_svhn_and_tiny_imagenet_from_their_files(tmp_path):
    cifar100(tmp_path)
    assert load_data("cifar100", tmp_path).train.labels.tolist() == [99] * 4
    x = svhn(tmp_path)
    data = load_data("svhn", tmp_path)
    assert data.train.labels.tolist() == [1, 0, 2, 3, 9] and not data.mirror  # the files say 10 for the digit 0
    assert torch.equal(data.train.images[2], torch.from_numpy(x[..., 2]).permute(2, 0, 1))
    tiny_imagenet(tmp_path)
    data = load_data("tiny-imagenet", tmp_path)
    assert (len(data.train), len(data.test), data.shape) == (4, 2, (3, 64, 64))
    assert data.train.labels.tolist() == [0, 0, 1, 1] and data.test.labels.tolist() == [0, 1]
    green, grey = data.train.images[0].float().mean((1, 2)), data.train.images[1].float().mean((1, 2))
    assert green[1] > 150 > green[0] and torch.equal(grey, grey[:1].expand(3))


def test_digits_are_embedded():
    data, again, other = load_data("digits"), load_data("digits"), load_data("digits", seed=1)
    assert (len(data.train), len(data.test), data.shape) == (1200, 597, (1, 16, 16))
    assert torch.equal(data.train.images, again.train.images) and not torch.equal(data.train.images, other.train.images)
    assert float(data.train.images.min()) == 0 and float(data.train.images.max()) == 1
    assert data.train.labels.bincount().min() > 100


class Evil:
    def __reduce__(self):
        return (os.system, ("touch /tmp/hipp-ext-was-here",))


def damage(root: Path, what: str) -> None:
    folder = root / "cifar-10-batches-py"
    path = folder / "data_batch_3"
    whole = path.read_bytes()
    content = pickle.loads(whole, encoding="bytes")
    if what == "truncated":
        path.write_bytes(whole[: len(whole) // 2])
    elif what == "missing":
        path.unlink()
    elif what == "code":
        path.write_bytes(pickle.dumps(Evil()))
    elif what == "labels":
        path.write_bytes(pickle.dumps(content | {b"labels": [10, 0, 0, 0]}))
    elif what == "fewer labels":
        path.write_bytes(pickle.dumps(content | {b"labels": [0]}))
    elif what == "shape":
        path.write_bytes(pickle.dumps(content | {b"data": content[b"data"][:, :100]}))
    elif what == "list":
        path.write_bytes(pickle.dumps([1, 2]))
    else:
        (folder / "batches.meta").write_bytes(pickle.dumps({}))


DAMAGE = {
    "truncated": r"data_batch_3 is damaged or truncated .*Expected layout: cifar-10-batches-py/ with data_batch_1",
    "missing": r"has no cifar-10-batches-py/data_batch_3. Expected there: cifar-10-batches-py/",
    "code": r"it names (posix|nt).system, which no file of this set holds; it was not loaded",
    "labels": r"cifar10 train: labels must be 0 to 9 for 10 classes, got 0 to 10",
    "fewer labels": r"4 pictures and 1 labels",
    "shape": r"data must be bytes of shape \(n, 3072\)",
    "list": r"a dictionary was expected, got list",
    "names": r"label_names must be a list of names",
}


@pytest.mark.parametrize("what", DAMAGE)
def test_damaged_cifar(tmp_path, what):
    cifar10(tmp_path)
    damage(tmp_path, what)
    with pytest.raises(DataError, match=DAMAGE[what]):
        load_data("cifar10", tmp_path)
    assert not Path("/tmp/hipp-ext-was-here").exists()


def test_damaged_svhn_and_tiny_imagenet(tmp_path):
    with pytest.raises(DataError, match=r"svhn: .* has no train_32x32.mat. Expected there: train_32x32.mat and test_32x32.mat"):
        load_data("svhn", tmp_path)
    svhn(tmp_path)
    path = tmp_path / "test_32x32.mat"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(DataError, match=r"svhn: .*test_32x32.mat is damaged or truncated"):
        load_data("svhn", tmp_path)
    savemat(path, {"X": np.zeros((8, 8), np.uint8), "y": np.zeros((1, 1))})
    with pytest.raises(DataError, match=r"X must be bytes of shape \(32, 32, 3, n\)"):
        load_data("svhn", tmp_path)
    tiny_imagenet(tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    picture = base / "train" / "n01443537" / "images" / "n01443537_0.JPEG"
    whole = picture.read_bytes()
    picture.write_bytes(whole[:300])
    with pytest.raises(DataError, match=r"n01443537_0.JPEG is damaged or truncated"):
        load_data("tiny-imagenet", tmp_path)
    Image.new("RGB", (32, 32)).save(picture)
    with pytest.raises(DataError, match=r"64x64 pixels were expected, got 32x32"):
        load_data("tiny-imagenet", tmp_path)
    picture.write_bytes(whole)
    (base / "val" / "val_annotations.txt").write_text("val_0.JPEG\tn99\t0\n")
    with pytest.raises(DataError, match="a line without a known class: 'val_0.JPEG"):
        load_data("tiny-imagenet", tmp_path)
    for file in (base / "train" / "n01629819" / "images").iterdir():
        file.unlink()
    with pytest.raises(DataError, match=r"no pictures of \['n01629819'\]"):
        load_data("tiny-imagenet", tmp_path)


def test_names_folders_and_values():
    with pytest.raises(DataError, match="Known image sets are digits, svhn, cifar10, cifar100, tiny-imagenet; got 'mnist'"):
        load_data("mnist")
    with pytest.raises(DataError, match="cifar10 is read from a local folder, got None"):
        load_data("cifar10")
    x, y = torch.rand(4, 1, 8, 8), torch.tensor([0, 1, 2, 1])
    good = Images(images=x, labels=y)
    for bad, message in (
        (Images(images=2 * x - 1, labels=y), r"train: images must lie in \[0, 1\], got -.* to"),
        (Images(images=x * float("nan"), labels=y), r"images must lie in \[0, 1\]"),
        (Images(images=x.long(), labels=y), r"images must be bytes or floating point in \[0, 1\], got torch.int64"),
        (Images(images=x, labels=y + 1), "labels must be 0 to 2 for 3 classes, got 1 to 3"),
        (Images(images=x, labels=y - 1), "labels must be 0 to 2 for 3 classes, got -1 to 1"),
        (Images(images=x, labels=y[:3]), r"images of shape .* are needed; got \(4, 1, 8, 8\), 3 labels"),
        (Images(images=x[0], labels=y), "images of shape"),
    ):
        with pytest.raises(DataError, match=message):
            ImageData(name="mine", train=bad, test=good, classes=("a", "b", "c"))


def test_only_arrays_are_unpickled():
    """What numpy 1 and numpy 2 wrote both load; io is the one way in."""
    from hipp_ext.robust.data import _ArraysOnly

    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (2, 3, 4):
        text = pickle.dumps({b"data": array, "names": ["a", b"b"]}, protocol=protocol)
        loaded = _ArraysOnly(io.BytesIO(text), encoding="bytes").load()
        assert np.array_equal(loaded[b"data"], array)
        old = text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray") if protocol < 4 else text
        assert np.array_equal(_ArraysOnly(io.BytesIO(old), encoding="bytes").load()[b"data"], array)
