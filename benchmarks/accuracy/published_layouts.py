"""Published iterations of GPT models on 32 to 3,072 A100: a second cluster for the layout model.

Narayanan et al. 2021 (Megatron-LM, SC '21), table 1: sizes, tensor and pipeline degrees, global
batch and the operations a second that every GPU reached; sequences of 2,048, 51,200 tokens, nodes
of eight A100 with a 200 Gbit/s card each. The micro-batch is not in the table: the fastest is
taken, as a planner would.

Smith et al. 2022 (Megatron-Turing NLG 530B, section 3.3): seconds of an iteration of 1,920
sequences on 2,240, 2,800 and 3,360 A100 with 80 GB, eight tensor ranks and 35 stages.

    python -m benchmarks.accuracy.published_layouts

prints both tables as predicted by data sheets alone, with nothing measured.
"""

import statistics
from dataclasses import replace

from supple.core.hardware import lookup
from supple.core.layouts.model import DEVICES, LayoutModel, LayoutRun, Transformer, fit_layouts
from supple.core.types import Estimate, ParallelLayout

# heads, hidden size, layers, tensor and pipeline degree, GPUs, batch, TFLOP/s a GPU
_TABLE = (
    (24, 2304, 24, 1, 1, 32, 512, 137),
    (32, 3072, 30, 2, 1, 64, 512, 138),
    (32, 4096, 36, 4, 1, 128, 512, 142),
    (48, 6144, 40, 8, 1, 256, 1024, 135),
    (64, 8192, 48, 8, 2, 512, 1536, 138),
    (80, 10240, 60, 8, 4, 1024, 1792, 140),
    (96, 12288, 80, 8, 8, 1536, 2304, 148),
    (128, 16384, 96, 8, 16, 1920, 2160, 155),
    (128, 20480, 105, 8, 35, 2520, 2520, 163),
    (160, 25600, 128, 8, 64, 3072, 3072, 163),
)
# GPUs, seconds of an iteration
_NLG_TABLE = ((2240, 60.1), (2800, 50.2), (3360, 44.4))
_NLG_BATCH = 1920
_SEQ_LENGTH, _VOCAB_SIZE = 2048, 51200
_MICRO_BATCHES = (1, 2, 4, 8)


def published() -> list[tuple[list[LayoutRun], float]]:
    """Per row the runs it may have been, by micro-batch, and its seconds an iteration: the paper's
    operations (equation 3, with recomputation) over the rate reached."""
    return [(_runs(*row[:-1]), _operations(*row[:-1]) / (row[5] * row[7] * 1e12)) for row in _TABLE]


def _operations(
    heads: int, hidden: int, layers: int, tp: int, pp: int, gpus: int, batch: int
) -> float:
    h, s = hidden, _SEQ_LENGTH
    return 96 * batch * s * layers * h**2 * (1 + s / (6 * h) + _VOCAB_SIZE / (16 * layers * h))


def _runs(
    heads: int, hidden: int, layers: int, tp: int, pp: int, gpus: int, batch: int
) -> list[LayoutRun]:
    model = Transformer(
        hidden_size=hidden,
        num_layers=layers,
        num_heads=heads,
        seq_length=_SEQ_LENGTH,
        vocab_size=_VOCAB_SIZE,
    )
    dp = gpus // tp // pp
    return [
        LayoutRun(
            model=model,
            layout=ParallelLayout(dp_replicate=dp, tp=tp, pp=pp),
            micro_batch_size=size,
            num_micro_batches=batch // dp // size,
            recompute=True,
        )
        for size in _MICRO_BATCHES
        if batch % (dp * size) == 0
    ]


def predict(model: LayoutModel) -> list[tuple[Estimate, float]]:
    """Predicted and published seconds, row by row."""
    return [
        (min(model.predict_all(runs), key=lambda found: found.value), seconds)
        for runs, seconds in published()
    ]


def published_nlg() -> list[tuple[LayoutRun, float]]:
    """The runs of the 530B model, and their seconds an iteration."""
    whole = _runs(128, 20480, 105, 8, 35, 2240, _NLG_BATCH)[0]
    rows: list[tuple[LayoutRun, float]] = []
    for gpus, seconds in _NLG_TABLE:
        dp = gpus // (8 * 35)
        layout = ParallelLayout(dp_replicate=dp, tp=8, pp=35)
        rows.append((replace(whole, layout=layout, num_micro_batches=_NLG_BATCH // dp), seconds))
    return rows


def main() -> None:
    model = fit_layouts(
        [],
        device=DEVICES["a100-80"],
        link=lookup("infiniband-200x8"),
        local_link=lookup("nvlink-a100"),
        workers_per_node=8,
    )
    rows = predict(model)
    rows += [(model.predict(run), seconds) for run, seconds in published_nlg()]
    gpus = [row[5] for row in _TABLE] + [gpus for gpus, _ in _NLG_TABLE]
    for count, (found, seconds) in zip(gpus, rows, strict=True):
        ends = f"{found.low:.1f} to {found.high:.1f}"
        off = found.value / seconds - 1.0
        print(f"{count:5} GPUs: {found.value:6.1f} s ({ends}), {seconds:.1f} published, {off:+.0%}")
    errors = [abs(found.value / seconds - 1.0) for found, seconds in rows]
    held = sum(found.low <= seconds <= found.high for found, seconds in rows)
    print(f"mean error {statistics.fmean(errors):.0%}, {held} of {len(rows)} in their interval")


if __name__ == "__main__":
    main()
