"""Parameter names of the published layouts: one table each, read in both directions.

In a table ``#`` stands for a number and ``*`` for ``weight`` or ``bias``; both sides of a row have the same
ones in the same order. Names on the left are ours (a backbone's, without prefix, plus ``head``,
``mask_token`` and ``decoder``), except that attention is written with separate ``attn.q``, ``attn.k``,
``attn.v``, which ``attention.py`` joins and splits.
"""

from __future__ import annotations

import re

Row = tuple[str, str]


class Renaming:
    """Two-way table of names; what no row matches is answered with None."""

    def __init__(self, *rows: Row) -> None:
        self._to_ours = [(_pattern(theirs), _template(ours)) for ours, theirs in rows]
        self._to_theirs = [(_pattern(ours), _template(theirs)) for ours, theirs in rows]

    def to_ours(self, name: str) -> str | None:
        return _rename(name, self._to_ours)

    def to_theirs(self, name: str) -> str | None:
        return _rename(name, self._to_theirs)


def _pattern(side: str) -> re.Pattern[str]:
    return re.compile(re.escape(side).replace(r"\#", r"(\d{1,3})").replace(r"\*", "(weight|bias)"))


def _template(side: str) -> str:
    return side.replace("#", "{}").replace("*", "{}")


def _rename(name: str, rules: list[tuple[re.Pattern[str], str]]) -> str | None:
    for pattern, template in rules:
        if match := pattern.fullmatch(name):
            return template.format(*match.groups())
    return None


# ---- transformers ------------------------------------------------------------------------------------------
#
# Published files have the names on the right of the first two tables. Since version 5 transformers holds most
# of these models under shorter names in memory (the ``…_IN_MEMORY`` tables), and renames when it reads or
# writes a file; a bare state dict has those.

_SWIN_EMBEDDINGS: tuple[Row, ...] = (
    ("mask_token", "embeddings.mask_token"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("patch_embed.norm.*", "embeddings.norm.*"),
    ("layers.#.downsample.reduction.weight", "encoder.layers.#.downsample.reduction.weight"),
    ("layers.#.downsample.norm.*", "encoder.layers.#.downsample.norm.*"),
    ("norm.*", "layernorm.*"),
)
_SWIN_BLOCK: tuple[Row, ...] = (
    ("norm1.*", "layernorm_before.*"),
    ("norm2.*", "layernorm_after.*"),
    ("attn.q.*", "attention.self.query.*"),
    ("attn.k.*", "attention.self.key.*"),
    ("attn.v.*", "attention.self.value.*"),
    ("attn.proj.*", "attention.output.dense.*"),
    ("attn.logit_scale", "attention.self.logit_scale"),
    ("attn.cpb_mlp.#.*", "attention.self.continuous_position_bias_mlp.#.*"),
    ("attn.relative_position_bias_table", "attention.self.relative_position_bias_table"),
    ("mlp.fc1.*", "intermediate.dense.*"),
    ("mlp.fc2.*", "output.dense.*"),
)
_VIT_EMBEDDINGS: tuple[Row, ...] = (
    ("cls_token", "embeddings.cls_token"),
    ("mask_token", "embeddings.mask_token"),
    ("pos_embed", "embeddings.position_embeddings"),
    ("dist_token", "embeddings.distillation_token"),
    ("patch_embed.proj.*", "embeddings.patch_embeddings.projection.*"),
    ("norm.*", "layernorm.*"),
    ("fc_norm.*", "pooler.layernorm.*"),
)
_VIT_BLOCK: tuple[Row, ...] = (
    ("norm1.*", "layernorm_before.*"),
    ("norm2.*", "layernorm_after.*"),
    ("attn.q.*", "attention.attention.query.*"),
    ("attn.k.*", "attention.attention.key.*"),
    ("attn.v.*", "attention.attention.value.*"),
    ("attn.proj.*", "attention.output.dense.*"),
    (
        "attn.relative_position_bias_table",
        "attention.attention.relative_position_bias.relative_position_bias_table",
    ),
    ("gamma_1", "lambda_1"),
    ("gamma_2", "lambda_2"),
    ("mlp.fc1.*", "intermediate.dense.*"),
    ("mlp.fc2.*", "output.dense.*"),
)
_ATTENTION_IN_MEMORY: tuple[Row, ...] = (
    ("attn.q.*", "attention.q_proj.*"),
    ("attn.k.*", "attention.k_proj.*"),
    ("attn.v.*", "attention.v_proj.*"),
    ("attn.proj.*", "attention.o_proj.*"),
    ("mlp.fc1.*", "mlp.fc1.*"),
    ("mlp.fc2.*", "mlp.fc2.*"),
)


def _in_blocks(rows: tuple[Row, ...], ours: str, theirs: str) -> tuple[Row, ...]:
    return tuple((f"{ours}.{left}", f"{theirs}.{right}") for left, right in rows)


_SHARED_TABLE = "relative_position_bias_table"
SWIN_IN_TRANSFORMERS = Renaming(
    *_SWIN_EMBEDDINGS, *_in_blocks(_SWIN_BLOCK, "layers.#.blocks.#", "encoder.layers.#.blocks.#")
)
SWIN_IN_MEMORY = Renaming(
    *_in_blocks(
        (
            *_ATTENTION_IN_MEMORY,
            (f"attn.{_SHARED_TABLE}", f"attention.relative_position_bias.{_SHARED_TABLE}"),
        ),
        "layers.#.blocks.#",
        "encoder.layers.#.blocks.#",
    )
)
VIT_IN_TRANSFORMERS = Renaming(
    *_VIT_EMBEDDINGS,
    (f"rel_pos_bias.{_SHARED_TABLE}", f"encoder.relative_position_bias.{_SHARED_TABLE}"),
    *_in_blocks(_VIT_BLOCK, "blocks.#", "encoder.layer.#"),
)
VIT_IN_MEMORY = Renaming(
    (f"rel_pos_bias.{_SHARED_TABLE}", f"shared_position_bias.{_SHARED_TABLE}"),
    *_in_blocks(
        (
            *_VIT_BLOCK,
            *_ATTENTION_IN_MEMORY,
            (f"attn.{_SHARED_TABLE}", f"relative_position_bias.{_SHARED_TABLE}"),
        ),
        "blocks.#",
        "layers.#",
    ),
)
HEADS_IN_TRANSFORMERS = Renaming(("head.*", "classifier.*"), ("decoder.#.*", "decoder.#.*"))

# ---- torchvision -------------------------------------------------------------------------------------------
#
# One sequence: patches, blocks of stage 0, merging, blocks of stage 1, … ``features.#`` is brought to
# ``blocks.<stage>`` or ``merging.<stage>`` before the table is asked.

SWIN_IN_TORCHVISION = Renaming(
    ("patch_embed.proj.*", "features.0.0.*"),
    ("patch_embed.norm.*", "features.0.2.*"),
    ("layers.#.downsample.reduction.weight", "merging.#.reduction.weight"),
    ("layers.#.downsample.norm.*", "merging.#.norm.*"),
    ("norm.*", "norm.*"),
    ("head.*", "head.*"),
    *_in_blocks(
        (
            ("norm1.*", "norm1.*"),
            ("norm2.*", "norm2.*"),
            ("attn.qkv.*", "attn.qkv.*"),
            ("attn.proj.*", "attn.proj.*"),
            ("attn.logit_scale", "attn.logit_scale"),
            ("attn.cpb_mlp.#.*", "attn.cpb_mlp.#.*"),
            (f"attn.{_SHARED_TABLE}", f"attn.{_SHARED_TABLE}"),
            ("mlp.fc1.*", "mlp.0.*"),
            ("mlp.fc2.*", "mlp.3.*"),
        ),
        "layers.#.blocks.#",
        "blocks.#.#",
    ),
)


def torchvision_stages(name: str) -> str:
    """``features.3.0.x`` → ``blocks.1.0.x``, ``features.2.x`` → ``merging.0.x``; all else stays."""
    match = re.fullmatch(r"features\.(\d{1,3})\.(.+)", name)
    if not match or match[1] == "0":
        return name
    place, rest = int(match[1]), match[2]
    return f"blocks.{place // 2}.{rest}" if place % 2 else f"merging.{place // 2 - 1}.{rest}"


# ---- timm --------------------------------------------------------------------------------------------------


def shift_downsample(name: str, by: int) -> str:
    """timm merges patches at the start of a stage and not at the end of the one before."""
    match = re.fullmatch(r"layers\.(\d{1,3})\.downsample\.(.+)", name)
    return f"layers.{int(match[1]) + by}.downsample.{match[2]}" if match else name
