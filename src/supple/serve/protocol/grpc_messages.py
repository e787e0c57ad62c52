"""Messages of Triton's model configuration, statistics and repository extensions.

In the notation of `supple.serve.protocol.grpc`, with the numbers and the types on the wire of
Triton's `grpc_service.proto` and `model_config.proto`. Fields that are never set are left out.
"""

from collections.abc import Mapping, Sequence
from typing import Final

TRITON_ENUMS: Final[Mapping[str, Sequence[str]]] = {
    "DataType": (
        *("TYPE_INVALID", "TYPE_BOOL", "TYPE_UINT8", "TYPE_UINT16", "TYPE_UINT32", "TYPE_UINT64"),
        *("TYPE_INT8", "TYPE_INT16", "TYPE_INT32", "TYPE_INT64", "TYPE_FP16", "TYPE_FP32"),
        *("TYPE_FP64", "TYPE_STRING", "TYPE_BF16"),
    ),
    "Format": ("FORMAT_NONE", "FORMAT_NHWC", "FORMAT_NCHW"),
}
"""Enum name to its values, numbered from 0."""

_DURATIONS: Final = ("compute_input", "compute_infer", "compute_output")

TRITON_MESSAGES: Final[Mapping[str, Sequence[str]]] = {
    "ModelConfigRequest": ("1 name string", "2 version string"),
    "ModelConfigResponse": ("1 config ModelConfig",),
    "ModelConfig": (
        *("1 name string", "2 platform string", "17 backend string"),
        *("3 version_policy VersionPolicy", "4 max_batch_size int32"),
        *("5 input *ModelInput", "6 output *ModelOutput"),
        "11 dynamic_batching DynamicBatching",
        "19 model_transaction_policy TransactionPolicy",
    ),
    "VersionPolicy": ("1 latest LatestVersions",),
    "LatestVersions": ("1 num_versions uint32",),
    "ModelInput": ("1 name string", "2 data_type DataType", "3 format Format", "4 dims *int64"),
    "ModelOutput": ("1 name string", "2 data_type DataType", "3 dims *int64"),
    "DynamicBatching": (
        "2 max_queue_delay_microseconds uint64",
        *("4 priority_levels uint64", "5 default_priority_level uint64"),
    ),
    "TransactionPolicy": ("1 decoupled bool",),
    "ModelStatisticsRequest": ("1 name string", "2 version string"),
    "ModelStatisticsResponse": ("1 model_stats *ModelStatistics",),
    "ModelStatistics": (
        *("1 name string", "2 version string", "3 last_inference uint64"),
        *("4 inference_count uint64", "5 execution_count uint64"),
        *("6 inference_stats InferStatistics", "7 batch_stats *InferBatchStatistics"),
    ),
    "StatisticDuration": ("1 count uint64", "2 ns uint64"),
    "InferStatistics": tuple(
        f"{number} {name} StatisticDuration"
        for number, name in enumerate(
            ("success", "fail", "queue", *_DURATIONS, "cache_hit", "cache_miss"), 1
        )
    ),
    "InferBatchStatistics": (
        "1 batch_size uint64",
        *(f"{number} {name} StatisticDuration" for number, name in enumerate(_DURATIONS, 2)),
    ),
    "RepositoryIndexRequest": ("1 repository_name string", "2 ready bool"),
    "RepositoryIndexResponse": ("1 models *ModelIndex",),
    "ModelIndex": ("1 name string", "2 version string", "3 state string", "4 reason string"),
}
"""Message name to fields, as `_MESSAGES` in `supple.serve.protocol.grpc`."""
