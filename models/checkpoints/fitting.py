"""A recognised checkpoint onto the parameters of a model: exactly those that belong there, or an error that
names the others.

What may be left out, and only as a whole: the head when told so, the parts of a pretext task in a model that
has none of them. What may stay fresh, likewise: a head, the parts of a pretext task. Everything else has to
match one to one. Nothing is changed before all of it has been checked.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Literal, get_args

import torch
from torch import Tensor

from models.backbones.bias_tables import TABLE_METHODS, TableMethod
from models.checkpoints.description import describe
from models.checkpoints.errors import CheckpointError, listed
from models.checkpoints.layouts import REBUILT, Recognized, recognize
from models.checkpoints.reading import Weights
from models.checkpoints.report import Report
from models.checkpoints.transfer import (
    ABSOLUTE,
    RELATIVE,
    give_each_block_a_table,
    is_position_table,
    resize_positions,
)

Head = Literal["keep", "drop"]
PRETEXT = "of SimMIM's pretraining, which this model has no part of"
HEAD_DROPPED = "the head, as told"
HEAD = r"head\."
OTHER = "other:"
_BACKBONES = ("backbone.", "target_backbone.")


def fit(
    weights: Weights,
    wanted: Mapping[str, Tensor],
    head: Head = "keep",
    tables: TableMethod = "bicubic",
    recognized: Recognized | None = None,
) -> tuple[dict[str, Tensor], Report]:
    """The checkpoint as a part of a state dict, and what became of each of its tensors.

    Args:
        weights: what was read.
        wanted: the model's state dict; only names and shapes matter, so it may be on the meta device.
        head: ``keep`` puts the checkpoint's head into the model's, ``drop`` leaves it out and keeps the
            model's own.
        tables: how relative position tables are brought to another size (``bias_tables.py``).
        recognized: what ``recognize`` says of the tensors, where that is known already.

    Raises:
        CheckpointError: anything left over, missing, of another shape, or not finite.
    """
    if tables not in TABLE_METHODS:
        raise CheckpointError(f"tables is {tables!r}, but must be one of {', '.join(TABLE_METHODS)}.")
    if head not in get_args(Head):
        raise CheckpointError(f"head is {head!r}, but must be keep or drop.")
    recognized = recognized or recognize(weights.tensors)
    model = describe(recognized, weights.config)
    places = _places(wanted)
    state, origin = dict(recognized.state), recognized.origin
    dropped = {name: reason for name, reason in recognized.dropped.items() if reason != REBUILT}
    if weights.tensors.keys() == wanted.keys() and any(name.startswith(OTHER) for name in places):
        # Our own MoBY into a MoBY: both networks, their heads, queues and step, each under its name.
        state, origin, dropped = dict(weights.tensors), {}, {}
        places = {name: [name] for name in wanted}
    fresh: list[str] = []
    copied: dict[str, str] = {}
    if left_out := give_each_block_a_table(state, places):
        copied = dict.fromkeys((n for n in state if n.endswith(RELATIVE)), "copied to each block")
        dropped |= {origin[name]: reason for name, reason in left_out.items()}
        fresh += _pop(places, r"fc_norm\.")

    left_out_groups, fresh_groups = _settle_groups(state, places, head, origin, weights.source)
    dropped |= left_out_groups
    fresh += fresh_groups

    problems = _mismatches(state, places, wanted, origin)
    if problems:
        raise CheckpointError(f"{weights.source} does not fit this model: {'; '.join(problems)}.")
    _check_values(
        {n: t for n, t in state.items() if wanted[places[n][0]].is_floating_point()}, origin, weights.source
    )
    fitted: dict[str, Tensor] = {}
    resized = dict(copied)
    for name, tensor in state.items():
        for full in places[name]:
            shape = tuple(wanted[full].shape)
            if tensor.shape == shape:
                fitted[full] = tensor
                continue
            fitted[full] = resize_positions(name, tensor, shape[-2], tables)
            how = f"{tuple(tensor.shape)} → {shape}, {'bicubic' if name == ABSOLUTE else tables}"
            resized[name] = f"{copied[name]}, {how}" if name in copied else how
    notes = list(weights.notes)
    dtypes = sorted({str(t.dtype).removeprefix("torch.") for t in state.values() if t.dtype != torch.float32})
    if dtypes:
        notes.append(f"stored as {', '.join(dtypes)}")
    rebuilt = tuple(name for name, reason in recognized.dropped.items() if reason == REBUILT)
    report = Report(
        source=weights.source,
        layout=recognized.layout,
        model=model,
        loaded=tuple(fitted),
        dropped=dropped,
        rebuilt=rebuilt,
        resized=resized,
        fresh=tuple(fresh),
        notes=tuple(notes),
    )
    return fitted, report


def _places(wanted: Mapping[str, Tensor]) -> dict[str, list[str]]:
    """Names without prefix → the model's names for them: MoBY holds two backbones that start alike."""
    wrapped = any(name.startswith("backbone.") for name in wanted)
    places: dict[str, list[str]] = {}
    for full in wanted:
        name = full
        if wrapped:
            prefix = next((p for p in _BACKBONES if full.startswith(p)), "")
            name = full.removeprefix(prefix)
            if not prefix and not re.match(r"head\.|decoder\.|mask_token$", name):
                name = OTHER + name  # a projector, a queue: no release has them under a name to match
        places.setdefault(name, []).append(full)
    return places


def _settle_groups(
    state: dict[str, Tensor],
    places: dict[str, list[str]],
    head: Head,
    origin: Mapping[str, str],
    source: str,
) -> tuple[dict[str, str], list[str]]:
    """Take out of both sides the groups that the other lacks altogether, and the head when told so.

    Answers with the checkpoint's names that are left out → why, and the model's names that stay fresh.
    """
    dropped: dict[str, str] = {}
    fresh: list[str] = []
    for pattern in (HEAD, r"mask_token$", r"decoder\."):
        given = [name for name in state if re.match(pattern, name)]
        needed = any(re.match(pattern, name) for name in places)
        if pattern == HEAD and given and head == "keep" and not needed:
            raise CheckpointError(
                f"{source} has a head ({listed(given)}), but this model has none: "
                "say head='drop' (--head drop) to leave it out."
            )
        if given and (not needed or (pattern == HEAD and head == "drop")):
            dropped |= {origin[name]: HEAD_DROPPED if pattern == HEAD else PRETEXT for name in given}
            for name in given:
                del state[name]
            given = []
        if not given:
            fresh += _pop(places, pattern)
    return dropped, fresh + _pop(places, OTHER)


def _pop(places: dict[str, list[str]], pattern: str) -> list[str]:
    """Take out the names that match, and answer with the model's names for them."""
    return [full for name in [n for n in places if re.match(pattern, n)] for full in places.pop(name)]


def _mismatches(
    state: Mapping[str, Tensor],
    places: Mapping[str, list[str]],
    wanted: Mapping[str, Tensor],
    origin: Mapping[str, str],
) -> list[str]:
    """One phrase per kind of trouble."""
    problems = []
    if left_over := [origin.get(name, name) for name in state if name not in places]:
        problems.append(f"left over: {listed(left_over)}")
    if missing := [name for name in places if name not in state]:
        problems.append(f"missing: {listed(missing)}")
    shapes = []
    for name in state.keys() & places.keys():
        found, needed = state[name].shape, wanted[places[name][0]].shape
        fits = (
            found[-1:] == needed[-1:] and len(found) == len(needed)
            if is_position_table(name)
            else found == needed
        )
        if not fits:
            shapes.append(f"{origin.get(name, name)} is {tuple(found)} and not {tuple(needed)}")
    if shapes:
        heads = any(name.startswith("head.") for name in state if name in places)
        hint = (
            " (head='drop', or --head drop, leaves the head out)" if heads and "head." in str(shapes) else ""
        )
        problems.append(f"of another shape: {listed(sorted(shapes))}{hint}")
    return problems


def _check_values(state: Mapping[str, Tensor], origin: Mapping[str, str], source: str) -> None:
    numbers = [origin.get(name, name) for name, tensor in state.items() if not tensor.is_floating_point()]
    if numbers:
        raise CheckpointError(
            f"{source} holds weights that are no floating-point numbers: {listed(numbers)}."
        )
    strange = [
        origin.get(name, name)
        for name, tensor in state.items()
        if not tensor.is_meta and not bool(torch.isfinite(tensor.float()).all())
    ]
    if strange:
        raise CheckpointError(
            f"{source} holds weights that are not finite (NaN or infinite): {listed(strange)}."
        )
