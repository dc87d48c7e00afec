"""The matrix products of a Swin forward pass, counted from its shapes alone.

Counters that hook modules miss the functional qkv projection and both products of the attention, so the
products are listed here as a fact of the shapes. The networks of the position bias are left out: they depend
on weights, not on images.

Shape legend: B batch, T tokens of all images, C channels, h heads, d = C/h, N tokens of a window.
"""

from __future__ import annotations

from dataclasses import dataclass

from models.backbones.swin import Swin


@dataclass(frozen=True)
class Product:
    """``count`` times ``batch`` products of (rows, inner) with (inner, columns)."""

    name: str
    rows: int
    inner: int
    columns: int
    batch: int = 1
    count: int = 1

    @property
    def flops(self) -> int:
        """Multiplications and additions of all of them."""
        return 2 * self.rows * self.inner * self.columns * self.batch * self.count


def forward_products(backbone: Swin, batch: int, head_columns: int, *, per_token: bool) -> list[Product]:
    """All products of one forward pass on ``batch`` images of the backbone's nominal size.

    Args:
        head_columns: outputs of the linear head.
        per_token: whether the head reads every token of the last map (SimMIM's decoder) or one vector per
            image (a classifier).
    """
    patch, side = backbone.patch_size, -(-backbone.image_size // backbone.patch_size)
    dim = backbone.embed_dim
    products = [Product("patch embedding", batch * side**2, 3 * patch**2, dim)]
    for stage, depth in enumerate(backbone.depths):
        name = f"stage {stage + 1}"
        window, heads = backbone.window_sizes[stage], backbone.num_heads[stage]
        padded = -(-side // window) * window
        tokens, attended, windows = batch * side**2, batch * padded**2, batch * (padded // window) ** 2
        products += [
            Product(f"{name} qkv", attended, dim, 3 * dim, count=depth),
            Product(f"{name} q·k", window**2, dim // heads, window**2, windows * heads, depth),
            Product(f"{name} weights·v", window**2, window**2, dim // heads, windows * heads, depth),
            Product(f"{name} proj", attended, dim, dim, count=depth),
            Product(f"{name} fc1", tokens, dim, 4 * dim, count=depth),
            Product(f"{name} fc2", tokens, 4 * dim, dim, count=depth),
        ]
        if stage < len(backbone.depths) - 1:
            side = -(-side // 2)
            products.append(Product(f"{name} merging", batch * side**2, 4 * dim, 2 * dim))
            dim *= 2
    rows = batch * side**2 if per_token else batch
    products.append(Product("head", rows, dim, head_columns))
    return products


def step_flops(products: list[Product]) -> int:
    """Of a training step: each product has two in the backward pass, one for either factor's gradient.

    The first layer's images need none; that is a hundredth of the total and is counted all the same.
    """
    return 3 * sum(product.flops for product in products)
