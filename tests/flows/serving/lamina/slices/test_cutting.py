"""Slices put together again are the model, bit for bit; cuts keep no more than liveness would."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_decoders import Sliced, make_model
from torch import Tensor, fx, nn

from flows.errors import DataError
from flows.serving.lamina.slices import cutting, loading, programs, tracing
from flows.serving.lamina.slices.marker import mark, marked_attention


def run_steps(sliced: Sliced, ids: Tensor, positions: Tensor, split: bool) -> Tensor:
    """The steps in torch, with nothing kept between two but their context."""
    values: dict[str, Tensor] = {"input_ids": ids, "position_ids": positions}

    def run(program: programs.Program) -> None:
        inputs = [values[value.name] for value in program.inputs]
        weights = [sliced.trace.weights[node] for node in program.weights]
        answers = fx.GraphModule(nn.Module(), program.graph)(*inputs, *weights)
        for value, answer in zip(program.outputs, answers, strict=True):
            values[value.name] = answer
            assert answer.shape == tuple(len(ids) if n == "rows" else n for n in value.shape())

    for step, marker in zip(sliced.steps, sliced.trace.markers, strict=False):
        fused = None if split else step.fused
        for program in filter(None, (fused,) if fused else (step.first, step.kvx)):
            run(program)
        q, k, v = (values[f"{name}_{step.layer}"].transpose(0, 1)[None] for name in "qkv")
        mixed = marked_attention(q, k, v, step.layer, marker.scale, marker.window, marker.soft_cap)
        values = {value.name: values[value.name] for value in step.context}
        values[f"attention_{step.layer}"] = mixed[0]
    run(sliced.steps[-1].first)
    return values["logits"]


def test_reassembled_slices_are_the_model_bit_for_bit(sliced: Sliced) -> None:
    ids = torch.randint(0, 61, (13,), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(13)
    with torch.no_grad():
        whole = sliced.model(input_ids=ids[None], position_ids=positions[None], use_cache=False).logits[0]
        assert len(sliced.steps) == 4
        assert torch.equal(run_steps(sliced, ids, positions, True), whole)
        assert torch.equal(run_steps(sliced, ids, positions, False), whole)


def test_marker_carries_what_the_eager_model_does(sliced: Sliced) -> None:
    """Windows, soft caps and scales of the configuration, by transformers' own masks."""
    ids = torch.randint(0, 61, (1, 13), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        marked = sliced.model(input_ids=ids, use_cache=False).logits
        sliced.model.set_attn_implementation("eager")
        try:
            expected = sliced.model(input_ids=ids, use_cache=False).logits
        finally:
            sliced.model.set_attn_implementation("trunkline_marker")
    torch.testing.assert_close(marked, expected, rtol=0, atol=2e-5)
    if sliced.model.config.model_type == "gemma2":
        assert [(m.window, m.soft_cap) for m in sliced.trace.markers] == [(5, 50.0), (0, 50.0), (5, 50.0)]
        assert {m.kv_heads for m in sliced.trace.markers} == {2}  # not repeated over the group


def test_cuts_keep_the_residual_and_less_than_liveness(sliced: Sliced) -> None:
    rows, hidden = cutting.NOMINAL_ROWS, 16 * 4
    for boundary in sliced.boundaries:
        assert boundary.bytes <= boundary.naive_bytes
    first = sliced.boundaries[0]
    if sliced.model.config.model_type == "gemma2":
        assert first.bytes == rows * (hidden + 4)  # residual, positions; not the cosines and sines
        assert first.naive_bytes == rows * (hidden + 2 * 8 * 4)
    else:
        assert first.bytes == rows * (2 * hidden + 4)  # the feed-forward part, too


def test_early_program_holds_nothing_dear_that_q_does_not_need(sliced: Sliced) -> None:
    fused = sliced.model.config.model_type == "gpt_neox"
    for step in sliced.steps[:-1]:
        names = [value.name for value in step.first.outputs]
        assert (f"k_{step.layer}" in names) == fused
        assert step.kvx is not None
        late = [sliced.trace.names[node] for node in step.kvx.weights]
        expected = ("mlp", "post_attention") if fused else ("k_proj", "v_proj")
        assert all(any(part in name for part in expected) for name in late)
    middle = {step.first.signature for step in sliced.steps[1:-1]}
    assert len(middle) == 1, "layers that are alike share one graph"


def test_cut_finds_values_that_every_later_slice_can_do_with() -> None:
    """A diamond where each boundary alone would keep something else: only the last needs `b`, the others can
    keep `a`, from which it comes."""
    graph = fx.Graph()
    x = graph.placeholder("x")

    def call(target: Any, *args: Any, width: int) -> fx.Node:
        node = graph.call_function(target, args)
        node.meta["val"] = torch.empty(4, width)
        return node

    x.meta["val"] = torch.empty(4, 64)
    a = call(torch.ops.aten.linear.default, x, x, width=2)
    b = call(torch.ops.aten.exp.default, a, width=8)
    markers, last = [], a
    for layer in range(3):
        node = graph.call_function(
            torch.ops.trunkline.attention.default, (last, last, last, layer, 1.0, 0, 0.0)
        )
        node.meta["val"] = torch.empty(4, 2)
        markers.append(tracing.Marker(node, layer, 1, 1, 2, 1.0, 0, 0.0))
        last = call(torch.ops.aten.add.Tensor, node, node, width=2)
    logits = call(torch.ops.aten.add.Tensor, last, b, width=8)
    graph.output((logits,))
    trace = tracing.Trace(graph, {}, {}, tuple(markers), logits)
    found = cutting.cut(trace)
    assert [boundary.kept for boundary in found] == [(a,), (a,), (a,)]
    assert found[0].naive_bytes == 4 * 8 * 4


class Regional(nn.Module):
    """One layer whose positions are computed in a region of other gradient mode, as rotary embeddings do."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(61, 8)

    def forward(self, input_ids: Tensor, position_ids: Tensor, use_cache: bool) -> Any:
        with torch.enable_grad():
            angles = position_ids[..., None].float().cos() + position_ids[..., None].float().sin()
        x = self.embed(input_ids) + angles
        q = x[:, None]
        mixed = marked_attention(q, q, q, 0, 1.0, 0, 0.0)[:, :, 0]
        return SimpleNamespace(logits=mixed * angles + x)


def test_regions_are_flattened_before_cutting() -> None:
    """Left in, a region is one node that returns a tuple: no bytes, so a cut through it would look free."""
    trace = tracing.trace(Regional(), 1)
    assert not any(isinstance(node.target, torch._ops.HigherOrderOperator) for node in trace.graph.nodes)
    (boundary,) = cutting.cut(trace)
    assert boundary.bytes == cutting.NOMINAL_ROWS * (8 * 4 + 4)  # x, and one number per row for the angles


UNSUPPORTED = {
    "encoder": ({"is_encoder_decoder": True}, "encoder"),
    "experts": ({"num_local_experts": 8}, "mixture of experts"),
    "parts": ({"vision_config": {}}, "more than a language model"),
    "quantised": ({"quantization_config": {"bits": 4}}, "quantised"),
    "recurrent": ({"layer_types": ["full_attention", "linear_attention"]}, "linear_attention"),
    "shared": ({"num_kv_shared_layers": 2}, "shares K and V"),
    "alibi": ({"alibi": True}, "ALiBi"),
    "longrope": ({"rope_parameters": {"rope_type": "longrope", "rope_theta": 1.0}}, "longrope"),
    "per layer": ({"rope_parameters": {"full_attention": {"rope_type": "dynamic"}}}, "dynamic"),
}


@pytest.mark.parametrize("case", UNSUPPORTED)
def test_unsupported_configuration_is_refused_by_name(case: str, tmp_path: Any) -> None:
    config, words = UNSUPPORTED[case]
    with pytest.raises(DataError, match=f"strange .*{words}"):
        loading.refuse_unsupported({"model_type": "strange", **config}, tmp_path)


def test_what_the_marker_cannot_carry_is_refused_by_name() -> None:
    q = torch.zeros(1, 2, 3, 4)
    layer = nn.Module()
    layer.layer_idx = 1  # type: ignore[assignment]
    for arguments, words in (
        ({"s_aux": torch.zeros(2)}, "layer 1 has attention sinks"),
        ({"attention_mask": torch.zeros(3, 3)}, "a mask of its own"),
        ({"position_bias": torch.zeros(3, 3)}, "position_bias"),
        ({"is_causal": False}, "later tokens"),
    ):
        mask = arguments.pop("attention_mask", None)
        with pytest.raises(DataError, match=words):
            mark(layer, q, q, q, mask, **arguments)
    with pytest.raises(DataError, match="one size"):
        mark(layer, q, q, torch.zeros(1, 2, 3, 6), None)


def test_model_without_transformers_attention_is_refused() -> None:
    with pytest.raises(DataError, match="has 4 layers, but attention"):
        tracing.trace(make_model("gpt2", n_layer=1), 4)
