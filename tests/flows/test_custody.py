"""From the digest on a real server's health page down to the bytes of one raw file, and every break is
named."""

from __future__ import annotations

import hashlib
import json
import shutil
from dataclasses import replace
from pathlib import Path

import httpx
import pytest
import yaml
from promotion_workspace import NAME, OUTPUTS, complete, register, settings_of, write_lock
from rich.console import Console
from safetensors.torch import load_file, save_file
from serving_workspace import ROOT, Exported

from flows import custody, dvc_hash, files, paths, registry, smoke, tracking
from flows.classifiers import WEIGHTS, load_config
from flows.custody import Trace, trace
from flows.custody_page import print_trace
from flows.data.readers import encode_png
from flows.errors import ConfigError, DataError
from flows.params import Params
from flows.registry import Version

CHAIN = [
    "registry",
    "export manifest",
    "dvc.lock",
    "checkpoint",
    "pretrained weights",
    "data manifest",
    "shards",
    "raw file",
]


def finish(root: Path, settings: Params) -> None:
    """Pretrained weights that the checkpoint names, MLflow runs that the receipts name, a lock of it all."""
    checkpoint = root / paths.FINETUNE / "pretrained"
    backbone = {
        name: value for name, value in load_file(checkpoint / WEIGHTS).items() if name.startswith("backbone.")
    }
    (root / paths.PRETRAIN).mkdir(parents=True)
    save_file(backbone, root / paths.PRETRAIN / WEIGHTS)
    config = replace(load_config(checkpoint), start_sha256=files.sha256_file(root / paths.PRETRAIN / WEIGHTS))
    files.write_json(checkpoint / "config.json", config.to_dict())
    complete(root)
    for label in OUTPUTS:
        stage, _, cell = label.partition("@")
        with tracking.stage_run(stage, cell or None, settings) as run:
            receipt = {"stage": label, "run_id": run.run_id, "git": "unknown"}
        files.write_json(root / paths.RECEIPTS / f"{label.replace('@', '-')}.json", receipt)
    write_lock(root)
    lock = yaml.safe_load((root / "dvc.lock").read_text())
    md5 = {out["path"]: out["md5"] for stage in lock["stages"].values() for out in stage["outs"]}
    weights = (paths.PRETRAIN / WEIGHTS).as_posix()
    md5[weights] = dvc_hash.file_md5(root / weights)
    for stage, needs in (
        ("export", ["artifacts/finetune/pretrained", "artifacts/data"]),
        ("finetune@pretrained", [weights, "artifacts/data"]),
    ):
        lock["stages"][stage]["deps"] = [{"path": path, "md5": md5[path]} for path in needs]
    (root / "dvc.lock").write_text(yaml.safe_dump(lock))


@pytest.fixture
def settings(home: Path, exported: Exported) -> Params:
    shutil.copytree(exported.root, home, dirs_exist_ok=True)
    (home / "constraints.txt").touch()
    checked = settings_of(home, exported.params)
    finish(home, checked)
    return checked


@pytest.fixture
def version(home: Path, settings: Params) -> Version:
    return register(settings, home)


def names(found: Trace, state: str) -> list[str]:
    return [link.name for link in found.links if link.state == state]


def told(found: Trace) -> str:
    console = Console(width=200, record=True, force_terminal=False, file=open("/dev/null", "w"))  # noqa: SIM115
    print_trace(found, console)
    return console.export_text()


def test_from_the_health_page_to_the_bytes_of_a_raw_file(
    home: Path, settings: Params, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    with smoke.server(home, version) as address:
        served = httpx.get(f"{address}/healthz", timeout=30).json()["digest"]
    found = trace(settings, served)
    assert [link.name for link in found.links] == CHAIN
    assert names(found, "ok") == CHAIN, told(found)
    assert all(check.state == "ok" for link in found.links for check in link.checks), told(found)
    assert (found.digest, found.version, found.workspace) == (served, version.version, str(home))
    link = {entry.name: entry for entry in found.links}
    assert link["registry"].digest == served == version.tags["onnx.digest"]
    assert link["checkpoint"].digest == files.sha256_file(paths.FINETUNE / "pretrained" / WEIGHTS)
    assert link["pretrained weights"].digest == files.sha256_file(paths.PRETRAIN / WEIGHTS)
    assert link["data manifest"].digest == files.read_json(paths.DATA / "manifest.json")["digest"]

    # the raw file once more, without our readers and shards
    import numpy as np
    from sklearn.datasets import load_digits

    text = next(check.text for check in link["raw file"].checks if "raw file" in check.text)
    number = int(text.split("/")[1].split(".")[0])
    pixels = np.rint(load_digits().images[number] * (255.0 / 16.0)).astype(np.uint8)
    assert link["raw file"].digest == hashlib.sha256(encode_png(pixels)).hexdigest()

    for name, stage in (("checkpoint", "finetune@pretrained"), ("pretrained weights", "pretrain")):
        run = tracking.read_run(settings, link[name].run_id)
        assert run is not None
        assert run[1]["trunkline.stage"] == stage
    page = told(found)
    assert served in page
    assert "✗" not in page
    assert json.loads(json.dumps(found.to_dict()))["links"][0]["state"] == "ok"


def test_any_digest_of_the_chain_leads_to_it(home: Path, settings: Params, version: Version) -> None:
    manifest = files.read_json(paths.EXPORT / "manifest.json")
    rows = (home / paths.DATA / "train.csv").read_text().splitlines()[3].split(",")
    digests = {
        "fp32": version.tags["onnx.digest"],
        "int8": manifest["variants"]["int8"]["digest"],
        "file": manifest["variants"]["fp32"]["sha256"],
        "checkpoint": manifest["source"]["checkpoint_sha256"],
        "pretrained": files.sha256_file(paths.PRETRAIN / WEIGHTS),
        "data": manifest["data_digest"],
        "image": rows[5],
        "pixels": rows[6],
        "shard": files.sha256_file(paths.DATA / "val-000000.tar"),
        "md5": dvc_hash.folder_md5(paths.EXPORT),
        "md5 of data": dvc_hash.folder_md5(paths.DATA),
    }
    for what, digest in digests.items():
        found = trace(settings, digest[:10])
        assert (found.digest, found.version) == (digest, "1"), what
        assert names(found, "ok") == CHAIN, what
    assert trace(settings, rows[6]).links[-1].digest == rows[5], (
        "the chain ends at the image that was asked for"
    )


def test_what_is_no_digest_is_one_line(settings: Params, version: Version) -> None:
    for text in ("abc", "", "xyz12345", "../../etc"):
        with pytest.raises(ConfigError, match="at least 6 hexadecimal digits"):
            trace(settings, text)
    with pytest.raises(DataError, match="nothing here has a digest that begins with 0123456789"):
        trace(settings, "0123456789")


def test_an_ambiguous_beginning_lists_what_it_could_be(
    settings: Params, version: Version, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(custody, "MIN_LETTERS", 1)
    with pytest.raises(ConfigError, match=r"is the beginning of \d+ digests: .*give more digits"):
        trace(settings, "a")


def flip(path: Path) -> None:
    """One byte in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))


@pytest.mark.parametrize(
    ("file", "link"),
    [
        ("artifacts/finetune/pretrained/model.safetensors", "checkpoint"),
        ("artifacts/finetune/pretrained/config.json", "checkpoint"),
        ("artifacts/pretrain/model.safetensors", "pretrained weights"),
        ("artifacts/data/manifest.json", "data manifest"),
        ("artifacts/data/train-000000.tar", "shards"),
        ("artifacts/data/test.csv", "raw file"),
        ("registered/model.onnx", "registry"),
        ("registered/model_int8.onnx", "export manifest"),
        ("registered/dvc.lock", "dvc.lock"),
    ],
)
def test_a_tampered_link_is_named(
    file: str, link: str, home: Path, settings: Params, version: Version
) -> None:
    if file.startswith("registered/"):
        path = next((home / "mlartifacts").rglob(Path(file).name))
    else:
        path = home / file
    flip(path) if path.suffix != ".json" else path.write_text(path.read_text().replace("0", "1", 1))
    found = trace(settings, version.tags["onnx.digest"])
    assert link in names(found, "broken"), told(found)
    broken = next(entry for entry in found.links if entry.name == link)
    assert any(check.state == "broken" and len(check.text) > 20 for check in broken.checks)


def test_a_tampered_tag_is_named(settings: Params, version: Version) -> None:
    for tag, link in (("data.digest", "export manifest"), ("dvc.out_md5", "dvc.lock")):
        right = version.tags[tag]
        registry.tag_version(settings, version, {tag: "0" * 64})
        assert names(trace(settings, version.tags["onnx.digest"]), "broken") == [link]
        registry.tag_version(settings, version, {tag: right})


def test_an_image_changed_in_its_shard_is_named(home: Path, settings: Params, version: Version) -> None:
    row = (home / paths.DATA / "test.csv").read_text().splitlines()[4].split(",")
    with open(home / paths.DATA / row[2], "r+b") as shard:
        shard.seek(int(row[3]) + 40)
        shard.write(b"\0\0")
    found = trace(settings, row[5])
    assert {"shards", "raw file"} <= set(names(found, "broken"))


def test_only_the_registry_is_here(home: Path, settings: Params, version: Version) -> None:
    shutil.rmtree(home / "artifacts")
    (home / "dvc.lock").unlink()
    found = trace(settings, version.tags["onnx.digest"])
    assert names(found, "broken") == []
    assert names(found, "ok")[:3] == CHAIN[:3], told(found)
    assert "is not here" in told(found)
    assert next(entry for entry in found.links if entry.name == "checkpoint").run_id, "receipts travel along"
    assert found.workspace == ""


def test_a_workspace_that_was_trained_again_is_no_break(
    home: Path, settings: Params, version: Version
) -> None:
    """What it made before still lies in DVC's cache, or is said to be gone."""
    cache = home / ".dvc/cache/files/md5"

    def store(path: Path, md5: str) -> None:
        target = cache / md5[:2] / md5[2:]
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, target)

    for output in OUTPUTS.values():
        listing = []
        for path in sorted((home / output).rglob("*")):
            if path.is_file():
                store(path, dvc_hash.file_md5(path))
                listing.append(
                    {"md5": dvc_hash.file_md5(path), "relpath": path.relative_to(home / output).as_posix()}
                )
        (home / "listing").write_text(json.dumps(listing))
        store(home / "listing", dvc_hash.folder_md5(home / output))
    flip(home / paths.FINETUNE / "pretrained" / WEIGHTS)
    files.write_json(home / paths.EXPORT / "manifest.json", {})
    write_lock(home)
    found = trace(settings, version.tags["onnx.digest"])
    assert names(found, "ok") == CHAIN, told(found)

    shutil.rmtree(home / ".dvc")
    found = trace(settings, version.tags["onnx.digest"])
    assert names(found, "broken") == [], told(found)
    assert "neither the workspace nor DVC's cache" in told(found)


def test_a_run_of_another_stage_is_named(home: Path, settings: Params) -> None:
    receipt = files.read_json(home / paths.RECEIPTS / "pretrain.json")
    wrong = files.read_json(home / paths.RECEIPTS / "export.json")["run_id"]
    files.write_json(home / paths.RECEIPTS / "pretrain.json", {**receipt, "run_id": wrong})
    version = register(settings, home)
    found = trace(settings, version.tags["onnx.digest"])
    assert names(found, "broken") == ["pretrained weights"]


def test_an_export_that_is_not_registered(home: Path, settings: Params) -> None:
    manifest = files.read_json(paths.EXPORT / "manifest.json")
    found = trace(settings, manifest["variants"]["fp32"]["digest"])
    assert found.version == ""
    assert names(found, "open") == ["registry"]
    assert names(found, "ok") == CHAIN[1:], told(found)
    assert NAME not in registry.model_names(settings)
