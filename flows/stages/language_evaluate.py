"""Stage `language_evaluate`: how well a trained decoder predicts text that it has not seen.

    in   artifacts/language_pretrain, artifacts/text (the split `language_evaluate.split`)
    out  artifacts/language_evaluate    documents.csv, sample.json, sample.txt, throughput.json
         artifacts/metrics/language_evaluate.json

Every token but the first of a document is predicted once, its end included, in rows as long as those of
training. Beside the decoder stand a unigram and a bigram model that were counted on the training split,
judged on the same tokens. Bits per byte divide by the bytes of the texts, so they compare models whose tokens
differ.
"""

from __future__ import annotations

import csv
import io
import math
import time
from pathlib import Path
from typing import Any

import torch

from flows import files, paths
from flows.decoders import Judged, judge_decoder, load_decoder
from flows.errors import DataError, Diverged
from flows.params import LanguageEvaluate, Params
from flows.stage import Stage, run_stage
from flows.text import ngrams
from flows.text.corpus import TokenSplit, load_manifest, load_split
from flows.text.ngrams import Score
from flows.text.tokenizer import END_ID, decode, load_tokenizer
from models.language import Decoder


def run(params: Params, stage: Stage) -> None:
    settings = params.language_evaluate
    manifest = load_manifest(paths.TEXT)
    decoder, record = load_decoder(paths.LANGUAGE_PRETRAIN)
    if record.data_digest != manifest.digest:
        # with other splits, documents of this test set may have been trained on
        raise DataError(
            f"{paths.LANGUAGE_PRETRAIN} was trained on another state of the text; run language_pretrain again"
        )
    split = load_split(paths.TEXT, manifest, settings.split)
    began = time.perf_counter()
    judged = judge_decoder(decoder, split, record.context, settings.batch_size)
    seconds = time.perf_counter() - began
    if not bool(torch.isfinite(judged.nats).all()):
        raise Diverged(f"{paths.LANGUAGE_PRETRAIN} answers with values that are not finite; train it again")
    counted = ngrams.count(load_split(paths.TEXT, manifest, "train").documents(), manifest.vocab_size)
    unigram, bigram = counted.score(split.documents())

    metrics = summarize(judged, unigram, bigram, split)
    sample = continue_document(decoder, split, settings)
    folder = paths.LANGUAGE_EVALUATE
    write_results(folder, judged, split, sample, metrics["tokens"] / seconds)
    files.write_json(paths.METRICS / "language_evaluate.json", metrics)
    stage.run.log_metrics(metrics)
    for path in sorted(folder.iterdir()):
        stage.run.log_artifact(path)
    print(
        f"{settings.split} text: {metrics['bits_per_byte']:.3f} bits per byte (bigram "
        f"{metrics['bigram_bits_per_byte']:.3f}, unigram {metrics['unigram_bits_per_byte']:.3f}), perplexity "
        f"{metrics['perplexity']:.1f} per token, next token right {100 * metrics['top1']:.1f} % "
        f"(bigram {100 * metrics['bigram_top1']:.1f} %)",
        flush=True,
    )


def summarize(judged: Judged, unigram: Score, bigram: Score, split: TokenSplit) -> dict[str, float]:
    """The scalars for `dvc metrics`, rounded: digits beyond the sixth are the machine's, not the model's."""
    tokens, size = int(judged.tokens.sum()), int(split.bytes.sum())
    if not unigram.tokens == bigram.tokens == tokens:
        raise ValueError(f"{unigram.tokens} and {bigram.tokens} tokens were counted, {tokens} judged")
    own = Score(float(judged.nats.sum()), int(judged.correct.sum()), tokens)
    found: dict[str, float] = {"documents": len(split), "bytes": size, "tokens": tokens}
    for prefix, score in (("", own), ("unigram_", unigram), ("bigram_", bigram)):
        found[f"{prefix}loss"] = round(score.nats / tokens, 6)
        found[f"{prefix}bits_per_byte"] = round(score.nats / math.log(2) / size, 6)
        found[f"{prefix}perplexity"] = round(math.exp(min(score.nats / tokens, 700.0)), 6)
        found[f"{prefix}top1"] = round(score.correct / tokens, 6)
    return found


def continue_document(decoder: Decoder, split: TokenSplit, settings: LanguageEvaluate) -> dict[str, Any]:
    """What the decoder makes of the beginning of the longest document, and how it really goes on."""
    tokenizer = load_tokenizer(paths.TEXT)
    document = int(split.lengths.argmax())
    ids = split.document(document)
    room = decoder.config.max_position_embeddings
    prompt = ids[: min(settings.prompt_tokens, len(ids) - 1, room - 1)]
    count = min(settings.sample_tokens, room - len(prompt))
    with torch.inference_mode():
        answer = decoder.generate(torch.from_numpy(prompt)[None], count, END_ID)[0, len(prompt) :]
    return {
        "document": split.names[document],
        "prompt": decode(tokenizer, prompt.tolist()),
        "continuation": decode(tokenizer, answer.tolist()),
        "original": decode(tokenizer, ids[len(prompt) : len(prompt) + count].tolist()),
        "prompt_tokens": prompt.tolist(),
        "continuation_tokens": answer.tolist(),
    }


def write_results(
    folder: Path, judged: Judged, split: TokenSplit, sample: dict[str, Any], tokens_per_s: float
) -> None:
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(("document", "bytes", "tokens", "nats", "correct"))
    columns = (split.bytes.tolist(), judged.tokens.tolist(), judged.nats.tolist(), judged.correct.tolist())
    for name, size, tokens, nats, correct in zip(split.names, *columns, strict=True):
        writer.writerow((name, size, tokens, f"{nats:.6f}", correct))
    with files.replace_folder(folder) as target:
        files.write_text(target / "documents.csv", table.getvalue())
        files.write_json(target / "sample.json", sample)
        text = (
            f"{sample['document']}\n\n--- prompt ---\n{sample['prompt']}\n"
            f"--- continued by the model, greedy ---\n{sample['continuation']}\n"
            f"--- as it really goes on ---\n{sample['original']}\n"
        )
        files.write_text(target / "sample.txt", text)
        files.write_json(
            target / "throughput.json",
            {
                "tokens_per_s": round(tokens_per_s, 1),
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": torch.get_num_threads(),
            },
        )


def main(argv: list[str] | None = None) -> int:
    return run_stage("language_evaluate", run, argv)


if __name__ == "__main__":
    raise SystemExit(main())
