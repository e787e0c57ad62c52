"""Published tokens per second of TensorRT-LLM at saturation: another engine than the fitted one.

NVIDIA, TensorRT-LLM performance overview (docs/source/performance/perf-overview.md, v1.0): output
tokens a second of one copy under unlimited load, weights in 8 bits and keys and values in 8 bits,
as in the published checkpoints. Requests at a time are not stated; the row with the most tokens is
taken, as the engine takes what it can hold. Nothing here is fitted: predictions are the priors'.

    python -m benchmarks.accuracy.published_serving
"""

import statistics

from supple.core.layouts.model import DEVICES
from supple.core.layouts.transformer import Transformer
from supple.core.llm.decoding import Decoder, Workload
from supple.core.llm.inference import fit_inference
from supple.core.llm.inference_planner import InferenceJob, InferenceTable, plan_inference
from supple.core.types import Estimate


def _llama(h: int, layers: int, heads: int, ffn: int) -> Transformer:
    return Transformer(
        hidden_size=h,
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=8,
        ffn_size=ffn,
        is_gated=True,
        vocab_size=128_256,
        seq_length=8192,
        is_tied=False,
    )


MODELS = {
    "Llama 3.1 8B": _llama(4096, 32, 32, 14336),
    "Llama 3.3 70B": _llama(8192, 80, 64, 28672),
    "Llama 3.1 405B": _llama(16384, 126, 128, 53248),
}
LOADS = (
    (128, 128),
    (128, 2048),
    (500, 2000),
    (1000, 1000),
    (2048, 128),
    (2048, 2048),
    (5000, 500),
)
"""Tokens of a prompt and of an answer."""
TABLE: tuple[tuple[str, str, int, tuple[int, ...]], ...] = (
    ("Llama 3.1 8B", "h100", 1, (28_312, 22_714, 17_660, 15_220, 3_450, 9_305, 3_459)),
    ("Llama 3.1 8B", "h200", 1, (27_911, 26_221, 20_770, 17_744, 3_538, 12_194, 3_902)),
    ("Llama 3.3 70B", "h100", 2, (6_378, 6_651, 5_222, 4_205, 762, 3_082, 898)),
    ("Llama 3.3 70B", "h200", 1, (3_803, 4_336, 3_666, 2_909, 442, 2_003, 566)),
    ("Llama 3.1 405B", "h100", 8, (3_627, 4_340, 3_994, 2_919, 453, 2_296, 610)),
    ("Llama 3.1 405B", "h200", 8, (3_814, 5_348, 4_724, 3_330, 456, 2_948, 650)),
)


def decoder(name: str, *, cache_share: float = 0.5) -> Decoder:
    """The model in 8 bits; `cache_share`: bytes of the cache over those in 16 bits."""
    sizes = MODELS[name]
    return Decoder(
        family=name,
        num_parameters=sizes.num_parameters,
        num_activated=sizes.num_parameters,
        bytes_per_weight=1.0,
        num_layers=sizes.num_layers,
        cache_bytes=cache_share * sizes.cache_bytes,
    )


def predicted(name: str, device: str, count: int, load: tuple[int, int]) -> Estimate:
    """Most tokens a second of a copy on `count` accelerators."""
    prompt, answer = load
    job = InferenceJob(
        model=decoder(name),
        device=DEVICES[device],
        workload=Workload(name="asked", prompt_tokens=prompt),
        output_tokens=answer,
        max_devices=count,
    )
    table = plan_inference(fit_inference([]), job)
    assert isinstance(table, InferenceTable), str(table)
    rows = [row for row in table.rows if row.num_devices == count]
    return max((row.tokens_per_s for row in rows), key=lambda tokens: tokens.value)


def main() -> None:
    ratios: list[float] = []
    held = 0
    for name, device, count, published in TABLE:
        cells: list[str] = []
        for load, tokens in zip(LOADS, published, strict=True):
            found = predicted(name, device, count, load)
            ratios.append(found.value / tokens)
            inside = found.low <= tokens <= found.high
            held += inside
            cells.append(f"{found.value / tokens:.2f}{'' if inside else '*'}")
        print(f"{name:15} {count} {device}: {'  '.join(cells)}")
    errors = [abs(ratio - 1.0) for ratio in ratios]
    print(
        f"median ratio {statistics.median(ratios):.2f}, mean error {statistics.fmean(errors):.0%}, "
        f"{held} of {len(ratios)} in their interval"
    )


if __name__ == "__main__":
    main()
