"""The losses that a study compares: the same images and masks for every cell; their definitions by hand."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from flows import files, params, paths, pretexts
from flows.data import ImageDataset, load_manifest, load_subset, preprocessing_for
from flows.pretexts import Pretext
from flows.stage import Stage, peak_memory
from flows.stages import pretrain
from flows.training import Processes
from models.pretext.simmim import SimMIM

SMALL = {"backbone": "swin_v2_atto"}
COUNT = 45  # validation images that are looked at: no multiple of a batch
CELLS: dict[str, dict[str, Any]] = {
    "small": {"model": SMALL},
    "large": {"model": {"backbone": "swin_v2_nano"}, "pretrain": {"drop_path": 0.3}},
    "subset": {"model": SMALL, "pretrain": {"subset": 10}},
    "length": {"model": SMALL, "pretrain": {"training": {"steps": 7, "warmup_steps": 1}}},
    "batch": {"model": SMALL, "pretrain": {"training": {"batch_size": 20}}},
    "seed": {"model": SMALL, "seed": 3},
}


def create(processes: Processes | None = None) -> tuple[Pretext, ImageDataset]:
    """The pretext of the current directory's params, and its validation images."""
    checked, manifest = params.load(), load_manifest(paths.DATA)
    torch.manual_seed(checked.seed)
    processes = processes or Processes(0, 1, torch.device("cpu"))
    pretext = pretexts.create(checked, preprocessing_for(manifest, checked.model), processes)
    rows = range(5, 5 + COUNT)
    return pretext, ImageDataset(paths.DATA, "val", rows=rows, cache_mb=64, max_pixels=10_000)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # tiny products: threads would only wait for one another
    yield
    torch.set_num_threads(threads)


class Watched:
    """Stands for the engine: notes what it is shown, in order."""

    def __init__(self, model: torch.nn.Module) -> None:
        self.model = model
        self.images: list[torch.Tensor] = []
        self.masks: list[torch.Tensor] = []

    def __call__(self, images: torch.Tensor, masks: torch.Tensor) -> Any:
        self.images += [*images]
        self.masks += [*masks]
        return self.model(images[:1], masks[:1])


@torch.no_grad()
def shown(pretext: Pretext, images: ImageDataset) -> tuple[torch.Tensor, torch.Tensor]:
    watched = Watched(pretext.model.eval())
    pretext.loss_on(images, watched)
    return torch.stack(watched.images), torch.stack(watched.masks)


def test_every_cell_is_validated_on_the_same_images_and_masks(enter: Any) -> None:
    """Whatever its model, subset, length, batch size, seed and number of processes."""
    found = {}
    for name, change in CELLS.items():
        enter(change, name)
        found[name] = shown(*create())
    images, masks = found["small"]
    assert len(masks) == COUNT
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) > 1, "each image has its own"
    for name, (others, other_masks) in found.items():
        assert torch.equal(others, images), name
        assert torch.equal(other_masks, masks), name


@torch.no_grad()
def test_processes_share_the_same_images_and_masks(enter: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    enter({"model": SMALL})
    whole = shown(*create())
    monkeypatch.setattr(Processes, "sum", lambda self, values: values)
    parts = [shown(*create(Processes(rank, 2, torch.device("cpu")))) for rank in range(2)]
    for of_all, shares in zip(whole, zip(*parts, strict=True), strict=True):
        # the second process may repeat an image at the end, with weight 0
        assert torch.equal(shares[0][: -(-COUNT // 2)], of_all[0::2])
        assert torch.equal(shares[1][: COUNT // 2], of_all[1::2])


@torch.no_grad()
def test_losses_equal_their_definitions(enter: Any) -> None:
    """One image after the other; sum over hidden pixels by their number, not the mean of batch means."""
    enter({"model": SMALL, "pretrain": {"normalize_target": 5, "training": {"batch_size": 20}}})
    pretext, images = create()
    model = pretext.model.eval()
    assert isinstance(model, SimMIM)
    total = hidden = 0.0
    for batch, _ in pretext.eval_batches(images):
        inputs, masks = pretext.normalized(batch), pretext._masks(batch.rows)  # type: ignore[attr-defined]
        for image, mask in zip(inputs, masks, strict=True):
            output = model(image[None], mask[None])
            assert output.loss_sum.dtype == torch.float32
            errors = (output.prediction - model.target_of(image[None])).abs().mean(dim=1)[0]
            big = mask.repeat_interleave(pretext.settings.mask_unit, 0)
            big = big.repeat_interleave(pretext.settings.mask_unit, 1)
            total += float(errors[big].sum())
            hidden += int(big.sum())
    assert pretext.loss_on(images, model) == pytest.approx(total / hidden, rel=1e-5)


@torch.no_grad()
def test_extra_losses_differ_in_what_they_say_and_leave_no_trace(enter: Any) -> None:
    enter({"model": SMALL, "pretrain": {"drop_path": 0.5}})
    pretext, images = create()
    model = pretext.model.eval()
    for parameter in model.parameters():  # else fresh branches are all but empty, and nothing is dropped
        parameter.add_(0.1 * torch.randn_like(parameter))
    state, plain = torch.get_rng_state(), pretext.loss_on(images, model)
    first = pretext.extra_losses(images, images, model)
    assert not any(module.training for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)
    assert pretext.extra_losses(images, images, model) == first
    assert first["train_loss_eval"] == plain, "prepared like validation images"
    assert abs(first["val_loss_drop_path"] - plain) > 1e-4
    assert abs(first["val_loss_crops"] - plain) > 1e-4

    enter({"model": SMALL, "pretrain": {"training": {"batch_size": 20}}}, "other")
    other, images = create()
    other.model.load_state_dict(model.state_dict())
    second = other.extra_losses(images, images, other.model.eval())
    assert second["val_loss_drop_path"] == pytest.approx(plain, rel=1e-5), "its rate is 0"
    assert second["val_loss_crops"] == pytest.approx(first["val_loss_crops"], rel=1e-5), "seeded by the image"


def test_the_stage_tells_them_and_trains_as_without(enter: Any) -> None:
    training = {"steps": 3, "warmup_steps": 1, "validate_every": 2, "checkpoint_every": 3, "log_every": 1}
    change = {"model": SMALL, "pretrain": {"drop_path": 0.2, "subset": 50, "training": training}}
    results = {}
    for name, switched in (("without", False), ("with", True)):
        change["pretrain"]["extra_losses"] = switched  # type: ignore[index]
        folder = enter(change, name)
        pretrain.run(params.load(), Stage("pretrain"))
        metrics = files.read_json(folder / paths.METRICS / "pretrain.json")
        results[name] = metrics, files.sha256_file(folder / paths.PRETRAIN / "model.safetensors")
    assert results["with"][1] == results["without"][1], "bit for bit"
    more = {*results["with"][0]} - {*results["without"][0]}
    assert more == set(pretrain.EXTRA_LOSSES)
    assert results["with"][0]["val_loss"] == results["without"][0]["val_loss"]
    header = (folder / paths.PRETRAIN / "validation.csv").read_text().splitlines()[0]
    assert set(pretrain.EXTRA_LOSSES) <= set(header.split(","))


def test_the_images_of_the_train_loss_are_in_every_subset(enter: Any) -> None:
    from flows.data import load_smallest_subset

    enter()
    common = set(load_smallest_subset(paths.SUBSETS))
    for percentage in params.load().scale.percentages:
        assert common <= set(load_subset(paths.SUBSETS, percentage))


def test_peak_memory_is_this_process_s_own() -> None:
    import psutil

    found = peak_memory()["peak_memory_bytes"]
    assert psutil.Process().memory_info().rss * 0.5 < found < psutil.virtual_memory().total
