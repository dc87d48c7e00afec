"""The reader of a folder of one's own images: finds its layout and refuses what could be misread."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path

from flows.data.source_image import EXTENSIONS, Source, SourceImage
from flows.errors import DataError

SPLIT_FOLDERS = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}


def read_folder(path: Path, resources: ExitStack) -> Source:
    """A folder of one's own images, in one of three layouts:

    - one sub-folder per class, each read recursively;
    - `train/`, and optionally `val/` and `test/`, each laid out like the first or the third;
    - images directly in it, or in a single sub-folder: unlabelled, for pretraining only.

    Names are sorted, hidden files are ignored, links are followed once (loops end). Files without an image's
    extension are reported as rejected.
    """
    if not path.is_dir():
        raise DataError(f"{path} {'is not a folder' if path.exists() else 'does not exist'}")
    rejected: list[tuple[str, str]] = []
    folders = _split_folders(path)
    if None not in folders:
        rejected.extend((_shown(file, path), "lies beside the split folders") for file in _children(path)[1])
    parts = {split: _read_part(folder, path, rejected) for split, folder in folders.items()}
    labelled = {split: None not in classes for split, classes in parts.items()}
    if len(set(labelled.values())) > 1:
        raise DataError(
            f"{path}: {_names(split for split in parts if labelled[split])} has class folders, "
            f"{_names(split for split in parts if not labelled[split])} has none; lay all splits out alike"
        )
    class_names = sorted(name for name in next(iter(parts.values())) if name is not None)
    for split, classes in parts.items():
        differing = set(class_names) ^ {name for name in classes if name is not None}
        if differing:
            raise DataError(
                f"{path}: class {_names(differing)} is in only one of {next(iter(parts))} and {split}; "
                "every split needs images of every class"
            )
    notes = []
    labels: dict[str | None, int] = {}
    if len(class_names) == 1:
        notes.append(
            f"all images lie in one folder, {_names(class_names)}: taken as unlabelled, for pretraining only"
        )
    else:
        labels.update((name, label) for label, name in enumerate(class_names))
    images = [
        SourceImage(
            _shown(file, path),
            file.stat().st_size,
            file.read_bytes,
            labels.get(name),
            split,
        )
        for split, classes in parts.items()
        for name, found in sorted(classes.items(), key=lambda item: item[0] or "")
        for file in found
    ]
    name = re.sub(r"[^a-z0-9]+", "-", path.resolve().name.lower()).strip("-") or "folder"
    return Source(
        name=name,
        origin=f"folder {_printable(path.resolve().name)}",
        licence="not stated",
        classes=[_printable(name) for name in class_names] if labels else [],
        images=images,
        rejected=sorted(rejected),
        notes=notes,
    )


def _split_folders(root: Path) -> dict[str | None, Path]:
    """`{"train": …, "val": …}` if the folder has split folders, else `{None: root}`."""
    folders, _ = _children(root)
    found: dict[str | None, Path] = {}
    for folder in folders:
        split = SPLIT_FOLDERS.get(folder.name.lower())
        if split in found:
            raise DataError(
                f"{root}: {found[split].name} and {folder.name} both mean the {split} split; keep one"
            )
        if split:
            found[split] = folder
    if not found:
        return {None: root}
    others = [folder.name for folder in folders if folder not in found.values()]
    if others:
        raise DataError(
            f"{root} holds split folders ({_names(f.name for f in found.values())}) beside others "
            f"({_names(others)}); move the class folders into the split folders, or rename the split folders"
        )
    if "train" not in found:
        raise DataError(f"{root} has {_names(f.name for f in found.values())} but no train folder")
    return {split: found[split] for split in ("train", "val", "test") if split in found}


def _read_part(folder: Path, root: Path, rejected: list[tuple[str, str]]) -> dict[str | None, list[Path]]:
    """Images by class folder, or all under None if there are no class folders."""
    folders, files = _children(folder)
    loose = _keep_images(files, root, rejected)
    by_class: dict[str | None, list[Path]] = {}
    enclosing = frozenset({os.path.realpath(root), os.path.realpath(folder)})
    for child in folders:
        by_class[child.name] = _keep_images(list(_walk(child, enclosing)), root, rejected)
    filled = [name for name, found in by_class.items() if found]
    if loose and filled:
        raise DataError(
            f"{folder} holds both loose images ({_printable(loose[0].name)}) and folders of images "
            f"({_names(filled)}); move every image into a class folder, or, to train without labels, "
            "everything into a single folder"
        )
    if loose:
        return {None: loose}
    if not filled:
        raise DataError(f"{folder} has no images (looked for {', '.join(sorted(EXTENSIONS))})")
    empty = [name for name in by_class if name not in filled]
    if empty:
        raise DataError(f"{folder}: class {_names(empty)} has no images; add some or remove the folder")
    return by_class


def _children(folder: Path) -> tuple[list[Path], list[Path]]:
    """Visible sub-folders and everything else, each sorted by name."""
    try:
        children = sorted(
            (child for child in folder.iterdir() if not child.name.startswith(".")), key=os.fsencode
        )
    except OSError as error:
        raise DataError(f"{folder} cannot be listed: {error.strerror}") from None
    folders = [child for child in children if os.path.isdir(child)]
    return folders, [child for child in children if not os.path.isdir(child)]


def _walk(folder: Path, ancestors: frozenset[str]) -> Iterator[Path]:
    """All visible files below `folder`; a link back to an enclosing folder is not entered."""
    real = os.path.realpath(folder)
    if real in ancestors:
        return
    folders, files = _children(folder)
    yield from files
    for child in folders:
        yield from _walk(child, ancestors | {real})


def _keep_images(files: list[Path], root: Path, rejected: list[tuple[str, str]]) -> list[Path]:
    kept = []
    for file in files:
        if file.suffix.lower() not in EXTENSIONS:
            rejected.append((_shown(file, root), f"not an image file ({file.suffix or 'no extension'})"))
        elif not os.path.isfile(file):
            rejected.append(
                (_shown(file, root), "broken link" if file.is_symlink() else "not a regular file")
            )
        else:
            kept.append(file)
    return kept


def _shown(file: Path, root: Path) -> str:
    return _printable(file.relative_to(root).as_posix())


def _printable(text: str) -> str:
    """File names are bytes; those that are not UTF-8 would not survive being written to JSON."""
    return os.fsencode(text).decode("utf-8", "backslashreplace")


def _names(values: Iterable[str | None]) -> str:
    names = sorted(_printable(str(value)) for value in values)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
