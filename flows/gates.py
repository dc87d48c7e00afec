"""The five gates between `challenger` and `champion`: integrity, parity, quality, servability, budget.

Each is a function of a candidate that was downloaded from the registry, and measures now. A gate never
raises: what cannot be checked has failed, with the reason. The limits are those of params.yaml (`promotion`,
`parity`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import httpx

from flows import files, smoke
from flows.bootstrap import compare_accuracy, recall_by_class
from flows.champion import Verdicts, judge_folder, judge_version
from flows.dvc_hash import file_md5, tree_md5
from flows.errors import TrunklineError
from flows.language_gates import LANGUAGE_GATES
from flows.language_registration import is_language_model
from flows.placement import check_placement
from flows.registration import PARITY, PLACEMENT, PLACEMENT_SEAL, SEALED
from flows.registry import Version
from flows.serving import golden
from flows.serving.measure import MEGABYTE, measure_variant, processor_name
from flows.serving.package import ModelPackage
from flows.serving.session import available_threads, working_providers
from flows.trial import (
    Candidate,
    Check,
    Failed,
    Gate,
    check_claims,
    check_seals,
    fetched,
    registered_digest,
)

__all__ = ["GATES", "Candidate", "Gate", "check_gate", "fetched", "gates_of"]

PARITY_RELATIONS = {
    "fp32_max_abs_error": "<=",
    "fp32_min_agreement": ">=",
    "int8_max_mean_error": "<=",
    "int8_min_agreement": ">=",
    "int8_max_accuracy_drop": "<=",
}
"""Every limit of params.yaml's section `parity` that a report must be inside of."""


def check_gate(name: str, candidate: Candidate, champion: Version | None) -> Gate:
    """Run one of `gates_of` the candidate's version."""
    try:
        reason, figures = gates_of(candidate.version)[name](candidate, champion)
    except Failed as failed:
        return Gate(name, False, str(failed), failed.figures)
    except TrunklineError as error:
        return Gate(name, False, " ".join(str(error).split()))
    except Exception as error:  # a candidate can break anything; the verdict must not depend on how
        return Gate(
            name, False, f"cannot be checked: {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        )
    return Gate(name, True, reason, figures)


# ---- integrity ---------------------------------------------------------------------------------------------


def check_integrity(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """The files are those that were registered, and the tags say of them what is true."""
    digest = registered_digest(candidate.version)
    package = ModelPackage.open(candidate.folder, digest=digest)
    golden.read_golden(candidate.folder)
    check_seals(candidate, {**SEALED, PLACEMENT_SEAL: PLACEMENT})
    manifest = package.manifest
    claims = {
        "dvc.out_md5": export_md5(package),
        "data.digest": manifest.data_digest,
        "onnx.opset": str(manifest.opset),
    }
    figures = check_claims(candidate, claims)
    return (
        f"content digest {digest[:12]} and every file as registered{', clone modified' * figures['dirty']}",
        figures,
    )


def export_md5(package: ModelPackage) -> str:
    """What dvc.lock holds for the export stage's folder, from the registered files."""
    return tree_md5({name: file_md5(package.folder / name) for name in package.file_names()})


# ---- parity ------------------------------------------------------------------------------------------------


def check_parity(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """The report in the folder is of these very variants, and inside the tolerances of now."""
    path = candidate.folder / PARITY
    if not path.is_file():
        raise Failed(f"the registered folder has no {PARITY}")
    report = files.read_json(path)
    package = ModelPackage.open(candidate.folder, variants=())
    digests = {name: variant.digest for name, variant in package.manifest.variants.items()}
    if report.get("digests") != digests:
        raise Failed(f"{PARITY} is of another export than the one beside it")
    values = {check["key"]: float(check["value"]) for check in report["checks"]}
    limits = candidate.params.parity.model_dump()
    wrong = []
    for key, relation in PARITY_RELATIONS.items():
        value = values.get(key, float("nan"))
        inside = value <= limits[key] if relation == "<=" else value >= limits[key]  # NaN is outside
        if not inside:
            wrong.append(f"{value:.3g} is not {relation} parity.{key} {limits[key]:g}")
    if wrong:
        raise Failed("; ".join(wrong), values)
    return (
        f"fp32 within {values['fp32_max_abs_error']:.1e} of PyTorch, "
        f"int8 agrees on {100 * values['int8_min_agreement']:.1f} %",
        values,
    )


# ---- quality -----------------------------------------------------------------------------------------------


def check_quality(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """Champion and challenger on the same images now; the first version ever meets the floors only."""
    params, limits = candidate.params, candidate.params.promotion
    mine = judge_folder(params, candidate.root, candidate.folder, candidate.version.tags.get("onnx.digest"))
    theirs = mine
    if champion is not None:
        try:
            theirs = judge_version(params, candidate.root, champion)
        except Exception as error:
            reason = f"champion version {champion.version} cannot be compared: {' '.join(str(error).split())}"
            raise Failed(reason, {"top1": mine.top1}) from error
    compared = compare_accuracy(
        theirs.correct,
        mine.correct,
        mine.labels,
        resamples=limits.resamples,
        confidence=limits.confidence,
        seed=params.seed,
    )
    figures: dict[str, Any] = {
        "images": len(mine.labels),
        "split": params.evaluate.split,
        "top1": compared.second.value,
        "top1_low": compared.second.low,
        "top1_high": compared.second.high,
    }
    reason = f"top-1 {compared.second} on {len(mine.labels)} {params.evaluate.split} images"
    wrong = []
    if not compared.second.value >= limits.min_top1:
        wrong.append(f"below promotion.min_top1 {limits.min_top1:g}")
    wrong += _low_classes(mine, limits.min_class_recall)
    if champion is not None:
        gain = compared.gain
        figures |= {"champion_top1": compared.first.value, "gain": gain.value}
        figures |= {"gain_low": gain.low, "gain_high": gain.high}
        reason += (
            f", gain {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) over version {champion.version}"
        )
        # rounded, because 0.98 - 0.97 is a little more than 0.01
        counted = round(gain.value if limits.gain_rule == "point" else gain.low, 9)
        if not counted > limits.min_gain:
            which = "" if limits.gain_rule == "point" else "lower end "
            wrong.append(f"{which}{counted:+.4f} does not exceed promotion.min_gain {limits.min_gain:g}")
        wrong += _dropped_classes(theirs, mine, limits.max_class_drop)
    if wrong:
        raise Failed(f"{reason}; {'; '.join(wrong)}", figures)
    return reason + ("" if champion else "; there is no champion to compare with"), figures


def _low_classes(verdicts: Verdicts, floor: float) -> list[str]:
    recalls = recall_by_class(verdicts.correct, verdicts.labels, len(verdicts.classes))
    low = [(recall, name) for recall, name in zip(recalls, verdicts.classes, strict=True) if recall < floor]
    listed = ", ".join(f"{name} ({recall:.3f})" for recall, name in sorted(low)[:5])
    return [f"recall below promotion.min_class_recall {floor:g}: {listed}"] if low else []


def _dropped_classes(before: Verdicts, after: Verdicts, limit: float) -> list[str]:
    classes = len(after.classes)
    drop = recall_by_class(before.correct, before.labels, classes)
    drop = drop - recall_by_class(after.correct, after.labels, classes)
    lost = [(d, name) for d, name in zip(drop.round(9), after.classes, strict=True) if d > limit]
    listed = ", ".join(f"{name} ({-d:+.3f})" for d, name in sorted(lost, reverse=True)[:5])
    return [f"recall fell by more than promotion.max_class_drop {limit:g}: {listed}"] if lost else []


# ---- servability -------------------------------------------------------------------------------------------


def check_servability(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """The real server, started on the version, answers the golden requests as recorded."""
    requests = golden.read_golden(candidate.folder)
    if not requests:
        raise Failed("registered without golden requests; register it again with `make run`")
    differences, worst = [], 0.0
    with (
        smoke.server(candidate.root, candidate.version) as address,
        httpx.Client(base_url=address, timeout=smoke.REQUEST_S) as client,
    ):
        served = client.get("/healthz").json().get("digest")
        if served != candidate.version.tags.get("onnx.digest"):
            raise Failed(f"the server's health page shows digest {served!r}, not the registered one")
        for request in requests:
            answer = client.post("/v1/classify", files={"file": ("image", request.data)})
            if answer.status_code != 200:
                differences.append(f"{request.name}: status {answer.status_code}: {answer.text[:200]}")
                continue
            said = answer.json()
            worst = max(worst, abs(said["confidence"] - request.confidence))
            tolerance = candidate.params.serve.golden_tolerance
            if different := golden.compare(request, said["index"], said["confidence"], tolerance):
                differences.append(different)
    figures = {"requests": len(requests), "different": len(differences), "largest_difference": worst}
    if differences:
        raise Failed(f"{len(differences)} of {len(requests)} golden requests: {differences[0]}", figures)
    return f"{len(requests)} golden requests answered as recorded (within {worst:.1e})", figures


# ---- budget ------------------------------------------------------------------------------------------------


def check_budget(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """Latency, memory and size of what is served, each variant in a process of its own on this machine."""
    settings, limits = candidate.params.serve, candidate.params.promotion
    threads = settings.threads or available_threads()
    package = ModelPackage.open(candidate.folder)
    # `auto` leaves the choice to the server: then both variants have to keep the limits
    variants = list(package.manifest.variants) if settings.variant == "auto" else [settings.variant]
    figures: dict[str, Any] = {}
    said, wrong = [], []
    for variant in variants:
        path = package.path(variant)
        provider = working_providers(path)[0] if settings.providers == "auto" else settings.providers[0]
        rows = measure_variant(
            path, variant, provider, limits.latency_batch_sizes, limits.latency_runs, threads
        )
        size_mb, memory_mb = package.variant(variant).bytes / MEGABYTE, rows[-1].peak_memory_mb
        figures |= {f"{variant}_p95_ms_batch_{row.batch}": row.p95_ms for row in rows}
        figures |= {f"{variant}_memory_mb": memory_mb, f"{variant}_size_mb": round(size_mb, 3)}
        latency = ", ".join(f"{row.p95_ms:.1f} ms at batch {row.batch}" for row in rows)
        said.append(f"{variant}: p95 {latency}; {memory_mb:.0f} MB of memory, {size_mb:.2f} MB on disk")
        wrong += [
            f"{variant}: batch {row.batch} takes {row.p95_ms:.1f} ms, "
            f"more than promotion.max_p95_ms {limit:g}"
            for row, limit in zip(rows, limits.max_p95_ms, strict=True)
            if not row.p95_ms <= limit
        ]
        for key, value, limit in (
            ("max_memory_mb", memory_mb, limits.max_memory_mb),
            ("max_size_mb", size_mb, limits.max_size_mb),
        ):
            if not value <= limit:
                wrong.append(f"{variant}: {value:.2f} MB is more than promotion.{key} {limit:g}")
    if (candidate.folder / PLACEMENT).is_file() or settings.variant == "auto":
        wrong += filter(None, [check_placement(candidate.folder)])
    machine = f"{processor_name()}, threads: {threads}, {provider.removesuffix('ExecutionProvider')}"
    figures["machine"] = machine
    if wrong:
        raise Failed(f"{'; '.join(wrong)} ({machine})", figures)
    return f"{'; '.join(said)} ({machine})", figures


GATES: Mapping[str, Check] = {
    "integrity": check_integrity,
    "parity": check_parity,
    "quality": check_quality,
    "servability": check_servability,
    "budget": check_budget,
}


def gates_of(version: Version) -> Mapping[str, Check]:
    """The gates of this kind of model; the names are the same for all."""
    return LANGUAGE_GATES if is_language_model(version) else GATES
