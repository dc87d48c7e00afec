"""Swin V2: sizes, initialisation, regularisation, precision, padding and the cache of the position bias."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import models
from models.backbones.swin import Swin
from models.backbones.swin_v1 import SwinV1, SwinV1Size
from models.backbones.swin_v2 import Block, DropPath, SwinV2, SwinV2Size
from models.backbones.window_attention import WindowAttention
from models.backbones.windows import MASKED_LOGIT, WindowGeometry
from models.classification import Classifier
from tests.models.conftest import randomize

SMALL = SwinV2Size(16, (2, 2), (2, 4))


def small(**arguments: object) -> SwinV2:
    settings: dict[str, object] = {"image_size": 32, "window_size": 4, "patch_size": 4, **arguments}
    return SwinV2(SMALL, **settings)  # type: ignore[arg-type]


def images_of(batch: int, *size: int, seed: int = 1) -> Tensor:
    height, width = size if len(size) == 2 else size * 2
    return torch.randn(batch, 3, height, width, generator=torch.Generator().manual_seed(seed))


# --- sizes and names -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("swin_v2_tiny", 28_347_154),
        ("swin_v2_small", 49_728_418),
        ("swin_v2_base", 87_918_816),
        ("swin_v2_large", 196_739_932),
        ("swin_v2_huge", 658_027_922 + 8_448),
        ("swin_v2_1b", 1_064_561_996),
        ("swin_v2_giant", 3_001_912_008 + 28_672),
    ],
)
def test_parameter_counts_of_the_published_sizes(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = Classifier(models.create(name, image_size=256, window_size=8), num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_heads_of_the_huge_model_can_be_the_other_candidate() -> None:
    heads = (8, 16, 32, 64)
    with torch.device("meta"):
        backbone = models.create("swin_v2_huge", image_size=192, window_size=12, num_heads=heads)
        model = Classifier(backbone, num_classes=1000)
    assert sum(p.numel() for p in model.parameters()) == 657_883_256 + 8_448
    assert [stage.blocks[0].attn.logit_scale.numel() for stage in backbone.layers] == list(heads)
    with pytest.raises(ValueError, match="7 heads do not divide the 64 channels of stage 0"):
        models.create("swin_v2_pico", image_size=32, window_size=4, num_heads=(7, 8))


@pytest.mark.parametrize("name", ["swin_v2_pico", "swin_v2_nano"])
@pytest.mark.parametrize(("patch", "window"), [(4, 4), (2, 8)])
def test_small_sizes_map_32_pixels(name: str, patch: int, window: int) -> None:
    backbone = models.create(name, image_size=32, window_size=window, patch_size=patch).eval()
    assert backbone.num_layers == sum(backbone.depths)
    with torch.no_grad():
        features = backbone(images_of(2, 32))
        maps = backbone.feature_maps(images_of(2, 32))
    side = 32 // backbone.stride
    assert features.shape == (2, backbone.num_features, side, side)
    assert [m.shape[1:] for m in maps] == [
        (64 * 2**i, 32 // patch // 2**i, 32 // patch // 2**i) for i in range(len(backbone.depths))
    ]
    normalized = backbone.norm(maps[-1].permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    torch.testing.assert_close(normalized, features, atol=0, rtol=0)


def test_state_dict_has_the_official_names_and_no_tables() -> None:
    names = set(small().state_dict())
    block = {
        "attn.q_bias", "attn.v_bias", "attn.logit_scale", "attn.qkv.weight", "attn.cpb_mlp.0.weight",
        "attn.cpb_mlp.0.bias", "attn.cpb_mlp.2.weight", "attn.proj.weight", "attn.proj.bias", "norm1.weight",
        "norm1.bias", "mlp.fc1.weight", "mlp.fc1.bias", "mlp.fc2.weight", "mlp.fc2.bias", "norm2.weight",
        "norm2.bias",
    }  # fmt: skip
    expected = {f"layers.{i}.blocks.{j}.{name}" for i in range(2) for j in range(2) for name in block}
    expected |= {f"layers.0.downsample.{n}" for n in ("reduction.weight", "norm.weight", "norm.bias")}
    expected |= {f"patch_embed.{part}.{kind}" for part in ("proj", "norm") for kind in ("weight", "bias")}
    assert names == expected | {"norm.weight", "norm.bias"}


def test_weights_move_to_another_window_and_image_size() -> None:
    source = small()
    randomize(source)
    target = small(image_size=64, window_size=8, pretrained_windows=source.window_sizes)
    assert target.load_state_dict(source.state_dict(), strict=True)
    assert target.layers[0].windows.pretrained_window == 4


def test_extra_norms_follow_every_sixth_block_of_a_stage() -> None:
    with torch.device("meta"):
        model = models.create("swin_v2_giant", image_size=256, window_size=8)
    extra = [
        (i, j)
        for i, stage in enumerate(model.layers)
        for j, b in enumerate(stage.blocks)
        if b.norm3 is not None
    ]
    assert extra == [(2, j) for j in (5, 11, 17, 23, 29, 35, 41)]
    block = Block(16, 2, shifted=False, drop_path=0.0, extra_norm=True)
    output = block(torch.randn(2, 4, 4, 16) * 7 + 3, WindowGeometry(4, 4, "shrink"), None)
    torch.testing.assert_close(output.std(-1, unbiased=False), torch.ones(2, 4, 4), atol=1e-3, rtol=0)


# --- mistakes --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"image_size": 30}, "image_size is 30, .* multiple of 8"),
        ({"image_size": 40}, "10x10 tokens cannot be cut into windows of 4x4"),
        ({"window_size": 0}, "window_size is 0"),
        ({"drop_path": 1.0}, "drop_path is 1.0"),
        ({"pretrained_windows": (4,)}, "has 1 entries, but this backbone has 2 stages"),
        ({"window_rule": "crop"}, "window_rule is 'crop', .* shrink, pad"),
        ({"patch_size": 0}, "patch_size 0"),
    ],
)
def test_impossible_geometry_is_one_clear_sentence(arguments: dict[str, object], message: str) -> None:
    settings: dict[str, object] = {"image_size": 32, "window_size": 4, **arguments}
    with pytest.raises(ValueError, match=f"swin_v2_pico cannot be built: .*{message}") as error:
        models.create("swin_v2_pico", **settings)  # type: ignore[arg-type]
    assert "\n" not in str(error.value)


def test_unknown_name_lists_the_known_ones() -> None:
    with pytest.raises(ValueError, match=r"'swin_v3' is unknown.*swin_v2_pico.*swin_v2_giant"):
        models.create("swin_v3", image_size=32, window_size=4)


def test_images_of_another_size_are_refused_where_windows_shrink() -> None:
    with pytest.raises(ValueError, match="48x48 pixels, but this backbone was built for 32x32"):
        small()(images_of(1, 48))


@torch.no_grad()
def test_rectangles_with_the_same_windows_fit_where_windows_shrink() -> None:
    model = SwinV2(SwinV2Size(16, (2, 2), (2, 4)), image_size=32, window_size=4).eval()
    randomize(model)
    wide = images_of(2, 32, 64)
    assert [m.shape[2:] for m in model.feature_maps(wide)] == [(8, 16), (4, 8)]
    pad = small(window_rule="pad").eval()
    pad.load_state_dict(model.state_dict())
    torch.testing.assert_close(model.feature_maps(wide)[0], pad.feature_maps(wide)[0], atol=0, rtol=0)
    assert not torch.allclose(model(wide), pad(wide))  # there the second stage shifts
    # Larger, or with a last map of 4x6, or smaller, or not of whole tokens.
    for height, width in ((64, 64), (32, 48), (24, 32), (36, 32)):
        with pytest.raises(ValueError, match=f"{height}x{width} pixels"):
            model(images_of(1, height, width))


# --- initialisation and regularisation -------------------------------------------------------------------


def test_blocks_start_as_the_identity() -> None:
    torch.manual_seed(0)
    model = small()
    x = torch.randn(2, 8, 8, 16)
    stage = model.layers[0]
    for block in stage.blocks:
        assert torch.equal(block(x, stage.windows, stage.windows.shift_mask), x)
    model(images_of(2, 32)).square().sum().backward()
    for name, parameter in model.named_parameters():
        moves = "blocks" not in name or "norm" in name
        assert bool(parameter.grad.any()) == moves or name == "norm.weight", name


def test_initial_spread() -> None:
    torch.manual_seed(0)
    model = models.create("swin_v2_pico", image_size=32, window_size=4)
    for name, parameter in model.named_parameters():
        if name.endswith(("qkv.weight", "fc1.weight", "reduction.weight", "cpb_mlp.0.weight")):
            assert parameter.std().item() == pytest.approx(0.02, rel=0.1), name
        if name.endswith("logit_scale"):
            assert (parameter == math.log(10)).all()


def test_drop_path_keeps_the_expectation_and_drops_whole_samples() -> None:
    torch.manual_seed(0)
    drop = DropPath(0.25).train()
    output = drop(torch.ones(20_000, 2, 2, 3))
    per_sample = output.flatten(1)
    assert (per_sample == per_sample[:, :1]).all()
    values, counts = per_sample[:, 0].unique(return_counts=True)
    torch.testing.assert_close(values, torch.tensor([0.0, 1 / 0.75]))
    assert counts[0].item() / 20_000 == pytest.approx(0.25, abs=0.015)
    assert output.mean().item() == pytest.approx(1.0, abs=0.02)
    assert torch.equal(drop.eval()(output), output)


def test_drop_path_rates_rise_linearly_over_all_blocks() -> None:
    rates = [b.drop_path.rate for stage in small(drop_path=0.3).layers for b in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_a_dropped_sample_skips_the_block_in_spite_of_the_norms_bias() -> None:
    block = Block(16, 2, shifted=False, drop_path=0.999999, extra_norm=False).train()
    randomize(block)
    x = torch.randn(4, 4, 4, 16)
    assert torch.equal(block(x, WindowGeometry(4, 4, "shrink"), None), x)


def test_activation_checkpointing_changes_nothing() -> None:
    gradients = []
    for checkpointing in (False, True):
        model = small(drop_path=0.5, activation_checkpointing=checkpointing).train()
        randomize(model)
        torch.manual_seed(3)
        loss = model(images_of(4, 32)).square().sum()
        loss.backward()
        gradients.append([loss.detach()] + [p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_training_step_is_deterministic() -> None:
    results = []
    for _ in range(2):
        model = small(window_rule="pad", image_size=36)
        randomize(model)
        model(images_of(4, 36)).square().sum().backward()
        results.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


# --- padding ---------------------------------------------------------------------------------------------


def attend_by_loops(attention: WindowAttention, x: Tensor, window: int, shift: int, bias: Tensor) -> Tensor:
    """The definition, one query and one head at a time, for one image (H, W, C) in double precision."""
    height, width, dim = x.shape
    heads, d = attention.num_heads, dim // attention.num_heads
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rows, columns = padded.shape[:2]
    q, k, v = (padded @ attention.qkv.weight.T).split(dim, dim=-1)
    q, v = q + attention.q_bias, v + attention.v_bias
    output = torch.zeros_like(padded)

    def cell(row: int, column: int) -> tuple[int, int]:  # window, or part of one cut by the border
        return (row - shift) // window, (column - shift) // window

    for row in range(rows):
        for column in range(columns):
            keys = [(r, c) for r in range(rows) for c in range(columns) if cell(r, c) == cell(row, column)]
            position = ((row - shift) % window) * window + (column - shift) % window
            for head in range(heads):
                part = slice(head * d, (head + 1) * d)
                scale = attention.logit_scale[head, 0, 0].clamp(max=math.log(100)).exp()
                logits = []
                for r, c in keys:
                    norm = q[row, column, part].norm() * k[r, c, part].norm()
                    cosine = (q[row, column, part] @ k[r, c, part]) / norm if norm > 0 else torch.zeros(())
                    other = ((r - shift) % window) * window + (c - shift) % window
                    logits.append(cosine * scale + bias[head, position, other])
                weights = torch.stack(logits).softmax(0)
                output[row, column, part] = sum(
                    w * v[r, c, part] for w, (r, c) in zip(weights, keys, strict=True)
                )
    return attention.proj(output[:height, :width])


@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize(("height", "width"), [(5, 7), (8, 8), (3, 3)])
@torch.no_grad()
def test_padded_attention_equals_its_definition(height: int, width: int, shifted: bool) -> None:
    attention = WindowAttention(8, 2).double()
    randomize(attention)
    windows = WindowGeometry(max(height, width), 4, "pad").double()
    x = torch.randn(1, height, width, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    mask = windows.mask_for(height, width) if shifted else None
    bias = attention.compute_position_bias(windows)
    expected = attend_by_loops(attention, x[0], 4, 2 if shifted else 0, bias)
    torch.testing.assert_close(attention(x, windows, mask)[0], expected, atol=1e-10, rtol=0)


@torch.no_grad()
def test_rules_agree_where_every_map_is_larger_than_the_window() -> None:
    shrink, pad = (small(image_size=64, window_rule=rule).eval() for rule in ("shrink", "pad"))
    randomize(shrink)
    pad.load_state_dict(shrink.state_dict())
    torch.testing.assert_close(pad(images_of(2, 64)), shrink(images_of(2, 64)), atol=0, rtol=0)


@torch.no_grad()
def test_padding_rule_takes_any_size() -> None:
    model = small(window_rule="pad").eval()
    randomize(model)
    maps = model.feature_maps(images_of(2, 45, 70))
    assert [m.shape for m in maps] == [(2, 16, 12, 18), (2, 32, 6, 9)]
    native = small(window_rule="pad", image_size=48).eval()
    native.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(images_of(2, 48)), native(images_of(2, 48)), atol=0, rtol=0)


@torch.no_grad()
def test_stage_norms_end_the_maps_and_change_nothing_else() -> None:
    plain, normed = small(window_rule="pad").eval(), small(window_rule="pad", stage_norms=True).eval()
    randomize(normed)
    missing, unexpected = plain.load_state_dict(normed.state_dict(), strict=False)
    assert not missing
    assert set(unexpected) == {f"norm{i}.{kind}" for i in range(2) for kind in ("weight", "bias")}
    images = images_of(2, 45, 70)
    assert torch.equal(plain(images), normed(images))
    for stage, (raw, done) in enumerate(
        zip(plain.feature_maps(images), normed.feature_maps(images), strict=True)
    ):
        norm = normed.get_submodule(f"norm{stage}")
        expected = F.layer_norm(raw.permute(0, 2, 3, 1), (16 * 2**stage,), norm.weight, norm.bias)
        torch.testing.assert_close(done, expected.permute(0, 3, 1, 2))


@torch.no_grad()
def test_maps_of_features_as_input() -> None:
    model = small(window_rule="pad", in_channels=7, patch_size=1).eval()
    randomize(model)
    assert [m.shape for m in model.feature_maps(torch.randn(2, 7, 9, 13))] == [(2, 16, 9, 13), (2, 32, 5, 7)]


@pytest.mark.parametrize("rule", ["shrink", "pad"])
def test_windows_of_one_token_train(rule: str) -> None:
    for arguments in ({"window_size": 1}, {"window_size": 4, "pretrained_windows": (1, 1)}):
        model = small(window_rule=rule, **arguments)
        randomize(model)
        model(images_of(2, 32)).square().mean().backward()
        assert all(p.grad.isfinite().all() for p in model.parameters())


# --- precision -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("chunk", [0, 5])
@pytest.mark.parametrize("kind", ["v1", "v2"])
def test_zero_keys_of_padding_stay_finite_in_half_precision(
    kind: str, chunk: int, dtype: torch.dtype
) -> None:
    if kind == "v2":
        model: Swin = small(image_size=36, window_rule="pad", attention_chunk=chunk)
    else:
        size = SwinV1Size(16, (2, 2), (2, 4))
        model = SwinV1(size, image_size=36, window_size=4, window_rule="pad", attention_chunk=chunk)
    randomize(model)
    reference = model(images_of(2, 36))
    model.to(dtype)
    output = model(images_of(2, 36).to(dtype))
    output.square().mean().backward()
    assert output.isfinite().all()
    for name, parameter in model.named_parameters():
        assert parameter.grad.isfinite().all(), name
    assert (output.float() - reference).abs().mean() < 0.05 * reference.abs().mean()


def test_vectors_of_zeros_get_no_gradient() -> None:
    attention = WindowAttention(8, 2)
    randomize(attention)
    x = torch.zeros(1, 4, 4, 8, requires_grad=True)
    output = attention(x, WindowGeometry(4, 4, "shrink"), None)
    output.square().sum().backward()
    assert x.grad.isfinite().all()
    assert attention.qkv.weight.grad.isfinite().all()


def test_attention_runs_in_fp32_under_autocast() -> None:
    attention = WindowAttention(8, 2)
    randomize(attention)
    windows = WindowGeometry(4, 4, "shrink")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.position_bias(windows).dtype == torch.float32
        output = attention(torch.randn(1, 4, 4, 8), windows, None)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(attention.position_bias(windows), attention.compute_position_bias(windows))


def test_released_mask_leaks_at_the_lowest_temperature_and_ours_does_not() -> None:
    """Cosine logits reach ±100 there, so that -100 does not hide a token beyond the seam (spec 1.3)."""
    changes = {}
    for fill in (MASKED_LOGIT, -100.0):
        attention = WindowAttention(8, 1).eval()
        windows = WindowGeometry(8, 4, "shrink", masked_logit=fill)
        with torch.no_grad():
            attention.logit_scale.fill_(9.0)
            attention.qkv.weight.copy_(torch.cat((torch.eye(8), -torch.eye(8), torch.eye(8))))
            attention.proj.weight.copy_(torch.eye(8))
            x = torch.ones(1, 8, 8, 8)  # own keys are opposite to the query: logit -100
            changed = x.clone()
            changed[0, 0, 0] = -1.0  # beyond the seam lies one that agrees with it: logit +100
            outputs = [attention(tokens, windows, windows.shift_mask) for tokens in (x, changed)]
        changes[fill] = (outputs[0] - outputs[1])[0, 7, 7].abs().max().item()  # a window of four regions
    assert changes[MASKED_LOGIT] == 0.0
    assert changes[-100.0] > 0.01


def test_temperature_is_bounded_above_only() -> None:
    attention = WindowAttention(8, 2).eval()
    randomize(attention)
    windows, x = WindowGeometry(4, 4, "shrink"), torch.randn(1, 4, 4, 8)

    def attend(scale: float) -> Tensor:
        attention.logit_scale.data.fill_(scale)
        return attention(x, windows, None)

    with torch.no_grad():
        assert torch.equal(attend(9.0), attend(math.log(100)))
        assert not torch.allclose(attend(-3.0), attend(0.0))


# --- cache of the position bias --------------------------------------------------------------------------


@pytest.fixture
def evaluated() -> SwinV2:
    model = small().eval()
    randomize(model)
    with torch.no_grad():
        model(images_of(1, 32))
    return model


def count_computations(model: SwinV2, monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = WindowAttention.compute_position_bias

    def counted(self: WindowAttention, windows: WindowGeometry) -> Tensor:
        calls.append(1)
        return original(self, windows)

    monkeypatch.setattr(WindowAttention, "compute_position_bias", counted)
    return calls


def test_evaluation_computes_the_bias_once(evaluated: SwinV2, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = count_computations(evaluated, monkeypatch)
    with torch.no_grad():
        evaluated(images_of(2, 32))
    with torch.inference_mode():
        evaluated(images_of(2, 32))
    assert not calls
    evaluated(images_of(2, 32)).sum().backward()  # the bias must stay differentiable in evaluation mode
    assert len(calls) == evaluated.num_layers
    assert evaluated.layers[0].blocks[0].attn.cpb_mlp[2].weight.grad.any()


def test_cached_evaluation_equals_training(evaluated: SwinV2) -> None:
    with torch.no_grad():
        assert torch.equal(evaluated(images_of(2, 32)), copy.deepcopy(evaluated).train()(images_of(2, 32)))


@pytest.mark.parametrize("assign", [False, True])
def test_cache_follows_load_state_dict(evaluated: SwinV2, assign: bool) -> None:
    other = small().eval()
    randomize(other, seed=5)
    evaluated.load_state_dict(copy.deepcopy(other.state_dict()), assign=assign)
    with torch.no_grad():
        assert torch.equal(evaluated(images_of(2, 32)), other(images_of(2, 32)))


@pytest.mark.parametrize("mode", ["in-place", "data-then-train-and-eval", "swapped-data", "copied"])
def test_cache_follows_every_change_of_weights(evaluated: SwinV2, mode: str) -> None:
    changed = copy.deepcopy(evaluated) if mode == "copied" else evaluated
    for module in changed.modules():
        if isinstance(module, WindowAttention):
            weight = module.cpb_mlp[2].weight
            if mode == "data-then-train-and-eval":
                weight.data.mul_(-1)
                changed.train().eval()
            elif mode == "swapped-data":
                weight.data = -weight.data
            else:
                with torch.no_grad():
                    weight.mul_(-1)
    fresh = small().eval()
    fresh.load_state_dict(changed.state_dict())
    with torch.no_grad():
        assert torch.equal(changed(images_of(2, 32)), fresh(images_of(2, 32)))


def test_cache_follows_the_type(evaluated: SwinV2) -> None:
    fresh = copy.deepcopy(evaluated).double()
    with torch.no_grad():
        output = evaluated.double()(images_of(2, 32).double())
        assert torch.equal(output, fresh(images_of(2, 32).double()))
