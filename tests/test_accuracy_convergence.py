"""The convergence tasks of the accuracy benchmark, on made-up tables in the public ones' format."""

import csv
import json
import math
from pathlib import Path

import pytest

from benchmarks.accuracy import epochs, learning_rate, minutes, noise_scale, samples
from benchmarks.accuracy.samples_floor import FEWEST_PAIRS, Floor, floor, straight_line
from supple.core.training.samples import Run


def write(path: Path, rows: list[dict[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def needed(batch: float) -> float:
    return 1e6 * (1.0 + batch / 4000.0)


def point(batch: int, **changes: object) -> dict[str, object]:
    row: dict[str, object] = {
        "benchmark": "made_up",
        "round": "v1.0",
        "point_name": f"made_up_{batch}",
        "batch_size": batch,
        "optimizer": "adamw",
        "learning_rate": 1e-3 * (batch / 256) ** 0.4,
        "convergence_unit": "samples",
        "convergence_mean": needed(batch),
        "convergence_median": needed(batch),
        "num_seeds": 3,
        "samples_to_target_mean": needed(batch),
        "samples_to_target_median": needed(batch),
        "per_seed_json": json.dumps([needed(batch) * f for f in (0.99, 1.0, 1.01)]),
        "repeat_of_round": "",
    }
    return row | changes


def references(folder: Path) -> None:
    rows = [point(64 * 2**k) for k in range(7)]
    epochs_only: dict[str, object] = {
        "round": "v0.7",
        "convergence_unit": "epochs",
        "convergence_mean": 12,
        "samples_to_target_mean": "",
        "samples_to_target_median": "",
    }
    rows += [
        point(128, round="v2.0", num_seeds=9, convergence_mean=1.1 * needed(128)),
        point(256, repeat_of_round="v1.0", samples_to_target_mean=1.0),
        point(512, **epochs_only),
    ]
    write(folder / "mlperf" / "convergence.csv", rows)


def test_the_next_larger_size_is_asked_of_the_smaller_ones_of_its_round(tmp_path: Path) -> None:
    write(tmp_path / "mlperf" / "convergence.csv", [point(64 * 2**k) for k in range(4)])
    (again,) = samples.rounds(tmp_path)
    asked = samples.next_larger(again)
    assert [true for _, true in asked] == [needed(256), needed(512)]
    smaller = samples.expected(again[:2], again[2])
    assert asked[0][0] == smaller


def test_samples_of_a_plain_law_are_found_and_odd_rows_left_out(tmp_path: Path) -> None:
    references(tmp_path)
    found = samples.measure(tmp_path)
    assert found.metrics["samples_error_worst"] < 0.15
    assert found.metrics["samples_floor_median"] == 0.0
    assert len(found.points) == 7
    assert not [name for name in found.metrics if name.startswith("noise_scale")]


def test_a_mistyped_seed_does_not_move_the_reference() -> None:
    seeds = [1e6, 1e6, 1e6, 1e7]
    row = point(64, per_seed_json=json.dumps(seeds), convergence_median=1e6)
    row |= {"samples_to_target_mean": 3.25e6, "samples_to_target_median": 1e6}
    assert samples.reference({k: str(v) for k, v in row.items()}).run.samples == 1e6


def lowest(apart: float, sizes: int = 6) -> Floor:
    """Recipes of one batch size are `apart` in logarithms, all of them."""
    runs = [Run(batch_size=64.0 * 2**k, samples=needed(64 * 2**k)) for k in range(sizes)]
    found = floor({"made_up": runs}, [apart] * FEWEST_PAIRS)
    assert found is not None
    return found


def test_who_knows_the_curve_is_off_by_what_one_recipe_adds() -> None:
    """Two recipes a factor of exp(0.1) apart: each 0.1 / sqrt(2) from the curve."""
    found = lowest(0.1)
    assert math.log1p(found.median) == pytest.approx(0.0707, abs=0.003)
    assert math.log1p(found.worst) == pytest.approx(0.0707, abs=0.003)
    assert found.share_within == 1.0
    assert lowest(0.3).share_within == 0.0


def test_who_must_fit_the_law_is_worse_off_and_better_with_more_sizes() -> None:
    few, many = lowest(0.1, 4), lowest(0.1, 12)
    assert many.median < many.law_median < few.law_median
    assert few.law_worst > few.worst


def test_recipes_that_agree_leave_no_floor() -> None:
    found = lowest(0.0)
    assert found.median == 0.0
    assert found.law_worst == pytest.approx(0.0, abs=1e-6)


@pytest.mark.slow
def test_a_handful_of_repeated_recipes_is_needed_for_a_floor(tmp_path: Path) -> None:
    runs = [Run(batch_size=size, samples=needed(size)) for size in (64, 128, 256)]
    assert floor({"made_up": runs}, [0.1] * (FEWEST_PAIRS - 1)) is None
    references(tmp_path)
    assert "samples_floor_loo_median" not in samples.measure(tmp_path).metrics
    rows = [point(64 * 2**k) for k in range(7)]
    rows += [point(64 * 2**k, round="v2.0", num_seeds=9) for k in range(FEWEST_PAIRS)]
    write(tmp_path / "mlperf" / "convergence.csv", rows)
    found = samples.measure(tmp_path)
    # The seeds of the made-up points scatter by half a percent, the recipes not at all.
    assert 0.0 < found.metrics["samples_floor_loo_median"] < 0.01
    assert any("knows every curve exactly" in note for note in found.notes)


def test_the_published_law_is_a_line_in_the_batch() -> None:
    runs = [Run(batch_size=size, samples=needed(size)) for size in (64, 1024)]
    assert straight_line(runs, 4096) == pytest.approx(needed(4096))


def test_the_learning_rates_of_a_power_are_found(tmp_path: Path) -> None:
    references(tmp_path)
    found = learning_rate.measure(tmp_path)
    assert found.metrics["learning_rate_error_median"] < 0.05
    assert found.covered == []


def result(count: int, batch: int, **changes: object) -> dict[str, object]:
    steps = needed(batch) / batch
    taken = (3.0 + steps * (1e-3 * batch / count + 2e-3 + 1e-4 * math.log2(count))) / 60
    row: dict[str, object] = {
        "round": "v2.0",
        "division": "closed",
        "submitter": "nobody",
        "accelerator": "chip",
        "device_kind": "accelerator",
        "benchmark": "made_up",
        "num_accelerators": count,
        "global_batch_size": batch,
        "num_runs": 5,
        "minutes_to_train_median": taken,
        "minutes_to_train_min": 0.99 * taken,
        "minutes_to_train_max": 1.01 * taken,
        "convergence_value_median": 3,
        "convergence_unit": "epochs",
        "samples_to_target_median": needed(batch),
        "repeat_of_round": "",
    }
    return row | changes


def test_minutes_of_the_next_count_are_foretold(tmp_path: Path) -> None:
    references(tmp_path)
    rows = [result(8 * 2**k, 256 * 2**k) for k in range(5)]
    rows += [
        result(8, 256, minutes_to_train_median=1e3),
        result(64, 256, device_kind="cpu"),
        result(128, 256, repeat_of_round="v1.0"),
    ]
    write(tmp_path / "mlperf" / "results.csv", rows)
    found = minutes.measure(tmp_path)
    assert len(found.points) == 3
    assert found.metrics["minutes_error_p90"] < 0.1


@pytest.mark.parametrize(
    "unknown",
    [
        {"samples_to_target_median": ""},
        {"global_batch_size": ""},
        {"samples_to_target_median": "", "convergence_unit": "unclear"},
    ],
)
def test_families_without_batches_or_samples_are_still_asked(
    tmp_path: Path, unknown: dict[str, object]
) -> None:
    references(tmp_path)
    other = {"benchmark": "no_reference"}
    rows = [result(8 * 2**k, 512, **other, **unknown) for k in range(4)]
    write(tmp_path / "mlperf" / "results.csv", rows)
    found = minutes.measure(tmp_path)
    assert len(found.points) == 2
    assert found.metrics["minutes_error_median"] < 0.4


def test_where_nobody_states_samples_the_largest_batch_is_taken_to_be_a_sound_one(
    tmp_path: Path,
) -> None:
    """Batches of 256 and 1,024 ran, 4,096 is asked: a critical batch near 256 would be absurd."""
    references(tmp_path)
    nothing: dict[str, object] = {"benchmark": "no_reference", "samples_to_target_median": ""}
    nothing["convergence_unit"] = "unclear"
    rows = [result(count, size, **nothing) for count, size in ((8, 256), (16, 1024), (128, 4096))]
    write(tmp_path / "mlperf" / "results.csv", rows)
    assert minutes.measure(tmp_path).metrics["minutes_error_median"] < 0.15


def test_a_family_that_the_planner_refuses_is_counted_and_takes_no_other_with_it(
    tmp_path: Path,
) -> None:
    references(tmp_path)
    rows = [result(8 * 2**k, 512) for k in range(4)]
    rows += [result(8 * 2**k, 512, submitter="odd") for k in range(4)]
    rows[-3]["minutes_to_train_median"] = 1e4
    write(tmp_path / "mlperf" / "results.csv", rows)
    found = minutes.measure(tmp_path)
    assert (len(found.points), found.metrics["minutes_refused"]) == (2, 2)
    (told,) = (note for note in found.notes if note.startswith("refused, and not scored: 2"))
    assert "took 10000 minutes" in told


def test_epochs_are_foretold_and_blanks_are_bounds(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = []
    for k in range(7):
        taken = math.ceil(4.3 * (1.0 + 2.0**k / 10))
        for run in range(3):
            reached = k < 6
            rows.append(
                {
                    "dataset": "d",
                    "network": "n",
                    "optimizer": "adam",
                    "batch_size": 8 * 2**k,
                    "run": run,
                    "target_metric": 0.5,
                    "epochs_to_target": taken if reached else "",
                }
            )
    write(tmp_path / "zeus" / "epochs_to_target.csv", rows)
    found = epochs.measure(tmp_path)
    assert len(found.points) == 6
    assert found.metrics["epochs_error_median"] < 0.15
    assert any("missed the target: 1" in note for note in found.notes)


def test_a_noise_scale_is_scored_where_there_are_traces(tmp_path: Path) -> None:
    app = [{"app": "made", "metric_higher_is_better": 1}]
    write(tmp_path / "pollux" / "apps.csv", app)
    rows: list[dict[str, object]] = []
    for batch in (32, 1024):
        steps = 100.0 * (1.0 + batch / 2000.0) * 1000.0 / batch
        rows += [
            {
                "batch_size": batch,
                "epoch": epoch,
                "progress": 100.0 * epoch,
                "iteration": steps * epoch,
                "metric": epoch / 10,
                "grad_sqr": 1.0 if epoch != 3 else 0.0,
                "grad_var": 1000.0 / 32,
            }
            for epoch in range(1, 11)
        ]
    write(tmp_path / "pollux" / "convergence" / "made.csv", rows)
    figures, notes = noise_scale.measure(tmp_path)
    assert figures["noise_scale_error_worst"] < 0.05
    assert figures["noise_scale_interval_coverage"] == 1.0
    assert "made: critical batch over it, from 2.0 to 2.0" in notes[0]
