"""Draw nested, stratified subsets of the training split: the data axis of a study of data scaling."""

from __future__ import annotations

from flows import files, paths
from flows.data import manifest as manifests
from flows.data.shards import read_index
from flows.data.subsets import FILE_NAME, draw_subsets, save_subsets
from flows.params import Params
from flows.stage import Stage, run_stage


def run(params: Params, stage: Stage) -> None:
    manifest = manifests.load(paths.DATA)
    # once before all training; reading an image checks it alone
    manifests.verify_shards(paths.DATA, manifest)
    index = read_index(paths.DATA, manifest.splits["train"])
    labels = [row.label for row in index]
    subsets = draw_subsets(
        [row.key for row in index], labels, params.scale.percentages, params.scale.subset_seed
    )
    with files.replace_folder(paths.SUBSETS) as folder:
        summary = save_subsets(
            subsets, labels, len(manifest.classes), params.scale.subset_seed, manifest.digest, folder
        )

    metrics = {f"images_{subset.percentage:03d}": subset.count for subset in summary.subsets}
    if manifest.classes:
        metrics |= {f"smallest_class_{s.percentage:03d}": min(s.per_class) for s in summary.subsets}
    files.write_json(paths.METRICS / "scale.json", metrics)
    stage.run.log_metrics(metrics)
    stage.run.log_artifact(paths.SUBSETS / FILE_NAME)
    stage.run.set_tags({"data_digest": manifest.digest})

    counts = ", ".join(f"{subset.percentage} % = {subset.count}" for subset in summary.subsets)
    print(f"{manifest.name}: subsets of {summary.of} training images: {counts}")
    for subset in summary.subsets if manifest.classes else ():
        absent = [name for name, count in zip(manifest.classes, subset.per_class, strict=True) if count == 0]
        if absent:
            print(f"  note: the subset of {subset.percentage} % has no image of {', '.join(absent)}")


def main(argv: list[str] | None = None) -> int:
    return run_stage("scale", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
