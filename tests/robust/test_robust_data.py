"""Image sets: small files in the true formats are read, and every kind of damage is refused with the expected layout."""

import contextlib
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

from hipp_ext.errors import DataError
from hipp_ext.robust import ImageData, Images, load_data, published
from hipp_ext.robust.batch_files import BatchFileError, parse_batch
from hipp_ext.robust.data import check_images

GENERATOR = np.random.default_rng(0)


def pictures(n: int) -> np.ndarray:
    return GENERATOR.integers(0, 256, (n, 3072), dtype=np.uint8)


def cifar10(root: Path, n: int = 4) -> dict[str, np.ndarray]:
    folder = root / "cifar-10-batches-py"
    folder.mkdir()
    written = {}
    for name in [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]:
        written[name] = pictures(n)
        content = {
            b"data": written[name],
            b"labels": list(range(n)),
            b"batch_label": b"x",
            b"filenames": [b"a.png"] * n,
        }
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    names = [f"class{i}".encode() for i in range(10)]
    (folder / "batches.meta").write_bytes(
        pickle.dumps({b"label_names": names, b"num_vis": 3072}, protocol=2)
    )
    return written


def cifar100(root: Path, n: int = 4) -> None:
    folder = root / "cifar-100-python"
    folder.mkdir()
    for name in ("train", "test"):
        content = {b"data": pictures(n), b"fine_labels": [99] * n, b"coarse_labels": [0] * n}
        (folder / name).write_bytes(pickle.dumps(content, protocol=2))
    (folder / "meta").write_bytes(
        pickle.dumps({b"fine_label_names": [str(i).encode() for i in range(100)]}, protocol=2)
    )


def svhn(root: Path, n: int = 5) -> np.ndarray:
    x = GENERATOR.integers(0, 256, (32, 32, 3, n), dtype=np.uint8)
    for split in ("train", "test"):
        savemat(
            root / f"{split}_32x32.mat",
            {"X": x, "y": np.array([[1], [10], [2], [3], [9]][:n], dtype=np.uint8)},
        )
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
            Image.new(mode, (64, 64), 40 * i + 10 if k else (0, 200, 0)).save(
                folder / f"{name}_{k}.JPEG"
            )
        Image.new("RGB", (64, 64)).save(base / "val" / "images" / f"val_{i}.JPEG")
    rows = [f"val_{i}.JPEG\t{name}\t0\t0\t63\t63" for i, name in enumerate(names)]
    (base / "val" / "val_annotations.txt").write_text("\n".join(rows) + "\n")


def test_cifar10_from_its_files(tmp_path):
    written = cifar10(tmp_path)
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


def test_cifar100_svhn_and_tiny_imagenet_from_their_files(tmp_path):
    cifar100(tmp_path)
    assert load_data("cifar100", tmp_path).train.labels.tolist() == [99] * 4
    x = svhn(tmp_path)
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
    with pytest.raises(
        DataError,
        match=r"svhn: .* has no train_32x32.mat. Expected there: train_32x32.mat and test_32x32.mat",
    ):
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


def test_arrays_are_read_as_any_numpy_wrote_them():
    """What numpy 1 and numpy 2 wrote is read, by Python 2 and 3, and nothing is unpickled."""
    array = np.arange(6, dtype=np.uint8).reshape(2, 3)
    for protocol in (2, 3, 4):
        for held in (array, np.asfortranarray(array)):
            text = pickle.dumps(
                {b"data": held, "names": ["a", b"b"], b"n": (1, 2.5, None, True)}, protocol=protocol
            )
            loaded = parse_batch(text)
            assert np.array_equal(loaded[b"data"], array)
            assert loaded["names"] == ["a", b"b"] and loaded[b"n"] == (1, 2.5, None, True)
            old = (
                text.replace(b"numpy._core.multiarray", b"numpy.core.multiarray")
                if protocol < 4
                else text
            )
            assert np.array_equal(parse_batch(old)[b"data"], array)
    # As Python 2 wrote it: text is bytes, numbers that stand for booleans are 0 and 1.
    two = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\nq\x04K\x00\x85U\x01b\x87Rq\x05"
        b"(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
        b"\x89U\x06\x00\x01\x02\x03\x04\x05tbu."
    )
    assert np.array_equal(parse_batch(two)[b"data"], array)


class Pointers:
    """What numpy's own unpickling takes for an array of objects: its bytes become addresses."""

    def __reduce__(self):
        state = (1, (64, 3072), np.dtype("O"), False, b"A" * 64)
        return (np.ndarray.__reduce__(np.empty(0, np.uint8))[0], (np.ndarray, (0,), b"b"), state)


def _pickled(data) -> bytes:
    return pickle.dumps({b"data": data}, protocol=2)


def _tuples(depth: int) -> bytes:
    return b"\x80\x02}N" + b"\x85" * depth + b"Ns."


HOSTILE = {
    "addresses": (_pickled(Pointers()), "an array of something else than bytes"),
    "a length beyond the file": (
        b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b".",
        "expected .* bytes",
    ),
    "a place in the memo": (b"\x80\x02}r\xff\xff\xff\x7f.", None),
    "a shape beyond its data": (
        pickle.dumps({b"data": np.zeros((2, 3), np.uint8)}, protocol=2).replace(
            b"K\x02K\x03\x86", b"J\xff\xff\xff\x7fK\x03\x86"
        ),
        "an array whose shape is not that of its data",
    ),
    "text over and over": (
        b"\x80\x02}c_codecs\nencode\nq\x00X\x00\x02\x00\x00"
        + b"a" * 512
        + b"q\x01X\x06\x00\x00\x00latin1\x86q\x02"
        + b"h\x00h\x02R" * 50
        + b".",
        "text that is no bytes",
    ),
    "keys that are never hashed": (_tuples(1000), "a key of type tuple"),
    "a call of what was called": (b"\x80\x02}cnumpy\nndarray\n)R)R.", "do not fit together"),
    "another dtype": (_pickled(np.zeros(3, np.int64)), "an array of something else than bytes"),
    "a name in a list": (b"\x80\x02]cnumpy\nndarray\na.", "a dictionary was expected, got list"),
    "persistent names": (b"\x80\x02}P1\n.", "it holds a PERSID"),
    "half a mark": (b"\x80\x02}(u(.", "do not fit|ValueError|object"),
    "nothing": (b"", "pickle exhausted"),
}


@pytest.mark.parametrize("what", HOSTILE)
def test_hostile_batch_files(what):
    text, message = HOSTILE[what]
    if message is None:
        assert parse_batch(text) == {}
    else:
        with pytest.raises(BatchFileError, match=message):
            parse_batch(text)


def test_mutated_batch_files_are_read_or_refused():
    whole = pickle.dumps(
        {b"data": pictures(1)[:, :60].copy(), b"labels": [1, 2], b"names": [b"a"] * 3}, protocol=2
    )
    generator = np.random.default_rng(1)
    read = 0
    for _ in range(3000):
        text = bytearray(
            whole[: generator.integers(1, len(whole) + 1)] if generator.random() < 0.2 else whole
        )
        for place in generator.integers(0, len(text), generator.integers(1, 4)):
            text[place] = generator.integers(0, 256)
        with contextlib.suppress(BatchFileError):
            parse_batch(bytes(text))
            read += 1
    assert 100 < read < 2900


def test_a_matrix_that_unpacks_to_more_than_any_file_of_the_set(tmp_path, monkeypatch):
    svhn(tmp_path)
    zeros = {"X": np.zeros((32, 32, 3, 64), np.uint8), "y": np.ones((64, 1))}
    savemat(tmp_path / "train_32x32.mat", zeros, do_compression=True)
    assert len(load_data("svhn", tmp_path).train) == 64
    monkeypatch.setattr(published, "MOST_MATRICES", 2**15)
    with pytest.raises(
        DataError, match=r"train_32x32.mat is damaged or truncated \(unpacked it has more than 0 MB"
    ):
        load_data("svhn", tmp_path)
    monkeypatch.undo()
    for content, message in (
        (
            {"X": np.zeros((32, 32, 3, 2), object), "y": np.ones((2, 1))},
            r"X must be bytes of shape",
        ),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.ones((3, 1))},
            r"X has the shape \(32, 32, 3, 2\) and y \(3, 1\)",
        ),
        (
            {"X": np.zeros((32, 32, 3, 2), np.uint8), "y": np.full((2, 1), np.nan)},
            "labels from 1 to 10",
        ),
    ):
        savemat(tmp_path / "test_32x32.mat", content)
        with pytest.raises(DataError, match=message):
            load_data("svhn", tmp_path)
    (tmp_path / "test_32x32.mat").write_bytes(bytes(2**16))
    with pytest.raises(DataError, match="it is made of something else than a few matrices"):
        load_data("svhn", tmp_path)


def test_tiny_imagenet_opens_pictures_of_its_own_folder_only(tmp_path):
    tiny_imagenet(tmp_path)
    base = tmp_path / "tiny-imagenet-200"
    annotations, wnids = base / "val" / "val_annotations.txt", base / "wnids.txt"
    good, names = annotations.read_text(), wnids.read_text()
    Image.new("RGB", (64, 64)).save(tmp_path / "mine.JPEG")
    for line in (
        "../../../mine.JPEG",
        str(tmp_path / "mine.JPEG"),
        "a\0b.JPEG",
        "x" * 300,
        "val_0.JPEG\tn01443537\nval_0.JPEG",
    ):
        annotations.write_text(f"{line}\tn01443537\n")
        with pytest.raises(DataError, match="val_annotations.txt is damaged"):
            load_data("tiny-imagenet", tmp_path)
    annotations.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="val_annotations.txt is damaged.*utf-8"):
        load_data("tiny-imagenet", tmp_path)
    annotations.write_text(good)
    for name in ("../../elsewhere", "x" * 300):
        wnids.write_text(f"{names}{name}\n")
        with pytest.raises(DataError, match="wnids.txt is damaged"):
            load_data("tiny-imagenet", tmp_path)
    wnids.write_text(names)
    picture = base / "val" / "images" / "val_1.JPEG"
    picture.unlink()
    os.mkfifo(picture)
    with pytest.raises(DataError, match="val_1.JPEG is damaged or truncated .it is missing"):
        load_data("tiny-imagenet", tmp_path)
    picture.unlink()
    Image.new("RGB", (64, 64)).save(picture, format="EPS")  # Pillow would start Ghostscript
    with pytest.raises(
        DataError, match="val_1.JPEG is damaged or truncated .cannot identify image file"
    ):
        load_data("tiny-imagenet", tmp_path)
    large = io.BytesIO()
    Image.new("1", (64, 64)).save(large, format="PNG")
    header = large.getvalue().replace(
        (64).to_bytes(4, "big") * 2, (2**15).to_bytes(4, "big") * 2, 1
    )
    picture.write_bytes(header[:29] + zlib.crc32(header[12:29]).to_bytes(4, "big") + header[33:])
    with pytest.raises(
        DataError,
        match="val_1.JPEG is damaged or truncated .(Image size .* exceeds limit|64x64 pixels)",
    ):
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
