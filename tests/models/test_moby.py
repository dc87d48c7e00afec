"""MoBY against closed forms: the loss of equal logits, the order of a queue, the recursion of an average."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import models
from models.batch_norm import SyncBatchNorm1d
from models.pretext.moby import MoBY, enqueue, momentum_at


class Mean(nn.Module):
    """A backbone of one parameter: the mean of each channel, times it."""

    num_features = 3

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor(scale))

    def embedding(self, images: Tensor) -> Tensor:
        return images.mean((2, 3)) * self.scale


def small(backbone: Any = None, target: Any = None, **change: Any) -> MoBY:
    torch.manual_seed(0)
    sizes = {"queue_size": 8, "batch_size": 4, "steps": 10, "hidden_dim": 6, "key_dim": 5, **change}
    return MoBY(backbone or Mean(2.0), target or Mean(), **sizes)


def views(seed: int = 1, batch: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    pair = torch.randn(2, batch, 3, 8, 8, generator=generator)
    return pair[0], pair[1]


def test_equal_logits_cost_twice_the_logarithm_of_the_candidates(monkeypatch: pytest.MonkeyPatch) -> None:
    model = small(queue_size=4096)
    key = F.normalize(torch.ones(5), dim=0)
    model.queue_1.copy_(key[:, None].expand(5, 4096))
    model.queue_2.copy_(key[:, None].expand(5, 4096))
    for name in ("_queries", "_keys"):
        monkeypatch.setattr(model, name, lambda view: key.expand(len(view), 5))
    output = model(*views())
    assert float(output.loss) == pytest.approx(2 * math.log(4097), abs=1e-5)
    assert float(output.loss) == pytest.approx(16.636, abs=1e-3)


def test_the_loss_is_that_of_a_loop_over_images_with_the_queues_of_before() -> None:
    model = small(temperature=0.3).train()
    queue_1, queue_2 = model.queue_1.clone(), model.queue_2.clone()
    view_1, view_2 = views()
    with torch.no_grad():
        queries = [model._queries(view) for view in (view_1, view_2)]
        keys = [model._keys(view) for view in (view_1, view_2)]
    expected = 0.0
    for query, key, queue in ((queries[0], keys[1], queue_2), (queries[1], keys[0], queue_1)):
        for image in range(4):
            logits = [float(query[image] @ key[image])] + [float(query[image] @ column) for column in queue.T]
            total = sum(math.exp(logit / 0.3) for logit in logits)
            expected -= (logits[0] / 0.3 - math.log(total)) / 4
    output = model(view_1, view_2)
    assert float(output.loss.detach()) == pytest.approx(expected, rel=1e-5)
    assert output.losses.shape == (4,)
    torch.testing.assert_close(model.queue_1, torch.cat([keys[0].T, queue_1[:, :4]], dim=1))
    torch.testing.assert_close(model.queue_2, torch.cat([keys[1].T, queue_2[:, :4]], dim=1))


def test_the_first_key_in_is_the_first_out() -> None:
    queue = torch.zeros(1, 6)
    for first in range(0, 12, 2):
        enqueue(queue, torch.tensor([[float(first)], [float(first + 1)]]))
    assert queue[0].tolist() == [10, 11, 8, 9, 6, 7]


def test_the_queue_must_hold_whole_batches() -> None:
    with pytest.raises(ValueError, match="queue_size is 10, but must be a multiple of the 4 images"):
        small(queue_size=10)


def test_momentum_rises_along_a_cosine_over_the_whole_run() -> None:
    found = [momentum_at(round(part * 1000), 1000, 0.99) for part in (0, 0.25, 0.5, 0.75, 1)]
    assert found == pytest.approx([0.99, 0.9914645, 0.995, 0.9985355, 1.0], abs=1e-7)


def test_the_target_follows_at_the_start_of_a_step_with_the_weights_of_the_last_one() -> None:
    """θ' ← m·θ' + (1 − m)·θ, one parameter, momentum of the schedule; eval and later micro-steps move
    nothing."""
    model = small(Mean(2.0), Mean(-1.0)).train()
    assert float(model.target_backbone.scale) == 2.0, "a copy at first"
    expected, online = 2.0, 2.0
    for step in range(10):
        momentum = momentum_at(step, 10, 0.99)
        expected = momentum * expected + (1 - momentum) * online
        model(*views(step))
        assert float(model.target_backbone.scale) == pytest.approx(expected, abs=1e-6)
        model(*views(step), begins_step=False)
        model.eval()(*views(step))
        model.train()
        assert float(model.target_backbone.scale) == pytest.approx(expected, abs=1e-6)
        assert int(model.step) == step + 1
        online = 10.0 * (step + 2)  # what an optimiser would have made of it
        with torch.no_grad():
            model.backbone.scale.fill_(online)
    assert expected > 3
    model.restart()
    assert model.target_backbone.scale.item() == model.backbone.scale.item()
    assert int(model.step) == 0


def test_gradients_reach_the_online_network_alone() -> None:
    model = small().train()
    model(*views()).loss.backward()
    with_gradient = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert with_gradient == {name for name, _ in model.named_parameters() if not name.startswith("target_")}
    assert all(not parameter.requires_grad for parameter in model.target_projector.parameters())


def test_a_cast_leaves_the_slow_parts_in_single_precision() -> None:
    """An average that moves by a thousandth, in bf16, does not move."""

    def create(rate: float) -> Any:
        return models.create("swin_v2_pico", image_size=16, window_size=4, drop_path=rate)

    model = small(create(0.1), create(0.0)).bfloat16()
    for name, value in model.state_dict().items():
        online = name.startswith(("backbone.", "projector.", "predictor.")) and "running_" not in name
        if value.is_floating_point():
            assert value.dtype == (torch.bfloat16 if online else torch.float32), name
    pair = torch.randn(2, 4, 3, 16, 16)
    model.train()
    loss = model(pair[0], pair[1]).loss
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    with torch.no_grad():
        model.projector.linear_out.bias.add_(1.0)
    before = model.target_projector.linear_out.bias.clone()
    model(pair[0], pair[1])
    moved = (model.target_projector.linear_out.bias - before).mean()
    assert float(moved) == pytest.approx(1 - momentum_at(1, 10, 0.99), rel=1e-2)


def test_drop_path_is_the_online_networks_alone() -> None:
    def create(rate: float) -> Any:
        return models.create("swin_v2_pico", image_size=16, window_size=4, drop_path=rate)

    model = small(create(0.5), create(0.0)).train()
    with torch.no_grad():  # blocks start as the identity, where dropping one changes nothing
        for name, parameter in model.named_parameters():
            if "norm" in name and name.startswith(("backbone.layers", "target_backbone.layers")):
                parameter.fill_(0.5)
    view = views()[0].repeat(1, 1, 2, 2)
    torch.testing.assert_close(model._keys(view), model._keys(view))
    assert not torch.allclose(model._queries(view), model._queries(view))


def test_batch_norm_before_the_mlps_is_over_all_tokens_and_each_network_keeps_its_own() -> None:
    def backbone() -> models.SwinV1:
        made = models.create("swin_v1_pico", image_size=16, window_size=4, patch_size=2, mlp_norm="batch")
        assert isinstance(made, models.SwinV1)
        return made

    model = small(backbone(), backbone(), momentum=0.5).train()
    block = model.backbone.get_submodule("layers.0.blocks.0")
    tokens = torch.randn(3, 8, 8, 64) * 3 + 1
    norm, reference = block.get_submodule("norm2"), nn.BatchNorm2d(64)
    torch.testing.assert_close(norm(tokens), reference(tokens.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))
    torch.testing.assert_close(norm.running_var, reference.running_var)
    view_1, view_2 = torch.randn(2, 4, 3, 16, 16)
    model(view_1, view_2).loss.backward()
    target = model.target_backbone.get_submodule("layers.0.blocks.0.norm2")
    assert target.running_mean.abs().sum() > 0
    assert not torch.allclose(target.running_mean, norm.running_mean), "its own, not the online network's"
    assert norm.weight.grad is not None
    assert norm.weight.grad.abs().sum() > 0


def test_batch_norm_before_the_mlps_is_refused_where_it_makes_no_sense() -> None:
    for name, problem in (("swin_v2_pico", "is for Swin V1"), ("vit_pico", "mlp_norm cannot be set")):
        with pytest.raises(ValueError, match=problem):
            models.create(name, image_size=32, window_size=4, mlp_norm="batch")
    with pytest.raises(ValueError, match="would count its batch twice"):
        models.create(
            "swin_v1_pico", image_size=32, window_size=4, mlp_norm="batch", activation_checkpointing=1
        )


def test_batch_norm_of_one_process_is_that_of_torch() -> None:
    torch.manual_seed(0)
    ours, theirs = SyncBatchNorm1d(5), nn.BatchNorm1d(5)
    x = 3 + 2 * torch.randn(16, 5)
    for mode in (True, True, False):
        ours.train(mode)
        theirs.train(mode)
        torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=0)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    torch.testing.assert_close(ours.running_var, theirs.running_var, rtol=0, atol=0)
