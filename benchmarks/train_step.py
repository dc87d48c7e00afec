"""A training step (forward, backward, AdamW) against transformers and against its own matrix products.

    python -m benchmarks.train_step [--cases simmim classify] [--rounds 7] [--device cuda] [--profile simmim]

Contestants, in turns within one process (`benchmarks/interleaved.py`), on the same images and masks:

- transformers: Swinv2ForMaskedImageModeling or Swinv2ForImageClassification of the same size in fp32 (on a
  GPU in bf16), with the fused AdamW that its Trainer chooses;
- ours fp32, and ours bf16: weights and activations in bf16 and, as in the pipeline's training, an fp32 copy
  of the weights that the optimiser works on;
- products: the matrix products of the step and nothing else, that is every forward product and the two of its
  backward pass, in either precision. A step that spent no time on anything else would reach 100 % of them.

Writes benchmarks/results/train_step.md; `--profile` prints where the time of one case goes instead.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Swinv2Config, Swinv2ForImageClassification, Swinv2ForMaskedImageModeling

import models
from benchmarks.interleaved import CLOCKS, Rounds, describe_machine, interleave
from flows import files, params
from flows.planning.arithmetic import Product, forward_products, step_flops
from flows.training import group_parameters
from flows.training.distributed import keep_freed_memory
from flows.training.optimizer import build_optimizer
from models.backbones.swin import Swin
from models.classification import Classifier
from models.parameter_groups import no_weight_decay
from models.pretext.masks import upsample_masks
from models.pretext.simmim import SimMIM, random_masks

RESULTS = Path("benchmarks/results/train_step.md")
CLASSES, MASK_UNIT = 10, 32
Step = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """What is trained, at which size."""

    task: str  # simmim | classify
    backbone: str
    image_size: int
    window_size: int
    batch: int

    def title(self) -> str:
        task = {"simmim": "SimMIM", "classify": "classification"}[self.task]
        return f"{task}, {self.backbone}, {self.image_size} px, window {self.window_size}, batch {self.batch}"


CASES = {
    "simmim": Case("simmim", "swin_v2_tiny", 192, 12, batch=8),
    "classify": Case("classify", "swin_v2_tiny", 64, 8, batch=32),
}
GPU_CASES = {
    "base": Case("simmim", "swin_v2_base", 192, 12, batch=128),
    "large": Case("simmim", "swin_v2_large", 192, 12, batch=128),
    "classify": Case("classify", "swin_v2_tiny", 64, 8, batch=512),
}
GOALS = {
    "fp32 / transformers": 1.25, "fp32 / products": 0.75, "bf16 / transformers": 2.0,
    "bf16 / transformers bf16": 1.5, "bf16 / peak": 0.45,
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One figure of the table, with its goal where there is one."""

    case: str
    measured: str
    value: float
    spread: tuple[float, float]

    def cells(self) -> list[str]:
        goal = GOALS.get(self.measured)
        low, high = self.spread
        verdict = "" if goal is None else ("yes" if self.value >= goal else "no")
        shown = "" if goal is None else f"≥ {goal:g}"
        return [self.case, self.measured, f"{self.value:.2f}", f"{low:.2f}–{high:.2f}", shown, verdict]


# ---- contestants ----


def make_model(case: Case) -> SimMIM | Classifier:
    torch.manual_seed(0)
    backbone = models.create(case.backbone, image_size=case.image_size, window_size=case.window_size)
    # As in the peer. With the zeros that training starts from, the first steps' gradients are so small that
    # the processor handles them as denormal numbers, slowly.
    for name, parameter in backbone.named_parameters():
        if name.endswith(("norm1.weight", "norm2.weight")):
            nn.init.ones_(parameter)
    return SimMIM(backbone, MASK_UNIT) if case.task == "simmim" else Classifier(backbone, CLASSES)


def make_peer(case: Case) -> nn.Module:
    """transformers' model of the same shape. Swin V2 by name has nothing else to give: drop path is off."""
    size = models.BACKBONES[case.backbone]
    config = Swinv2Config(
        image_size=case.image_size, window_size=case.window_size, embed_dim=size.embed_dim,
        depths=list(size.depths), num_heads=list(size.num_heads), drop_path_rate=0.0, encoder_stride=32,
        num_labels=CLASSES,
    )  # fmt: skip
    kind = Swinv2ForMaskedImageModeling if case.task == "simmim" else Swinv2ForImageClassification
    peer: nn.Module = kind(config)
    return peer


@dataclass(frozen=True)
class Data:
    images: Tensor
    mask: Tensor
    labels: Tensor

    @classmethod
    def random(cls, case: Case, device: torch.device) -> Data:
        generator = torch.Generator().manual_seed(0)
        side = case.image_size
        images = torch.randn(case.batch, 3, side, side, generator=generator)
        mask = random_masks(case.batch, max(side // MASK_UNIT, 2), 0.6, generator)
        labels = torch.randint(CLASSES, (case.batch,), generator=generator)
        return cls(images.to(device), mask.to(device), labels.to(device))


def our_step(case: Case, data: Data, dtype: torch.dtype, device: torch.device) -> Step:
    settings = params.load().pretrain.training
    model = make_model(case).train().to(device)
    master = make_model(case).to(device) if dtype != torch.float32 else model
    model.to(dtype)
    groups = group_parameters(master, settings.weight_decay, no_weight_decay)
    optimizer = build_optimizer(master, groups, settings)
    for group in optimizer.param_groups:
        group["lr"] = 1e-4
    weights, exact = list(model.parameters()), list(master.parameters())

    def step() -> None:
        if case.task == "simmim":
            loss = model(data.images, data.mask).loss
        else:
            loss = F.cross_entropy(model(data.images).float(), data.labels)
        loss.backward()
        if master is not model:
            for weight, copy in zip(weights, exact, strict=True):
                copy.grad = None if weight.grad is None else weight.grad.float()
        optimizer.step()
        if master is not model:
            with torch.no_grad():
                torch._foreach_copy_(weights, exact)
        model.zero_grad()

    return step


def peer_step(case: Case, data: Data, dtype: torch.dtype, device: torch.device) -> Step:
    model = make_peer(case).train().to(device, dtype)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0.05, fused=True)
    factor = MASK_UNIT // 4
    token_mask = upsample_masks(data.mask, factor).flatten(1) if case.task == "simmim" else None
    images = data.images.to(dtype)

    def step() -> None:
        if case.task == "simmim":
            loss = model(images, bool_masked_pos=token_mask).loss
        else:
            loss = F.cross_entropy(model(images).logits.float(), data.labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def list_products(case: Case) -> list[Product]:
    """Of one forward pass; the backbone is only asked for its shape."""
    with torch.device("meta"):
        backbone = models.create(case.backbone, image_size=case.image_size, window_size=case.window_size)
    assert isinstance(backbone, Swin)
    dense = case.task == "simmim"
    columns = 3 * backbone.stride**2 if dense else CLASSES
    return forward_products(backbone, case.batch, columns, per_token=dense)


def product_step(products: list[Product], dtype: torch.dtype, device: torch.device) -> Step:
    """All products of a step one after another: forward, gradient of the input, gradient of the weights."""
    operands = []
    for product in products:
        x = torch.randn(product.batch, product.rows, product.inner, dtype=dtype, device=device)
        w = torch.randn(product.batch, product.inner, product.columns, dtype=dtype, device=device)
        if product.batch == 1:
            x, w = x[0], w[0].t().contiguous().t()  # weights lie transposed, as those of a Linear
        y, dx, dw = x @ w, torch.empty_like(x), torch.empty_like(w)
        operands.append((product.count, x, w, y, dx, dw))

    def step() -> None:
        for count, x, w, y, dx, dw in operands:
            for _ in range(count):
                torch.matmul(x, w, out=y)
                torch.matmul(y, w.transpose(-2, -1), out=dx)
                torch.matmul(x.transpose(-2, -1), y, out=dw)
                y.fill_(0.5)  # the products of products would overflow; 2 % of their time

    return step


def peak_step(dtype: torch.dtype, device: torch.device) -> tuple[Step, float]:
    """A large square product, the machine's best, and its operations."""
    side = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(side, side, dtype=dtype, device=device) for _ in range(2))
    return lambda: a @ b, 2.0 * side**3


# ---- the table ----


def measure(case: Case, rounds: int, device: torch.device, clock: str) -> list[Row]:
    data = Data.random(case, device)
    products = list_products(case)
    on_gpu = device.type == "cuda"
    peer_dtype = torch.bfloat16 if on_gpu else torch.float32
    peak, peak_flops = peak_step(torch.bfloat16 if on_gpu else torch.float32, device)
    contestants: dict[str, Step] = {
        "transformers": peer_step(case, data, peer_dtype, device),
        "bf16": our_step(case, data, torch.bfloat16, device),
        "products bf16": product_step(products, torch.bfloat16, device),
        "peak": peak,
    }
    if not on_gpu:
        contestants["fp32"] = our_step(case, data, torch.float32, device)
        contestants["products fp32"] = product_step(products, torch.float32, device)
    found = interleave(contestants, rounds, device, CLOCKS[clock])

    def row(measured: str, name: str, over: str, factor: float = 1.0) -> Row:
        low, high = found.spread(name, over)
        return Row(case.title(), measured, found.speedup(name, over) * factor, (low * factor, high * factor))

    share = step_flops(products) / peak_flops
    rows = []
    if on_gpu:
        rows += [row("bf16 / transformers bf16", "bf16", "transformers")]
        rows += [row("bf16 / products", "bf16", "products bf16"), row("bf16 / peak", "bf16", "peak", share)]
    else:
        rows += [row("fp32 / transformers", "fp32", "transformers")]
        rows += [row("fp32 / products", "fp32", "products fp32"), row("fp32 / peak", "fp32", "peak", share)]
        rows += [row("bf16 / transformers", "bf16", "transformers")]
        rows += [row("bf16 / products", "bf16", "products bf16")]
        rows += [row("transformers / products", "transformers", "products fp32")]
    print_seconds(case, found)
    return rows


def print_seconds(case: Case, found: Rounds) -> None:
    shown = ", ".join(f"{name} {found.median(name) * 1e3:.0f} ms" for name in found.seconds)
    print(f"{case.title()}: {shown}", file=sys.stderr, flush=True)


def table(rows: list[Row]) -> str:
    lines = [
        "| step | rate of ours / rate of | median | rounds | goal | reached |",
        "| --- | --- | ---: | ---: | ---: | --- |",
    ]
    return "\n".join(lines + [f"| {' | '.join(row.cells())} |" for row in rows])


def run(
    cases: list[str] | None = None,
    rounds: int = 7,
    device: torch.device | None = None,
    clock: str = "wall",
) -> str:
    """Measure, write the results' file and return its text."""
    device = device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
    known = GPU_CASES if device.type == "cuda" else CASES
    machine = describe_machine(device)
    rows = [row for name in (cases or list(known)) for row in measure(known[name], rounds, device, clock)]
    text = f"# Training step\n\n{machine}; {rounds} rounds, {clock} clock\n\n{table(rows)}\n"
    files.write_text(RESULTS, text)
    return text


def profile(case: Case, dtype: torch.dtype) -> str:
    """Where the time of our step goes, by operator."""
    device = torch.device("cpu")
    step = our_step(case, Data.random(case, device), dtype, device)
    step(), step()
    with torch.profiler.profile() as profiler:
        step()
    return str(profiler.key_averages().table(sort_by="self_cpu_time_total", row_limit=25))


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", nargs="+", help=f"of {', '.join(CASES)}; on a GPU {', '.join(GPU_CASES)}")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=0, help="0 = all cores")
    parser.add_argument("--clock", choices=list(CLOCKS), default="wall")
    parser.add_argument("--batch", type=int, default=0, help="instead of the case's own")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--profile", choices=list(CASES), help="print the operators of one case instead")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of --profile")
    arguments = parser.parse_args(argv)
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    keep_freed_memory()  # as in the pipeline's training; all contestants gain by it
    if arguments.profile:
        dtype = torch.float32 if arguments.precision == "fp32" else torch.bfloat16
        case = CASES[arguments.profile]
        print(profile(replace(case, batch=arguments.batch or case.batch), dtype))
        return 0
    print(run(arguments.cases, arguments.rounds, torch.device(arguments.device), arguments.clock))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
