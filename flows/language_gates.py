"""The gates of a language model, under the names that those of classifiers have (flows.gates).

Quality is bits per byte on the same documents, whatever the tokens of the two models; servability is the
bundle, opened as a server opens it, continuing the golden prompts token by token as PyTorch did. The limits
are `language_promotion`'s, what both kinds share is `promotion`'s.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flows import golden_prompts, language_champion
from flows.bootstrap import compare_rates
from flows.decoders import TRAINING
from flows.errors import GateFailed
from flows.kill_test import kill_test
from flows.language_registration import LANGUAGE_SEALED, bundle_md5
from flows.registry import Version
from flows.serving.lamina.slices.bundle import read_bundle
from flows.serving.lamina.slices.runner import open_slices
from flows.serving.measure import MEGABYTE, processor_name
from flows.trial import Candidate, Check, Failed, check_claims, check_seals, registered_digest

MEASURE_S = 600.0


def check_integrity(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """The files are those that were registered, and the tags say of them what is true."""
    digest = registered_digest(candidate.version)
    bundle = language_champion.open_registered(candidate.folder, digest)
    golden_prompts.read_golden(candidate.folder)
    check_seals(candidate, LANGUAGE_SEALED)
    record = json.loads((candidate.folder / TRAINING).read_text())
    claims = {
        "dvc.out_md5": bundle_md5(bundle),
        "data.digest": str(record["data_digest"]),
        "onnx.opset": str(bundle.manifest.opset),
    }
    figures = check_claims(candidate, claims)
    modified = ", clone modified" * figures["dirty"]
    return f"content digest {digest[:12]} and every file as registered{modified}", figures


def check_parity(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """The slices computed what the model computes, within the tolerance of now."""
    parity = read_bundle(candidate.folder).manifest.parity
    figures = parity.model_dump(mode="json")
    limit = candidate.params.language_export.max_logit_error
    if not parity.tokens:
        raise Failed("the bundle was not compared with its model", figures)
    if not parity.max_abs_error <= limit:
        raise Failed(
            f"a logit differs by {parity.max_abs_error:.3g}, more than language_export.max_logit_error "
            f"{limit:g}",
            figures,
        )
    return (
        f"logits within {parity.max_abs_error:.1e} of the model at {parity.tokens} positions, same greedy "
        f"token at {100 * parity.argmax_agreement:.1f} %",
        figures,
    )


def check_quality(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """Champion and challenger on the same documents now; the first version ever meets the floor only."""
    params, limits = candidate.params, candidate.params.language_promotion
    digest = candidate.version.tags.get("onnx.digest")
    mine = language_champion.judge_folder(params, candidate.root, candidate.folder, digest)
    theirs = mine
    if champion is not None:
        try:
            theirs = language_champion.judge_version(params, candidate.root, champion)
        except Exception as error:
            reason = f"champion version {champion.version} cannot be compared: {' '.join(str(error).split())}"
            raise Failed(reason, {"bits_per_byte": mine.bits_per_byte}) from error
    compared = compare_rates(
        theirs.nats / math.log(2),
        mine.nats / math.log(2),
        mine.bytes,
        resamples=params.promotion.resamples,
        confidence=params.promotion.confidence,
        seed=params.seed,
    )
    split = params.language_evaluate.split
    figures: dict[str, Any] = {
        "documents": len(mine.bytes),
        "bytes": int(mine.bytes.sum()),
        "split": split,
        "bits_per_byte": compared.second.value,
        "bits_per_byte_low": compared.second.low,
        "bits_per_byte_high": compared.second.high,
    }
    reason = f"{compared.second} bits per byte on {len(mine.bytes)} {split} documents"
    wrong = []
    if not compared.second.value <= limits.max_bits_per_byte:
        wrong.append(f"above language_promotion.max_bits_per_byte {limits.max_bits_per_byte:g}")
    if champion is not None:
        gain = compared.gain
        figures |= {"champion_bits_per_byte": compared.first.value, "gain": gain.value}
        figures |= {"gain_low": gain.low, "gain_high": gain.high}
        reason += (
            f", {gain.value:+.4f} ({gain.low:+.4f} to {gain.high:+.4f}) better than version "
            f"{champion.version}"
        )
        counted = round(gain.value if limits.gain_rule == "point" else gain.low, 9)
        if not counted > limits.min_gain:
            which = "" if limits.gain_rule == "point" else "lower end "
            wrong.append(
                f"{which}{counted:+.4f} does not exceed language_promotion.min_gain {limits.min_gain:g}"
            )
    if wrong:
        raise Failed(f"{reason}; {'; '.join(wrong)}", figures)
    return reason + ("" if champion else "; there is no champion to compare with"), figures


def check_servability(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """The bundle opens, in either form of its programs, and answers the golden prompts as recorded; so does
    the real server while an attention worker dies."""
    prompts = golden_prompts.read_golden(candidate.folder)
    bundle = read_bundle(candidate.folder)
    tokens = sum(len(prompt.continuation) for prompt in prompts)
    figures: dict[str, Any] = {"prompts": len(prompts), "tokens": tokens}
    for split in (True, False):
        if different := golden_prompts.ask_golden(open_slices(bundle, split=split), prompts):
            raise Failed(
                f"{len(different)} of {len(prompts)} golden prompts: {different[0]}",
                figures | {"different": len(different)},
            )
    reason = f"{len(prompts)} golden prompts continued as recorded, {tokens} tokens"
    if candidate.params.language_promotion.kill_test:
        try:
            killed = kill_test(candidate.root, candidate.folder)
        except GateFailed as error:
            raise Failed(str(error), figures) from error
        figures |= {"kill_test_s": round(killed.seconds, 1), "kill_test_answers": killed.answers}
        reason += "; also by the server when an attention worker was killed in the middle of an answer"
    return reason, figures


def check_budget(candidate: Candidate, champion: Version | None) -> tuple[str, dict[str, Any]]:
    """Time per token, memory and size, measured in a process of its own on this machine."""
    limits = candidate.params.language_promotion
    measured = measure(candidate.folder, limits.timed_tokens, candidate.params.lamina.model.threads)
    size_mb = sum(path.stat().st_size for path in candidate.folder.iterdir() if path.is_file()) / MEGABYTE
    figures = {**measured, "size_mb": round(size_mb, 3), "machine": processor_name()}
    said = (
        f"p95 {measured['p95_ms']:.1f} ms per token over {measured['tokens']:.0f}; "
        f"{measured['memory_mb']:.0f} MB of memory, {size_mb:.2f} MB on disk"
    )
    wrong = [
        f"{value:.2f} {unit} is more than language_promotion.{key} {limit:g}"
        for key, value, limit, unit in (
            ("max_token_ms", measured["p95_ms"], limits.max_token_ms, "ms"),
            ("max_memory_mb", measured["memory_mb"], limits.max_memory_mb, "MB"),
            ("max_size_mb", size_mb, limits.max_size_mb, "MB"),
        )
        if not value <= limit
    ]
    if wrong:
        raise Failed(f"{'; '.join(wrong)} ({figures['machine']})", figures)
    return f"{said} ({figures['machine']})", figures


def measure(folder: Path, tokens: int, threads: int) -> dict[str, float]:
    """See `flows.serving.lamina.slices.measure`, which runs in a child process."""
    root = Path(__file__).resolve().parents[1]  # `flows` must be importable from any working directory
    inherited = os.environ.get("PYTHONPATH", "")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(root), inherited]))}
    command = [sys.executable, "-m", "flows.serving.lamina.slices.measure", str(folder)]
    command += ["--tokens", str(tokens), "--threads", str(threads)]
    answer = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=MEASURE_S)
    if answer.returncode != 0:
        last = (answer.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise Failed(f"the bundle cannot be measured: {last[:300]}")
    found: dict[str, float] = json.loads(answer.stdout.splitlines()[-1])
    return found


LANGUAGE_GATES: Mapping[str, Check] = {
    "integrity": check_integrity,
    "parity": check_parity,
    "quality": check_quality,
    "servability": check_servability,
    "budget": check_budget,
}
