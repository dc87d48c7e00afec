"""Series under other names, and series of several sources in one answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from prometheus_client import CollectorRegistry
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

ALIASES = {
    "trunkline_requests_running": "vllm:num_requests_running",
    "trunkline_requests_waiting": "vllm:num_requests_waiting",
    "trunkline_kv_usage_ratio": "vllm:kv_cache_usage_perc",
    "trunkline_prompt_tokens": "vllm:prompt_tokens",
    "trunkline_generation_tokens": "vllm:generation_tokens",
    "trunkline_request_success": "vllm:request_success",
    "trunkline_preemptions": "vllm:num_preemptions",
    "trunkline_time_to_first_token_seconds": "vllm:time_to_first_token_seconds",
    "trunkline_inter_token_latency_seconds": "vllm:inter_token_latency_seconds",
    "trunkline_e2e_request_latency_seconds": "vllm:e2e_request_latency_seconds",
    "trunkline_request_queue_time_seconds": "vllm:request_queue_time_seconds",
    "trunkline_request_prefill_time_seconds": "vllm:request_prefill_time_seconds",
    "trunkline_request_decode_time_seconds": "vllm:request_decode_time_seconds",
    "trunkline_request_inference_time_seconds": "vllm:request_inference_time_seconds",
    "trunkline_request_prompt_tokens": "vllm:request_prompt_tokens",
    "trunkline_request_generation_tokens": "vllm:request_generation_tokens",
    "trunkline_cache_config_info": "vllm:cache_config_info",
    "trunkline_request_params_max_tokens": "vllm:request_params_max_tokens",
}
"""Names of families, so without the `_total` of counters."""
ALIAS_LABELS = {"finished_reason": {"cancelled": "abort"}}  # what vLLM calls it


class VllmAlias(Collector):
    """The native series once more, under vLLM's names and with its label `model_name`.

    Colons are reserved for recording rules, which is why they are not the native names.
    """

    def __init__(self, natives: CollectorRegistry, model_name: str) -> None:
        self._natives = natives
        self._model_name = model_name

    def collect(self) -> Iterable[Metric]:
        for metric in self._natives.collect():
            if (alias := ALIASES.get(metric.name)) is None:
                continue
            renamed = Metric(alias, metric.documentation, metric.type)
            for sample in metric.samples:
                if not sample.name.endswith("_created"):
                    name = alias + sample.name[len(metric.name) :]
                    renamed.samples.append(Sample(name, self._labels(sample.labels), sample.value))
            yield renamed

    def _labels(self, labels: Mapping[str, str]) -> dict[str, str]:
        renamed = {key: ALIAS_LABELS.get(key, {}).get(value, value) for key, value in labels.items()}
        return {"model_name": self._model_name, **renamed}


def without_families(text: str, names: set[str]) -> str:
    """Prometheus' text format without the families of these names; nothing of a text that is damaged."""
    try:
        families = {family.name for family in text_string_to_metric_families(text)}
    except ValueError:
        return ""
    dropped = families & names
    kept, keep = [], True
    for line in text.splitlines():
        if line.startswith(("# HELP ", "# TYPE ")):
            keep = line.split()[2].removesuffix("_total") not in dropped
        if keep and line.strip():
            kept.append(line)
    return "".join(line + "\n" for line in kept)
