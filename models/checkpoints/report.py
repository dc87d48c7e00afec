"""What became of every tensor of a checkpoint, for a program and for a terminal."""

from __future__ import annotations

from dataclasses import dataclass, field

from models.checkpoints.description import Description
from models.checkpoints.errors import listed

SHOWN = 3
"""Names in a line that only informs."""


@dataclass(frozen=True)
class Report:
    """Nothing is lost without standing in one of these.

    Attributes:
        source: the file or folder.
        layout: ours, official, timm, transformers or torchvision.
        model: what the checkpoint is of.
        loaded: our names that got the checkpoint's values.
        dropped: its names that were left out → why.
        rebuilt: its buffers that were left out because the model builds its own.
        resized: our names → what was done to fit another window or image.
        fresh: our names that the checkpoint has nothing for and that keep the model's own values.
        notes: what else is worth knowing.
    """

    source: str
    layout: str
    model: Description
    loaded: tuple[str, ...]
    dropped: dict[str, str] = field(default_factory=dict)
    rebuilt: tuple[str, ...] = ()
    resized: dict[str, str] = field(default_factory=dict)
    fresh: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def pretrained_windows(self) -> tuple[int | None, ...]:
        """To be given to ``models.create`` when a Swin V2 is built for other windows."""
        return self.model.pretrained_windows

    def lines(self) -> list[str]:
        """A few lines of text, names shortened."""
        lines = [
            f"{self.source}: {self.layout} layout, {_task(self.model.task)}",
            f"  model    {self.model}",
            f"  loaded   {len(self.loaded)} tensors",
        ]
        lines += [
            f"  resized  {what}: {listed(names, SHOWN)}" for what, names in _grouped(self.resized).items()
        ]
        if self.rebuilt:
            lines.append(
                f"  rebuilt  {len(self.rebuilt)} tables of the geometry: {listed(self.rebuilt, SHOWN)}"
            )
        for reason, names in _grouped(self.dropped).items():
            lines.append(f"  dropped  {len(names)} ({reason}): {listed(names, SHOWN)}")
        if self.fresh:
            lines.append(f"  fresh    not in the checkpoint, kept as they were: {listed(self.fresh, SHOWN)}")
        return lines + [f"  note     {note}" for note in self.notes]


def _grouped(reasons: dict[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, reason in reasons.items():
        groups.setdefault(reason, []).append(name)
    return groups


def _task(task: str) -> str:
    return {
        "simmim": "of SimMIM's pretraining",
        "moby": "of MoBY's pretraining",
        "classifier": "a classifier",
        "backbone": "a backbone without head",
    }[task]
