"""Records hold what they say, depend on nothing but the image, and come out the same everywhere."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flows.serving.statistics import (
    PIXEL_STATISTICS,
    Projection,
    Records,
    confidences,
    describe,
    is_finite,
    pixel_statistics,
)


def random_batch(images: int = 5, size: int = 6) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((images, 3, size, size)).astype(np.float32)


def test_pixel_statistics_agree_with_a_loop() -> None:
    for image, row in zip(batch := random_batch(), pixel_statistics(batch), strict=True):
        found = dict(zip(PIXEL_STATISTICS, row.tolist(), strict=True))
        side = range(1, 5)
        laplacian = [
            abs(
                4 * image[c, y, x]
                - image[c, y - 1, x]
                - image[c, y + 1, x]
                - image[c, y, x - 1]
                - image[c, y, x + 1]
            )
            for c in range(3)
            for y in side
            for x in side
        ]
        spread = [max(image[:, y, x]) - min(image[:, y, x]) for y in range(6) for x in range(6)]
        flat = [
            abs(image[c, y, x + 1] - image[c, y, x]) < 0.02
            for c in range(3)
            for y in range(6)
            for x in range(5)
        ]
        assert found["mean_g"] == pytest.approx(np.mean(image[1]), abs=1e-6)
        assert found["std_b"] == pytest.approx(np.std(image[2]), abs=1e-6)
        assert found["sharpness"] == pytest.approx(np.mean(laplacian), rel=1e-5)
        assert found["saturation"] == pytest.approx(np.mean(spread), rel=1e-5)
        assert found["flatness"] == pytest.approx(np.mean(flat), abs=1e-6)


def test_tiny_and_even_images_have_statistics() -> None:
    assert np.isfinite(pixel_statistics(random_batch(size=1))).all()
    even = dict(
        zip(PIXEL_STATISTICS, pixel_statistics(np.full((1, 3, 4, 4), 0.5, np.float32))[0], strict=True)
    )
    assert (even["sharpness"], even["saturation"], even["flatness"], even["std_r"]) == (0, 0, 1, 0)


def test_confidence_and_entropy_agree_with_torch() -> None:
    logits = 5 * np.random.default_rng(1).standard_normal((7, 4)).astype(np.float32)
    logits[0] = [200, -200, 0, 0]  # certain: p log p of the others is 0, not NaN
    distribution = torch.distributions.Categorical(logits=torch.from_numpy(logits).double())
    confidence, entropy = confidences(logits)
    np.testing.assert_allclose(confidence, distribution.probs.max(dim=1).values, rtol=1e-6)
    np.testing.assert_allclose(entropy, distribution.entropy(), rtol=1e-5, atol=1e-7)


def test_a_projection_is_defined_by_its_seed_on_every_machine() -> None:
    matrix = Projection(seed=3, features=64, dims=8).matrix()
    # pinned: a server whose NumPy drew other directions would see drift in every image
    np.testing.assert_allclose(matrix[0, :3], [0.22357859, 0.05456373, 0.01206218], rtol=1e-6)
    assert not np.array_equal(matrix, Projection(4, 64, 8).matrix())
    np.testing.assert_array_equal(Projection(0, 5, 32).matrix(), np.eye(5))


def test_a_projection_keeps_distances() -> None:
    points = np.random.default_rng(0).standard_normal((60, 256)).astype(np.float32)
    projected = points @ Projection(0, 256, 32).matrix() * np.sqrt(256 / 32)
    first, second = np.triu_indices(60, 1)
    ratio = np.linalg.norm(projected[first] - projected[second], axis=1) / np.linalg.norm(
        points[first] - points[second], axis=1
    )
    assert ratio.mean() == pytest.approx(1, abs=0.05)
    assert ratio.std() < 2 / np.sqrt(2 * 32)


def test_a_record_does_not_depend_on_the_neighbours() -> None:
    images, generator = random_batch(9), np.random.default_rng(2)
    logits = generator.standard_normal((9, 4)).astype(np.float32)
    features = generator.standard_normal((9, 10)).astype(np.float32)
    matrix = Projection(0, 10, 3).matrix()
    together = describe(images, logits, features, matrix)
    alone = Records.concatenate(
        [describe(images[i : i + 1], logits[i : i + 1], features[i : i + 1], matrix) for i in range(9)]
    )
    for name in ("pixels", "embedding", "predicted", "confidence", "entropy"):
        np.testing.assert_allclose(getattr(together, name), getattr(alone, name), rtol=1e-5, atol=1e-6)
    assert together.embedding.shape == (9, 3)
    assert len(together[np.asarray([1, 4])]) == 2
    images[3, 0, 0, 0] = np.nan
    assert is_finite(together)
    assert not is_finite(describe(images, logits, features, matrix))
