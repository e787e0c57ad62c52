"""Validate the description of a served language model, from options or rows of `--measured`: its
sizes, the lengths of its requests, its accelerator."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from supple.core.spec import SpecError, parse_name
from supple.inputs.model_file import SIZES, ModelTable
from supple.inputs.rows import Row, parse_amount, read_rows
from supple.inputs.sizes import MOST, config_of, described_transformer, in_range

if TYPE_CHECKING:  # numpy and scipy are imported by the command, so that `--help` is immediate
    from supple.core.llm.decoding import Decoder, DecodingRun
    from supple.core.llm.inference import ServingMeasurement
    from supple.core.llm.inference_planner import InferenceJob

COLUMNS = ("accelerators", "concurrency", "tokens_per_s", "itl_p90_ms")
OPTIONAL = "family, parameters, activated, bits, layers, prompt, answer, workload, accelerator"
_MODEL_COLUMNS = ("family", "activated", "bits", "layers")
"""Columns that need the column `parameters`."""

# Largest valid values, above those of any known model, request or copy; beyond is a typing error.
_MOST_LAYERS = 1_000
_MOST_TOKENS = 1e8
_MOST_TOKENS_PER_S = 1e9
_MOST_MS = 3.6e6
_OF_CACHE = ("kv_heads", "head_size")
_BESIDE_PARAMETERS = ("layers", *_OF_CACHE)
_IN_16_BITS = 4.0
"""Bytes of a key and a value of one width."""
_LEAST_SHARE = 1e-4
"""Least share of parameters active per token: the sparsest published mixture has 1/2,000."""


def served_model(
    family: str,
    parameters: str,
    activated: str | None,
    bits: int,
    layers: int | None,
    named: Callable[[str], str],
) -> "Decoder":
    """Return the model of these sizes. Raises `SpecError` for impossible sizes; `named` gives the
    names for messages."""
    from supple.core.llm.decoding import Decoder

    total = _amount(parameters, named("parameters"))
    used = total if activated is None else _amount(activated, named("activated"))
    if used > total:
        raise SpecError(
            f"{named('activated')} {activated} is more than the {parameters} parameters: a token "
            "uses at most all of them. Swap the two."
        )
    if used < _LEAST_SHARE * total:
        raise SpecError(
            f"{named('activated')} {activated} of {parameters} parameters: a token uses more than "
            f"one in {1 / _LEAST_SHARE:,.0f}, here {_LEAST_SHARE * total:,.0f}. Check the letter "
            "after the number: K, M, B or T."
        )
    if layers is not None and not 1 <= layers <= _MOST_LAYERS:
        raise SpecError(
            f"{named('layers')} is {layers}: it must be from 1 to {_MOST_LAYERS:,}. Omit it if it "
            "is unknown."
        )
    return Decoder(
        family=family,
        num_parameters=total,
        num_activated=used,
        bytes_per_weight=_weight_bytes(bits, named("bits")),
        num_layers=layers,
    )


def described_decoder(described: ModelTable) -> "Decoder":
    """Return the model of a table [serve]: by its parameters, its sizes or its config.json. Raises
    `SpecError`."""
    from supple.core.llm.decoding import Decoder

    parameters, named = described.text("parameters"), described.named
    if parameters is not None:
        whole = described.whole
        model = served_model(
            "asked",
            parameters,
            described.text("activated"),
            whole("bits", 16) or 0,
            whole("layers"),
            named,
        )
        _refuse_sizes(described)
        if "kv_heads" not in described.values:
            _refuse_cache_bits(described)
            return model
        heads, width = (in_range(described, key, MOST[key]) for key in _OF_CACHE)
        at_16 = _IN_16_BITS * heads * width
        return replace(model, cache_bytes=at_16 * _cache_share(described, 16))
    bits, cache_bits = 16, 16
    if "config" in described.values:
        found = config_of(described)
        sizes, cache_bits = found.sizes, found.cache_bits
        bits = found.bits
        if bits is None and "bits" not in described.values:
            raise SpecError(
                f"{described.where}: the bits of a weight quantized by {found.quantization} are "
                "not known. Give bits in a model.toml, in [serve] beside config."
            )
    else:
        sizes = described_transformer(described)
    return Decoder(
        family="asked",
        num_parameters=sizes.num_parameters,
        num_activated=sizes.num_active_parameters,
        bytes_per_weight=_weight_bytes(described.whole("bits", bits) or 0, named("bits")),
        num_layers=sizes.num_layers,
        cache_bytes=sizes.cache_bytes * _cache_share(described, cache_bits),
    )


def _cache_share(described: ModelTable, default: int) -> float:
    """Bytes of the cache over those in 16 bits."""
    bits = described.whole("cache_bits", default) or 0
    if bits not in (16, 8):
        raise SpecError(f"{described.named('cache_bits')} is {bits}: a cache has 16 bits or 8.")
    return bits / 16


def _refuse_sizes(described: ModelTable) -> None:
    """Refuse sizes that mean nothing beside the number of parameters."""
    unused = [key for key in SIZES if key in described.values and key not in _BESIDE_PARAMETERS]
    if unused:
        raise SpecError(
            f"{described.where} has parameters and {', '.join(unused)}: beside the number of "
            f"parameters count {', '.join(_BESIDE_PARAMETERS)}, and activated for a mixture. Leave "
            "one of the two out."
        )
    if ("kv_heads" in described.values) != ("head_size" in described.values):
        raise SpecError(
            f"{described.where}: kv_heads and head_size together are the cache of a token. Give "
            "both, or neither."
        )


def _refuse_cache_bits(described: ModelTable) -> None:
    if "cache_bits" in described.values:
        raise SpecError(
            f"{described.named('cache_bits')}: the size of the cache is not known from parameters "
            "alone. Give kv_heads and head_size too, or the sizes instead of the parameters."
        )


def check_tokens(tokens: float, what: str) -> float:
    """Validate the mean length of a prompt or an answer, in tokens. Raises `SpecError`."""
    if not 1 <= tokens <= _MOST_TOKENS:
        raise SpecError(
            f"{what} is {tokens:g} tokens: it must be at least 1 and at most {_MOST_TOKENS:,.0f}."
        )
    return tokens


def _amount(text: str, what: str) -> float:
    """Parse a number of parameters: `"8B"` is 8e9."""
    count = parse_amount(text)
    if not 1e3 <= count <= 1e15:
        raise SpecError(f"{what} {text!r}: give a number of parameters such as 350M or 8B.")
    return count


def _weight_bytes(bits: int, what: str) -> float:
    """Return bytes per weight, including the quantization scales at 4 bits."""
    known = {16: 2.0, 8: 1.0, 4: 0.55}
    if bits not in known:
        raise SpecError(f"{what} is {bits}: weights are served in 16, 8 or 4.")
    return known[bits]


def read_served(path: Path, job: "InferenceJob") -> "list[ServingMeasurement]":
    """Read the measurements of `--measured`. Optional columns default to the model, load and
    accelerator of `job`. Raises `SpecError` naming the file and the line."""
    rows = read_rows(path, COLUMNS, what="--measured", besides=f"for other models also {OPTIONAL}")
    return [_measurement(row, job) for row in rows]


def _measurement(row: Row, job: "InferenceJob") -> "ServingMeasurement":
    from supple.core.llm.inference import ServingMeasurement
    from supple.core.llm.serving_limits import why_impossible

    found = ServingMeasurement(
        run=_run(row, job),
        tokens_per_s=row.number("tokens_per_s", most=_MOST_TOKENS_PER_S),
        itl_p90_s=row.number("itl_p90_ms", most=_MOST_MS) * 1e-3,
    )
    impossible = why_impossible(found)
    if impossible is not None:
        reason, advice = impossible
        raise row.refusal(reason, f"{advice}; correct the line, or delete it")
    return found


def _run(row: Row, job: "InferenceJob") -> "DecodingRun":
    from supple.core.layouts.model import DEVICES
    from supple.core.llm.decoding import DecodingRun, Workload, weights_and_room, weights_fit

    def named(column: str) -> str:
        return f"{row.where}: {column}"

    def tokens(column: str, default: float) -> float:
        return check_tokens(row.number(column), named(column)) if column in row else default

    model, device, load = job.model, job.device, job.workload
    others = [column for column in _MODEL_COLUMNS if column in row]
    if others and "parameters" not in row:
        raise row.refusal(
            f"{' and '.join(others)} without parameters: a row without parameters measures the "
            "model being planned, which has its own",
            "Give the parameters too, or leave these cells empty",
        )
    if "parameters" in row:
        model = served_model(
            row.text("family" if "family" in row else "parameters"),
            row.text("parameters"),
            row.text("activated") if "activated" in row else None,
            row.count("bits") if "bits" in row else 16,
            row.count("layers") if "layers" in row else None,
            named,
        )
    if "accelerator" in row:
        device = DEVICES[parse_name(row.text("accelerator"), DEVICES, what=named("accelerator"))]
    run = DecodingRun(
        model=model,
        device=device,
        num_devices=row.count("accelerators"),
        concurrency=row.count("concurrency"),
        workload=Workload(
            name=row.text("workload") if "workload" in row else load.name,
            prompt_tokens=tokens("prompt", load.prompt_tokens),
        ),
        output_tokens=tokens("answer", job.output_tokens),
    )
    if not weights_fit(run):
        raise row.refusal(weights_and_room(run))
    return run
