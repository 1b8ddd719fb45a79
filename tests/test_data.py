"""Data sets as they lie on disk, and a synthetic one; the errors of missing and broken ones."""

import io
import json
import shutil
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from helpers import refuses
from PIL import Image

from experiments import data
from experiments.data import readers

SHARED = Path(__file__).resolve().parents[2] / "shared" / "data" / "tfds"
real = pytest.mark.skipif(not SHARED.is_dir(), reason="no data prepared for tensorflow-datasets")


def encoded(pixels, kind="PNG"):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


class Source(list):
    """What tensorflow_datasets.data_source returns, of records in two files."""

    def __init__(self, split, records):
        super().__init__(records)
        half = len(records) // 2
        files = types.SimpleNamespace(
            shard_lengths=[half, len(records) - half],
            filepaths=[Path(f"folder/{split}-0"), Path(f"folder/{split}-1")],
        )
        self.split, self.dataset_info = split, types.SimpleNamespace(splits={split: files})

    def __getitems__(self, indices):
        return [self[index] for index in indices]


@pytest.fixture
def sources(monkeypatch):
    """Splits by name that stand in for the files of tensorflow-datasets."""
    import tensorflow_datasets

    found = {}

    def data_source(name, *, split, data_dir, decoders):
        return Source(split, found[split])

    monkeypatch.setattr(tensorflow_datasets, "data_source", data_source)
    monkeypatch.setattr(readers, "_prepare", lambda name, data_dir: None)
    data._read.cache_clear()
    yield found
    data._read.cache_clear()


def check_splits(dataset, validation=0.1):
    """Sizes, types and ranges of all three splits."""
    train, held_out, test = dataset.train, dataset.validation, dataset.test
    total = len(train.labels) + len(held_out.labels)
    assert len(held_out.labels) == round(validation * total)
    for split in (train, held_out, test):
        assert split.images.shape == (len(split.labels), *dataset.image_shape)
        assert split.images.dtype == np.uint8
        assert split.labels.dtype == np.int32
        assert (split.images <= dataset.scale).all()
        assert ((split.labels >= 0) & (split.labels < dataset.num_classes)).all()
        assert not split.images.flags.writeable


@pytest.mark.parametrize("name", ["made", "digits"])
@pytest.mark.parametrize("validation", [0.1, 0, 0.25])
def test_validation_is_the_end_of_the_training_images(name, validation):
    whole, parts = data.load(name, validation=0), data.load(name, validation=validation)
    check_splits(parts, validation)
    for field in ("images", "labels"):
        joined = [getattr(parts.train, field), getattr(parts.validation, field)]
        np.testing.assert_array_equal(np.concatenate(joined), getattr(whole.train, field))
        np.testing.assert_array_equal(getattr(parts.test, field), getattr(whole.test, field))


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    digits = data.load("digits", validation=0)
    assert (len(digits.train.labels), len(digits.test.labels)) == (1438, 359)
    found = {
        (*image.ravel().tolist(), label)
        for split in (digits.train, digits.test)
        for image, label in zip(split.images, split.labels.tolist(), strict=True)
    }
    raw = load_digits()
    assert found == {(*x, y) for x, y in zip(raw.data, raw.target, strict=True)}
    images = digits.normalize(digits.train.images)
    assert abs(images.mean()) < 1e-5
    assert abs(images.std() - 1) < 1e-5


@pytest.mark.parametrize("shape", [(28, 28, 1), (32, 32, 3), (7, 5, 2)])
def test_synthetic_images_can_be_learned_and_are_always_the_same(shape):
    """The nearest class mean tells the test images apart."""
    synthetic = data.load("made", image_shape=shape)
    check_splits(synthetic)
    assert synthetic.image_shape == shape
    assert np.bincount(synthetic.test.labels).min() >= 12
    means = [synthetic.train.images[synthetic.train.labels == c].mean(axis=0) for c in range(10)]
    errors = [((synthetic.test.images - mean) ** 2).sum(axis=(1, 2, 3)) for mean in means]
    assert (np.argmin(errors, axis=0) == synthetic.test.labels).mean() > 0.95
    data._read.cache_clear()
    again = data.load("made", image_shape=shape)
    assert again.train.images is not synthetic.train.images
    np.testing.assert_array_equal(again.train.images, synthetic.train.images)
    images = synthetic.normalize(synthetic.train.images)
    assert abs(images.mean()) < 0.1
    assert abs(images.std() - 1) < 0.1


@pytest.mark.parametrize(
    ("name", "mean", "std"),
    [
        ("mnist", [0.1307], [0.3081]),
        ("cifar10", [0.4914, 0.4822, 0.4465], [0.2023, 0.1994, 0.2010]),
        ("tiny_imagenet", [0.5] * 3, [0.5] * 3),
    ],
)
def test_images_are_normalized_as_the_paper_says(name, mean, std):
    spec = data._SPECS[name]
    split = readers.Split(np.zeros((1, *spec.shape), np.uint8), np.zeros(1, np.int32))
    dataset = data.Dataset(
        name, split, split, split, spec.num_classes, spec.scale, spec.mean, spec.std, spec.change
    )
    pixels = np.random.default_rng(0).integers(256, size=(2, *spec.shape), dtype=np.uint8)
    expected = (pixels.astype(np.float64) / 255 - mean) / std
    found = dataset.normalize(pixels)
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=2e-6)
    np.testing.assert_allclose(jax.jit(dataset.normalize)(pixels), expected, atol=2e-6)


def test_augmented_images_are_normalized_after_the_change():
    synthetic = data.load("made", image_shape=(8, 8, 3))
    key, images = jax.random.key(0), synthetic.train.images[:4]
    np.testing.assert_array_equal(synthetic.augment(key, images), synthetic.normalize(images))
    dark = data.dataclasses.replace(synthetic, change=lambda key, unit: unit / 2)
    expected = (images / 255.0 / 2 - 0.5) / 0.2
    np.testing.assert_allclose(dark.augment(key, images), expected, atol=2e-6)


@real
def test_mnist_is_whole_and_has_the_moments_that_normalize_it():
    """All test images by class; mean and square of 3000 training images to 4 standard errors."""
    train, test = (readers._source("mnist", split, str(SHARED)) for split in ("train", "test"))
    assert (len(train), len(test)) == (60_000, 10_000)
    split = readers._decode_all(test, (28, 28, 1), 10)
    counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(split.labels).tolist() == counts
    records = train.__getitems__(list(range(0, 60_000, 20)))
    pixels = np.stack([readers._decode(one["image"], (28, 28, 1)) for one in records]) / 255
    for power, expected in ((1, 0.1307), (2, 0.1307**2 + 0.3081**2)):
        means = (pixels**power).mean(axis=(1, 2, 3))
        assert abs(means.mean() - expected) < 4 * means.std() / np.sqrt(3000)


@real
def test_cifar10_is_read_as_tensorflow_datasets_reads_it():
    """As it decodes the first test images; the rest by count alone."""
    import tensorflow_datasets

    source = tensorflow_datasets.data_source("cifar10", split="test", data_dir=str(SHARED))
    expected = source.__getitems__(list(range(50)))
    encoded_source = readers._source("cifar10", "test", str(SHARED))
    assert len(encoded_source) == 10_000
    records = encoded_source.__getitems__(list(range(50)))
    for record, one in zip(records, expected, strict=True):
        assert record["label"] == one["label"]
        found = readers._decode(record["image"], (32, 32, 3))
        np.testing.assert_array_equal(found, one["image"])


@pytest.mark.parametrize("name", ["fashion_mnist", "cifar100", "imagenet2012"])
def test_sets_of_tensorflow_datasets_keep_pixels_and_order(name, sources):
    shape = data._SPECS[name].shape
    generator = np.random.default_rng(0)
    size = 40 if name != "imagenet2012" else 10
    pixels = generator.integers(256, size=(size, *shape), dtype=np.uint8)
    records = [{"image": encoded(p.squeeze()), "label": i % 10} for i, p in enumerate(pixels)]
    test = "validation" if name == "imagenet2012" else "test"
    sources.update({"train": records, test: records[:5]})
    found = data.load(name)
    check_splits(found)
    joined = np.concatenate([found.train.images, found.validation.images])
    np.testing.assert_array_equal(joined, pixels)
    np.testing.assert_array_equal(found.test.images, pixels[:5])
    assert found.test.labels.tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize(("height", "width"), [(128, 128), (128, 200), (200, 128)])
def test_imagenet_is_resized_and_cropped_at_the_center(sources, height, width):
    """7/8 of the shorter side, 112 pixels, become 28: a ramp says where each was taken from."""
    rows, columns = np.mgrid[:height, :width]
    pixels = np.stack([rows, columns, 0 * rows], axis=-1).astype(np.uint8)
    sources["train"] = sources["validation"] = [{"image": encoded(pixels), "label": 7}] * 2
    found = data.load("imagenet2012", image_shape=(28, 28, 3))
    assert found.test.labels.tolist() == [7, 7]
    center = np.arange(28) * 4 + 1.5 - 56  # of four pixels, from the center of the image
    image = found.test.images[0]
    np.testing.assert_allclose(image[..., 0], (center + height / 2)[:, None] + 0 * center, atol=1)
    np.testing.assert_allclose(image[..., 1], center + width / 2 + 0 * center[:, None], atol=1)


def test_gray_images_of_a_color_set_become_colored(sources):
    gray = np.arange(1024, dtype=np.uint8).reshape(32, 32)
    sources["train"] = sources["test"] = [{"image": encoded(gray), "label": 1}] * 2
    found = data.load("cifar10").test.images[0]
    np.testing.assert_array_equal(found, np.repeat(gray[..., None], 3, axis=-1))


def test_downloads_are_prepared_without_tensorflow(tmp_path, monkeypatch):
    """The real builder of CIFAR-100, given a few images in the original's binary format."""
    from tensorflow_datasets.core.download import DownloadManager

    binary, prepared = tmp_path / "cifar-100-binary", tmp_path / "prepared"
    binary.mkdir()
    prepared.mkdir()
    rows = np.random.default_rng(0).integers(256, size=(30, 2 + 3072), dtype=np.uint8)
    rows[:, 0], rows[:, 1] = 7, np.arange(30)  # a coarse label, then the one that counts
    for name in ("train.bin", "test.bin"):
        (binary / name).write_bytes(rows.tobytes())
    for name, size in (("coarse", 20), ("fine", 100)):
        lines = "".join(f"{number}\n" for number in range(size))
        (binary / f"{name}_label_names.txt").write_text(lines)
    monkeypatch.setattr(DownloadManager, "download_and_extract", lambda self, url: tmp_path)
    found = data.load("cifar100", str(prepared), validation=0)
    check_splits(found, 0)
    for split in (found.train, found.test):
        assert sorted(split.labels) == [*range(30)]
        expected = rows[split.labels, 2:].reshape(30, 3, 32, 32).transpose(0, 2, 3, 1)
        np.testing.assert_array_equal(split.images, expected)
    assert "tensorflow" not in sys.modules


@pytest.fixture
def tiny(tmp_path):
    """A folder as the archive of Tiny ImageNet makes it, with three images a class."""
    root = tmp_path / "tiny-imagenet-200"
    wnids = [f"n{number:08}" for number in np.random.default_rng(0).permutation(200)]
    (root / "val" / "images").mkdir(parents=True)
    for wnid in wnids:
        folder = root / "train" / wnid / "images"
        folder.mkdir(parents=True)
        for number in (2, 10, 30):
            color = np.full((64, 64, 3), (int(wnid[1:]), number, 0), np.uint8)
            (folder / f"{wnid}_{number}.JPEG").write_bytes(encoded(color))
    lines = []
    for number, wnid in enumerate(wnids[:20]):
        gray = np.full((64, 64), number, np.uint8)
        (root / "val" / "images" / f"val_{number}.JPEG").write_bytes(encoded(gray))
        lines.append(f"val_{number}.JPEG\t{wnid}\t0\t0\t62\t62\n")
    (root / "wnids.txt").write_text("".join(f"{wnid}\n" for wnid in wnids))
    (root / "val" / "val_annotations.txt").write_text("".join(lines))
    return root


def test_tiny_imagenet_is_interleaved_by_class(tiny):
    found = data.load("tiny_imagenet", str(tiny.parent))
    check_splits(found)
    assert (len(found.train.labels), len(found.validation.labels)) == (540, 60)
    assert found.train.labels.tolist() == [*range(200)] * 2 + [*range(140)]
    first = found.train.images[:, 0, 0]
    np.testing.assert_array_equal(first[:, 0], found.train.labels)  # the class, by number
    assert first[:, 1].tolist() == [2] * 200 + [10] * 200 + [30] * 140  # not 10, 2, 30
    assert found.test.images[:, 5, 5, 2].tolist() == [*range(20)]
    wnids = (tiny / "wnids.txt").read_text().split()
    assert found.test.labels.tolist() == [int(wnid[1:]) for wnid in wnids[:20]]
    assert found.num_classes == 200


def test_broken_files_of_tiny_imagenet_are_named(tiny):
    broken = tiny / "train" / "n00000003" / "images" / "n00000003_10.JPEG"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    with refuses("n00000003_10.JPEG", "Unpack http"):
        data.load("tiny_imagenet", str(tiny.parent))
    broken.unlink()
    with refuses("train", "2 to 3 images"):
        data.load("tiny_imagenet", str(tiny.parent))
    broken.write_bytes(whole)
    annotations = tiny / "val" / "val_annotations.txt"
    lines = annotations.read_text()
    for text, told in (
        (lines.replace("n", "m", 1), "line 1"),
        (lines + "val_3.JPEG\n", "line 21"),
        (lines + "\n", "line 21"),
        ("", "no lines"),
    ):
        annotations.write_text(text)
        with refuses(str(annotations), told, "Unpack http"):
            data.load("tiny_imagenet", str(tiny.parent))
    annotations.write_text(lines)
    broken.write_bytes(encoded(np.zeros((64, 63, 3), np.uint8)))
    with refuses("n00000003_10.JPEG", "64 x 63 pixels"):
        data.load("tiny_imagenet", str(tiny.parent))
    annotations.unlink()
    with refuses("val_annotations.txt", error=FileNotFoundError):
        data.load("tiny_imagenet", str(tiny.parent))


@pytest.mark.parametrize("position", [0, 4, 5, 9])
def test_the_broken_one_of_several_files_is_named(sources, position):
    records = [{"image": encoded(np.zeros((32, 32, 3), np.uint8)), "label": 0}] * 10
    records[position] = {"image": b"no image", "label": 0}
    sources.update(train=records, test=records[:1])
    with refuses(f"folder/train-{position // 5}", f"image {position} ", "Delete folder"):
        data.load("cifar10")


def gray(*shape):
    return np.zeros(shape, np.uint8)


@pytest.mark.parametrize(
    ("name", "record", "told"),
    [
        *[("mnist", {"label": label}, label) for label in (-1, 10, 255, 2**40)],
        ("cifar100", {"label": 100}, "[0, 99]"),
        ("fashion_mnist", {"label": 1.5}, "float"),
        ("mnist", {"image": gray(28, 27)}, "28 x 27 pixels"),
        ("mnist", {"image": gray(56, 56)}, "56 x 56 pixels"),
        ("mnist", {"image": gray(28, 28, 3)}, "'RGB'"),
        ("fashion_mnist", {"image": gray(28, 28).astype(np.uint16)}, "'I;16'"),
        ("cifar10", {"image": gray(28, 28)}, "28 x 28 pixels"),
        ("cifar10", {"image": gray(32, 32).astype(np.uint16)}, "'I;16'"),
        ("imagenet2012", {"label": 1000}, "[0, 999]"),
        ("imagenet2012", {"image": gray(32, 32).astype(bool)}, "'1'"),
    ],
)
def test_records_that_do_not_belong_to_a_set_are_refused(name, record, told, sources):
    """In either split, with the file, the record in it and what is wrong with it."""
    shape = data._SPECS[name].shape
    good = {"image": gray(*shape).squeeze(), "label": 0}
    test = "validation" if name == "imagenet2012" else "test"
    for split, position in (("train", 0), ("train", 3), (test, 2)):
        for found in ("train", test):
            records = [good] * 4
            if found == split:
                records[position] = {**good, **record}
            sources[found] = [{**one, "image": encoded(one["image"])} for one in records]
        data._read.cache_clear()
        where = f"folder/{split}-{position // 2} cannot be read at record {position % 2} "
        with refuses(where, f"image {position} ", told, "Delete folder"):
            data.load(name)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet2012"])
def test_an_empty_split_is_refused(name, sources):
    test = "validation" if name == "imagenet2012" else "test"
    image = encoded(gray(*data._SPECS[name].shape).squeeze())
    for empty in ("train", test):
        sources["train"] = sources[test] = [{"image": image, "label": 0}] * 2
        sources[empty] = []
        data._read.cache_clear()
        with refuses("folder", f"no images in the split {empty!r}"):
            data.load(name)


@real
@pytest.mark.parametrize("lengths", [[], ["0"], None])
def test_an_empty_split_on_disk_is_no_missing_set(tmp_path, lengths):
    """The set is there, so nobody is sent to download it."""
    folder = tmp_path / "mnist" / "3.0.1"
    folder.mkdir(parents=True)
    for path in (SHARED / "mnist" / "3.0.1").iterdir():
        (folder / path.name).symlink_to(path)
    info = json.loads((folder / "dataset_info.json").read_text())
    [test] = [split for split in info["splits"] if split["name"] == "test"]
    if lengths is None:
        info["splits"].remove(test)
    else:
        test["shardLengths"] = lengths
    (folder / "dataset_info.json").unlink()
    (folder / "dataset_info.json").write_text(json.dumps(info))
    with refuses(str(folder), "no images of the split 'test'") as raised:
        data.load("mnist", str(tmp_path))
    assert "network" not in str(raised.value)


@real
@pytest.mark.parametrize("damage", ["truncated", "overwritten", "removed"])
def test_real_files_that_are_broken_are_named(tmp_path, damage):
    folder = tmp_path / "mnist" / "3.0.1"
    shutil.copytree(SHARED / "mnist" / "3.0.1", folder, copy_function=shutil.copyfile)
    path = folder / "mnist-train.array_record-00000-of-00001"
    if damage == "removed":
        path.unlink()
    else:
        with path.open("r+b") as file:
            size = file.seek(0, 2)
            file.seek(size // 100)
            if damage == "truncated":
                file.truncate()
            else:
                file.write(bytes(5000))
    with refuses(str(path), f"Delete {folder}"):
        data.load("mnist", str(tmp_path))


def test_missing_sets_say_where_they_come_from(tmp_path, monkeypatch):
    import tensorflow_datasets

    def offline(*arguments, **options):
        raise ConnectionError("no route")

    monkeypatch.setattr(tensorflow_datasets, "data_source", offline)
    monkeypatch.setattr(readers, "_prepare", offline)
    missing = str(tmp_path / "missing")
    with refuses("data_dir", missing, error=FileNotFoundError):
        data.load("mnist", missing)
    for name in ("mnist", "fashion_mnist", "cifar10", "cifar100"):
        with refuses("data_dir", name, tmp_path, "no route", error=FileNotFoundError):
            data.load(name, str(tmp_path))
    remedy = f"ILSVRC2012_img_val.tar into {tmp_path}/down"
    with refuses("data_dir", remedy, error=FileNotFoundError):
        data.load("imagenet2012", str(tmp_path))
    with refuses("data_dir", tmp_path, "Download http", error=FileNotFoundError):
        data.load("tiny_imagenet", str(tmp_path))


def test_a_set_larger_than_memory_is_refused_before_it_is_read(sources, monkeypatch):
    sources["train"] = sources["validation"] = [None] * 1000
    pages = {"SC_PHYS_PAGES": 100, "SC_PAGE_SIZE": 2**20}
    monkeypatch.setattr(readers.os, "sysconf", pages.__getitem__)
    # 100 MiB hold 2000 images of 132 x 132 x 3 pixels.
    with refuses("image_shape", "2,000 images", "(132, 132, 3)"):
        data.load("imagenet2012")


@pytest.mark.parametrize(
    ("name", "argument", "value"),
    [
        ("svhn", "name", "'svhn'"),
        ("made", "validation", 1),
        ("made", "image_shape", (8, 8)),
        ("made", "image_shape", (8, 0, 1)),
        ("imagenet2012", "image_shape", (8, 8, 1)),
        ("digits", "image_shape", (8, 8, 3)),
    ],
)
def test_bad_arguments_are_named(name, argument, value):
    with refuses(argument, value):
        data.load(name, **({} if argument == "name" else {argument: value}))
