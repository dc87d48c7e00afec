"""Readers: layouts of folders, both forms of CIFAR-10, the digits, and what is refused."""

from __future__ import annotations

import io
import os
import tarfile
import zipfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from flows import imaging
from flows.data.readers import open_source
from flows.data.source_image import Source
from flows.errors import DataError
from flows.imaging import ImageError


def save(path: Path, value: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (4, 4), (value, value, value)).save(path, format="PNG")
    return path


def listing(dataset: str, path: Path) -> Source:
    with open_source(dataset, path) as source:
        return source


def by_name(source: Source) -> dict[str, tuple[int | None, str | None]]:
    return {image.name: (image.label, image.split) for image in source.images}


# ------------------------------------------------------------ digits


def test_digits_are_scaled_exactly_to_eight_bits() -> None:
    from sklearn.datasets import load_digits

    expected = load_digits()
    source = listing("digits", Path("anything"))
    assert len(source.images) == 1797
    assert source.classes == [str(digit) for digit in range(10)]
    for number in (0, 1, 900, 1796):
        image = source.images[number]
        decoded = np.asarray(imaging.decode(image.load(10_000), max_pixels=64))
        assert image.label == expected.target[number]
        np.testing.assert_array_equal(np.rint(decoded[..., 0] * (16 / 255)), expected.images[number])
        assert decoded.max() == np.rint(expected.images[number].max() * 255 / 16)


# ------------------------------------------------------------ folder


def test_class_folders_are_sorted_and_read_recursively(tmp_path: Path) -> None:
    save(tmp_path / "dog" / "a.PNG")
    save(tmp_path / "cat" / "deep" / "er" / "b.jpeg")
    save(tmp_path / "cat" / ".hidden.png")
    save(tmp_path / ".cache" / "c.png")
    source = listing("folder", tmp_path)
    assert source.classes == ["cat", "dog"]
    assert by_name(source) == {"cat/deep/er/b.jpeg": (0, None), "dog/a.PNG": (1, None)}
    assert source.rejected == []


def test_split_folders_keep_their_splits(tmp_path: Path) -> None:
    for split in ("train", "validation", "Test"):
        for name in ("cat", "dog"):
            save(tmp_path / split / name / "x.png")
    (tmp_path / "README.md").write_text("about")
    source = listing("folder", tmp_path)
    assert by_name(source)["validation/dog/x.png"] == (1, "val")
    assert by_name(source)["Test/cat/x.png"] == (0, "test")
    assert {split for _, split in by_name(source).values()} == {"train", "val", "test"}
    assert source.rejected == [("README.md", "lies beside the split folders")]


@pytest.mark.parametrize("inner", ["", "everything/2024"], ids=["loose", "one folder"])
def test_images_without_class_folders_are_unlabelled(tmp_path: Path, inner: str) -> None:
    save(tmp_path / inner / "a.png")
    save(tmp_path / inner / "b.png")
    source = listing("folder", tmp_path)
    assert source.classes == []
    assert {label for label, _ in by_name(source).values()} == {None}
    assert len(source.images) == 2
    assert bool(source.notes) == bool(inner)


def test_other_files_are_rejected_with_a_reason(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "dog" / "a.png")
    (tmp_path / "cat" / "notes.txt").write_text("hello")
    (tmp_path / "cat" / "no_extension").write_text("hello")
    (tmp_path / "dog" / "gone.png").symlink_to("nowhere.png")
    os.mkfifo(tmp_path / "dog" / "pipe.png")
    assert listing("folder", tmp_path).rejected == [
        ("cat/no_extension", "not an image file (no extension)"),
        ("cat/notes.txt", "not an image file (.txt)"),
        ("dog/gone.png", "broken link"),
        ("dog/pipe.png", "not a regular file"),
    ]


def test_link_loops_end(tmp_path: Path) -> None:
    save(tmp_path / "cat" / "a.png")
    save(tmp_path / "dog" / "inner" / "b.png")
    (tmp_path / "dog" / "inner" / "up").symlink_to(tmp_path / "dog")
    (tmp_path / "cat" / "root").symlink_to(tmp_path)
    (tmp_path / "cat" / "self.png").symlink_to("self.png")
    source = listing("folder", tmp_path)
    assert list(by_name(source)) == ["cat/a.png", "dog/inner/b.png"]
    assert source.rejected == [("cat/self.png", "broken link")]


def test_linked_folders_are_followed(tmp_path: Path) -> None:
    save(tmp_path / "store" / "a.png")
    save(tmp_path / "set" / "dog" / "b.png")
    (tmp_path / "set" / "cat").symlink_to(tmp_path / "store")
    assert by_name(listing("folder", tmp_path / "set")) == {"cat/a.png": (0, None), "dog/b.png": (1, None)}


def test_unusual_names_survive(tmp_path: Path) -> None:
    save(tmp_path / "grüne Äpfel" / "ein bild (1).v2.png")
    save(tmp_path / "犬" / "わん.png")
    strange = os.fsencode(tmp_path / "犬") + b"/\xff\xfe.png"
    os.link(tmp_path / "犬" / "わん.png", strange)
    source = listing("folder", tmp_path)
    assert source.classes == ["grüne Äpfel", "犬"]
    names = [image.name for image in source.images]
    assert names == ["grüne Äpfel/ein bild (1).v2.png", "犬/わん.png", "犬/\\xff\\xfe.png"]
    assert "\n".join(names).encode("utf-8")
    assert source.images[2].load(10_000) == source.images[1].load(10_000)


def layout(root: Path, *files: str) -> None:
    for name in files:
        save(root / name)


@pytest.mark.parametrize(
    ("files", "folders", "message"),
    [
        ([], [], "has no images"),
        ([], ["cat", "dog"], "has no images"),
        (["cat/a.png"], ["dog", "fox"], "class dog, fox has no images"),
        (["a.png", "cat/b.png"], [], r"both loose images \(a.png\) and folders of images \(cat\)"),
        (["train/cat/a.png", "cat/a.png"], [], "beside others"),
        (["test/cat/a.png", "val/cat/a.png"], [], "no train folder"),
        (
            ["train/cat/a.png", "train/dog/a.png", "val/cat/a.png"],
            [],
            "class dog is in only one of train and val",
        ),
        (["train/cat/a.png", "train/dog/a.png", "test/a.png"], [], "train has class folders, test has none"),
        (["train/a.png", "val/a.png", "valid/a.png"], [], "both mean the val split"),
    ],
)
def test_contradictory_layouts_are_refused(
    tmp_path: Path, files: list[str], folders: list[str], message: str
) -> None:
    layout(tmp_path, *files)
    for name in folders:
        (tmp_path / name).mkdir()
    with pytest.raises(DataError, match=message) as caught:
        listing("folder", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_missing_folder_and_a_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="does not exist"):
        listing("folder", tmp_path / "missing")
    with pytest.raises(DataError, match="is not a folder"):
        listing("folder", save(tmp_path / "a.png"))


def test_load_limits_the_size_and_explains_failures(tmp_path: Path) -> None:
    save(tmp_path / "a.png")
    image = listing("folder", tmp_path).images[0]
    with pytest.raises(ImageError, match="more than the limit of 10"):
        image.load(10)
    (tmp_path / "a.png").unlink()
    with pytest.raises(ImageError, match="cannot be read: No such file"):
        image.load(10_000)


# ------------------------------------------------------------ cifar10


def binary_archive(path: Path, *, label: int = 1, extra: bytes = b"", omit: str = "") -> np.ndarray:
    """An archive of the official layout with two images a batch; returns all pixels (12, 32, 32, 3)."""
    pixels = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)
    names = [f"data_batch_{number}.bin" for number in range(1, 6)] + ["test_batch.bin"]
    contents = {"batches.meta.txt": b"airplane\nautomobile\n\n"}
    for number, name in enumerate(names):
        pair = pixels[2 * number : 2 * number + 2]
        planes = [
            bytes([position * label]) + image.transpose(2, 0, 1).tobytes()
            for position, image in enumerate(pair)
        ]
        contents[name] = b"".join(planes) + extra
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w:gz") as archive:
        for name, content in contents.items():
            if name != omit:
                info = tarfile.TarInfo(f"cifar-10-batches-bin/{name}")
                info.size = len(content)
                archive.addfile(info, io.BytesIO(content))
    return pixels


def test_cifar10_binary_records_become_images(tmp_path: Path) -> None:
    pixels = binary_archive(tmp_path / "cifar-10-binary.tar.gz")
    source = listing("cifar10", tmp_path)
    assert source.classes == ["airplane", "automobile"]
    assert [image.split for image in source.images] == ["train"] * 10 + ["test"] * 2
    assert [image.label for image in source.images] == [0, 1] * 6
    for image, expected in zip(source.images, pixels, strict=True):
        decoded = imaging.decode(image.load(10_000), max_pixels=1024)
        np.testing.assert_array_equal(np.asarray(decoded), expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"omit": "data_batch_3.bin"}, "lacks data_batch_3.bin"),
        ({"label": 9}, "has label 9, but there are 2 classes"),
        ({"extra": b"x"}, "not a whole number of 3073-byte records"),
        ({"extra": bytes(3073 * 10_000)}, "larger than 10,000 images"),
    ],
)
def test_a_wrong_cifar10_archive_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    binary_archive(tmp_path / "cifar-10-binary.tar.gz", **change)  # type: ignore[arg-type]
    with pytest.raises(DataError, match=message):
        listing("cifar10", tmp_path)


def test_a_truncated_cifar10_archive_is_refused(tmp_path: Path) -> None:
    archive = tmp_path / "cifar-10-binary.tar.gz"
    binary_archive(archive)
    archive.write_bytes(archive.read_bytes()[:2000])
    with pytest.raises(DataError, match=r"cannot be read as a tar\.gz archive"):
        listing("cifar10", tmp_path)


def zips(folder: Path) -> None:
    (folder / "classes.txt").write_text("cat\ndog\n")
    for split in ("train", "test"):
        with zipfile.ZipFile(folder / f"{split}.zip", "w") as archive:
            for name in ("dog/1.jpg", "cat/2.jpg", "README"):
                buffer = io.BytesIO()
                Image.new("RGB", (4, 4)).save(buffer, format="PNG")
                archive.writestr(name, buffer.getvalue())


def test_cifar10_zips_are_read_with_the_order_of_classes_txt(tmp_path: Path) -> None:
    zips(tmp_path)
    with open_source("cifar10", tmp_path) as source:
        assert by_name(source)["test/dog/1.jpg"] == (1, "test")
        assert len(source.images) == 4
        assert imaging.decode(source.images[0].load(10_000), max_pixels=16).size == (4, 4)
    assert source.rejected == [("train/README", "not an image file"), ("test/README", "not an image file")]


def test_a_damaged_zip_member_is_an_image_error(tmp_path: Path) -> None:
    zips(tmp_path)
    archive = tmp_path / "train.zip"
    content = bytearray(archive.read_bytes())
    content[60] ^= 0xFF
    archive.write_bytes(content)
    with open_source("cifar10", tmp_path) as source:
        damaged = next(image for image in source.images if image.name == "train/dog/1.jpg")
        with pytest.raises(ImageError, match="cannot be read: Bad CRC-32"):
            damaged.load(10_000)


def test_wrong_cifar10_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"neither train\.zip nor cifar-10-binary"):
        listing("cifar10", tmp_path)
    zips(tmp_path)
    (tmp_path / "classes.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"no folder that classes\.txt names"):
        listing("cifar10", tmp_path)
    (tmp_path / "train.zip").write_bytes(b"PK no")
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        listing("cifar10", tmp_path)


def test_the_shared_cifar10_subset_is_read() -> None:
    folder = Path(os.environ.get("TRUNKLINE_DATA", "../shared/data")) / "cifar10"
    if not folder.is_dir():
        pytest.skip(f"{folder} is absent")
    with open_source("cifar10", folder) as source:
        assert len(source.classes) == 10
        assert sum(image.split == "train" for image in source.images) == 10_000
        assert sum(image.split == "test" for image in source.images) == 2_000
        for image in source.images[::1500]:
            assert imaging.decode(image.load(100_000), max_pixels=1024).size == (32, 32)
