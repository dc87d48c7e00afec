"""What the server says about itself and its model: metadata, configuration and statistics of the protocol."""

from __future__ import annotations

from typing import Any

from flows.serving.package import TensorSpec
from flows.serving.vision import protocol
from flows.serving.vision.model import LoadedModel


def server() -> dict[str, Any]:
    return {"name": protocol.SERVER_NAME, "version": "2", "extensions": protocol.EXTENSIONS}


def metadata(model: LoadedModel) -> dict[str, Any]:
    return {
        "name": model.info.name,
        "versions": [model.info.version],
        "platform": protocol.ONNX_PLATFORM,
        "inputs": [_tensor(model.image)],
        "outputs": [_tensor(model.logits)],
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def configuration(model: LoadedModel) -> dict[str, Any]:
    """Triton's model configuration, as far as it means something here; `dims` leave the batch out."""
    return {
        "name": model.info.name,
        "platform": protocol.ONNX_PLATFORM,
        "backend": "onnxruntime",
        "max_batch_size": model.max_batch,
        "input": [_configured(model.image)],
        "output": [_configured(model.logits)],
        "dynamic_batching": {"max_queue_delay_microseconds": round(model.max_wait_s * 1e6)},
    }


def _configured(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "data_type": f"TYPE_{spec.datatype}", "dims": list(spec.shape[1:])}


def statistics(model: LoadedModel) -> dict[str, Any]:
    """Statistics extension: totals since the version was loaded; times in nanoseconds."""
    counts = model.counts
    with counts.lock:

        def entry(nanoseconds: int) -> dict[str, int]:
            return {"count": counts.success, "ns": nanoseconds}

        return {
            "model_stats": [
                {
                    "name": model.info.name,
                    "version": model.info.version,
                    "last_inference": counts.last_inference_ms,
                    "inference_count": counts.images,
                    "execution_count": counts.batches,
                    "inference_stats": {
                        "success": entry(counts.input_ns + counts.queue_ns + counts.infer_ns),
                        "fail": {"count": counts.failures, "ns": 0},
                        "queue": entry(counts.queue_ns),
                        "compute_input": entry(counts.input_ns),
                        "compute_infer": entry(counts.infer_ns),
                        "compute_output": entry(0),
                    },
                    "batch_stats": [
                        {
                            "batch_size": size,
                            "compute_input": {"count": batches, "ns": 0},
                            "compute_infer": {"count": batches, "ns": nanoseconds},
                            "compute_output": {"count": batches, "ns": 0},
                        }
                        for size, (batches, nanoseconds) in sorted(counts.by_batch_size.items())
                    ],
                }
            ]
        }
