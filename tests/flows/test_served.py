"""The folders of fetched versions: only the last used ones stay."""

from __future__ import annotations

import os
from pathlib import Path

from flows import serve


def test_only_the_last_used_versions_stay(tmp_path: Path) -> None:
    for age, name in enumerate(["5-e", "1-a", "4-d", "3-c", "2-b"]):  # 5 was used last
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.onnx").touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / ".6-f.being-fetched").mkdir()
    serve.prune(tmp_path, 3)
    assert {entry.name for entry in tmp_path.iterdir()} == {"5-e", "1-a", "4-d", ".6-f.being-fetched"}
    serve.prune(tmp_path, 3)
    assert len(list(tmp_path.iterdir())) == 4
