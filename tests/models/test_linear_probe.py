"""The linear probe: a frozen backbone in eval mode, heads that do not meet, features from any depth."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F

import models
from models.classification import Classifier, LinearProbe, classifier_weights


def backbone(name: str = "swin_v2_pico", drop_path: float = 0.5) -> Any:
    torch.manual_seed(0)
    return models.create(name, image_size=16, patch_size=4, window_size=4, drop_path=drop_path)


IMAGES = torch.randn(3, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def test_the_backbone_stays_as_it_is_and_in_eval_mode() -> None:
    probe = LinearProbe(Classifier(backbone(), 4), heads=2).train()
    assert probe.training
    assert not any(module.training for module in probe.backbone.modules())
    first, second = probe(IMAGES), probe(IMAGES)
    assert torch.equal(first, second), "no drop path"
    assert first.shape == (2, 3, 4)
    first.sum().backward()
    trained = {name for name, parameter in probe.named_parameters() if parameter.grad is not None}
    assert trained == {f"heads.{head}.{kind}" for head in (0, 1) for kind in ("weight", "bias")}


def test_a_head_learns_the_same_alone_or_beside_others() -> None:
    """As long as nothing joins them, such as a common limit of the gradient's norm."""
    labels = torch.tensor([0, 1, 2])
    together = LinearProbe(Classifier(backbone(), 4), heads=2)
    alone = LinearProbe(Classifier(backbone(), 4), heads=1)
    alone.heads[0].load_state_dict(together.heads[1].state_dict())
    for probe in (together, alone):
        optimizer = torch.optim.SGD(probe.heads.parameters(), lr=0.5, momentum=0.9, nesterov=True)
        for _ in range(3):
            optimizer.zero_grad()
            torch.stack([F.cross_entropy(logits, labels) for logits in probe(IMAGES)]).sum().backward()
            optimizer.step()
    torch.testing.assert_close(together.heads[1].weight, alone.heads[0].weight)
    classifier = Classifier(backbone(), 4)
    classifier.load_state_dict(classifier_weights(together.state_dict(), 1))
    torch.testing.assert_close(classifier.eval()(IMAGES), together(IMAGES)[1])


@pytest.mark.parametrize(("name", "last"), [("swin_v2_pico", 2), ("vit_pico", 6), ("deit_pico", 6)])
def test_features_come_from_any_depth(name: str, last: int) -> None:
    network = backbone(name, 0.0).eval()
    for feature in range(last + 1):
        assert Classifier(network, 4, feature).eval()(IMAGES).shape == (3, 4)
    maps = network.feature_maps(IMAGES)
    top = Classifier(network, 4, last).features(IMAGES)
    torch.testing.assert_close(top, maps[-1].mean((2, 3)))
    with pytest.raises(ValueError, match=f"from 1 to {last}"):
        Classifier(network, 4, last + 1)
