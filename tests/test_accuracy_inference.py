"""The accuracy task of inference, on a table of made-up rows."""

import csv
from pathlib import Path

import pytest

from benchmarks.accuracy import published_serving
from benchmarks.accuracy.inference import measure, measurement, read, twin_ratios, weight_bytes

FIELDS = (
    *("task", "model_id", "total_params_b", "activated_params_b", "weight_precision", "gpu"),
    *("num_gpus", "max_num_seqs", "avg_output_tokens", "output_throughput_tokens_per_s"),
    "itl_p90_ms",
)


def row(model: str, total: float, batch: int, step_ms: float, **changes: str) -> dict[str, str]:
    values = ("lm-arena-chat", model, f"{total:g}", f"{total:g}", "bfloat16", "H100", "1")
    rate = 1000.0 * batch / step_ms
    made = zip(FIELDS, (*values, str(batch), "500", f"{rate}", f"{step_ms}"), strict=True)
    return dict(made) | changes


def table(folder: Path) -> Path:
    """Three families whose step takes 4 ms and 0.6 ms per 1e9 parameters."""
    models = (("a/one", 8), ("a/one-vision", 8), ("b/two", 12), ("c/three", 27))
    rows = [row(name, size, b, 4 + 0.6 * size) for name, size in models for b in (8, 16, 32)]
    (folder / "inference").mkdir()
    with (folder / "inference" / "llm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_every_row_is_asked_and_every_figure_has_its_baseline(tmp_path: Path) -> None:
    found = measure(table(tmp_path))
    assert found.task == "inference"
    assert len(found.points) == len(found.covered) == 2 * 12
    for name in ("inference_throughput_mape", "inference_itl_mape"):
        assert 0 <= found.metrics[name] < 0.5
        assert f"{name}_baseline" in found.metrics
    assert found.metrics["inference_throughput_twins"] == 0.0


def test_variants_of_one_model_are_one_family(tmp_path: Path) -> None:
    rows = read(table(tmp_path))
    assert len({name for name, _ in rows}) == 4
    assert {m.run.model.family for _, m in rows} == {"a 8B", "b 12B", "c 27B"}


def test_rows_that_cannot_have_run_as_stated_are_left_out(tmp_path: Path) -> None:
    path = table(tmp_path) / "inference" / "llm.csv"
    with path.open("a", newline="") as file:
        csv.DictWriter(file, FIELDS).writerow(row("d/four", 200, 8, 30.0))
    assert len(read(tmp_path)) == 12


def test_rows_that_lack_a_number_are_left_out_and_extra_figures_may_be_missing(
    tmp_path: Path,
) -> None:
    path = table(tmp_path) / "inference" / "llm.csv"
    with path.open("a", newline="") as file:
        csv.DictWriter(file, FIELDS).writerow(row("d/four", 8, 8, 30.0, itl_p90_ms=""))
    assert len(read(tmp_path)) == 12
    plain = measurement(row("a/one", 8, 8, 10.0))
    assert plain.itl_p50_s is None
    assert plain.running is None
    full = measurement(row("a/one", 8, 8, 10.0) | {"itl_p50_ms": "9.5", "avg_batch_size": "7.9"})
    assert full.itl_p50_s == 0.0095
    assert full.running == 7.9


def test_a_table_of_one_family_is_predicted_from_the_priors(tmp_path: Path) -> None:
    (tmp_path / "inference").mkdir()
    with (tmp_path / "inference" / "llm.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(row("a/one", 8, b, 8.8) for b in (8, 16, 32))
    found = measure(tmp_path)
    assert found.metrics["inference_throughput_mape"] < 1.0
    assert found.metrics["inference_throughput_mape_baseline"] < 10.0
    assert all(estimate.source == "assumed" for estimate, _ in found.points)


def test_precisions_are_told_by_their_bits() -> None:
    assert [weight_bytes(name) for name in ("bfloat16", "fp8", "mxfp4")] == [2.0, 1.0, 0.55]


def test_twins_are_rows_that_nothing_handed_in_tells_apart() -> None:
    one, other = row("a/one", 8, 8, 10.0), row("a/one-vision", 8, 8, 20.0)
    apart = row("a/one", 8, 8, 10.0, gpu="B200")
    found = twin_ratios([measurement(r) for r in (one, other, apart)])
    assert sorted(found) == [(0.5, 2.0), (2.0, 0.5)]


@pytest.mark.parametrize("load", [(128, 128), (1000, 1000), (2048, 2048)])
def test_an_engine_that_nothing_was_fitted_to_lies_in_the_intervals_with_the_sizes_given(
    load: tuple[int, int],
) -> None:
    """8B in 8 bits on one H100: above the intervals as long as its cache was not known."""
    name, device, count, published = published_serving.TABLE[0]
    assert (name, device, count) == ("Llama 3.1 8B", "h100", 1)
    tokens = published[published_serving.LOADS.index(load)]
    found = published_serving.predicted(name, device, count, load)
    assert found.low <= tokens <= found.high
    assert found.value == pytest.approx(tokens, rel=0.5)


def test_the_published_models_have_the_parameters_of_their_names() -> None:
    made = map(published_serving.decoder, published_serving.MODELS)
    billions = [model.num_parameters / 1e9 for model in made]
    assert billions == pytest.approx([8.03, 70.6, 405.9], rel=2e-3)
