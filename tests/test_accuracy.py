"""The accuracy benchmark's arithmetic and its page."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.accuracy.pictures import deviations, draw
from benchmarks.accuracy.published_layouts import predict, published, published_nlg
from benchmarks.accuracy.score import (
    NothingToAsk,
    Score,
    coverage,
    covered,
    mape,
    median,
    p90,
    relative_errors,
)
from benchmarks.planner_accuracy import (
    BARS,
    BEGIN,
    END,
    TASKS,
    Bar,
    TableRefused,
    measured,
    metrics,
    write_table,
)
from supple.core.hardware import lookup
from supple.core.layouts.memory import num_parameters
from supple.core.layouts.model import DEVICES, Transformer, fit_layouts
from supple.core.types import Estimate

TEN = Estimate(value=10.0, low=8.0, high=12.5, source="fitted")
VTRAIN = "\n".join(
    [
        "num_gpus,global_batch_size,micro_batch_size,hidden_size,num_attention_heads,num_layers,"
        "seq_length,tp,dp,pp,iteration_time_s",
        *(f"4,{4 * k},1,1024,16,24,1024,1,4,1,-1" for k in range(1, 50)),
    ]
)
"""Times that nobody can have measured."""
PAGE = Path(__file__).parents[1] / "docs" / "accuracy.md"


def score(task: str, *held: bool) -> Score:
    return Score(
        task=task,
        metrics={f"{task}_mape": 0.1, f"{task}_mape_baseline": 0.2},
        covered=held,
        notes=[],
        points=[(TEN, 9.0), (TEN, 14.0)],
    )


def test_errors_are_relative_to_what_was_measured() -> None:
    assert relative_errors([11.0, 5.0], [10.0, 10.0]).tolist() == pytest.approx([0.1, 0.5])
    assert mape([11.0, 5.0], [10.0, 10.0]) == pytest.approx(0.3)
    assert (median([1, 2, 9]), p90(range(11))) == (2.0, 9.0)


def test_an_interval_holds_its_own_ends() -> None:
    assert covered([TEN] * 4, [8.0, 12.5, 7.9, 12.6]) == [True, True, False, False]
    assert coverage([True, False]) == 0.5


def test_the_edge_of_an_80_percent_interval_is_1_28_deviations_off() -> None:
    assert deviations(TEN, 8.0) == deviations(TEN, 12.5) == pytest.approx(1.2816, abs=1e-4)
    assert deviations(TEN, 10.0) == 0.0


def test_a_large_task_does_not_hide_a_small_ones_coverage() -> None:
    many, few = score("many", *[True] * 99, False), score("few", True, False, False, False)
    assert metrics([many, few])["interval_coverage"] == pytest.approx((0.99 + 0.25) / 2)


@pytest.mark.parametrize("task", TASKS)
def test_a_task_without_its_tables_says_which(task: str, tmp_path: Path) -> None:
    with pytest.raises(NothingToAsk, match=re.escape(TASKS[task])):
        measured(task, tmp_path)


def test_a_table_that_is_refused_as_a_whole_is_told_with_the_reason(tmp_path: Path) -> None:
    (tmp_path / "vtrain").mkdir()
    (tmp_path / "vtrain" / "rows.csv").write_text(VTRAIN)
    with pytest.raises(TableRefused, match=r"refused: the measurement .* must be positive"):
        measured("layouts", tmp_path)


def test_a_figure_without_rows_is_left_out() -> None:
    hollow = replace(score("one", True), metrics={"one_mape": float("nan"), "one_p90": 0.2})
    assert set(metrics([hollow])) == {"one_p90", "interval_coverage"}


def test_a_bar_holds_its_ends_and_no_more() -> None:
    bar = Bar(0.75, 0.85)
    assert [bar.holds(value) for value in (0.74, 0.75, 0.85, 0.86)] == [False, True, True, False]


def test_the_page_keeps_its_text_and_gets_the_figures(tmp_path: Path) -> None:
    page = tmp_path / "accuracy.md"
    page.write_text(f"before\n{BEGIN}\nold\n{END}\nafter\n")
    write_table({"nodes2_mape": 0.2, "nodes2_mape_baseline": 1.5}, page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "| `nodes2_mape` | 0.2 | 1.5 | ≤ 0.15 **not met** |" in text


@pytest.mark.slow
def test_pictures_are_drawn_for_tasks_with_points(tmp_path: Path) -> None:
    draw([score("one", True)], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["one.png"]


def test_the_published_page_has_its_markers_and_its_pictures() -> None:
    text = PAGE.read_text()
    assert text.count(BEGIN) == text.count(END) == 1
    pictures = re.findall(r"!\[[^]]*\]\(([^)]+)\)", text)
    assert pictures and all((PAGE.parent / name).exists() for name in pictures)
    assert "fit_ms" in BARS


def test_the_published_layouts_are_the_models_their_names_say() -> None:
    """In the table's words: 1.7 to 1008 billion parameters, on as many GPUs as the degrees make."""
    billions = []
    for runs, seconds in published():
        model = runs[0].model
        assert isinstance(model, Transformer) and seconds > 0
        billions.append(num_parameters(model) / 1e9)
        batches = {
            r.micro_batch_size * r.num_micro_batches * r.layout.dp_degree: r.layout.world_size
            for r in runs
        }
        assert len(batches) == 1
    assert billions == pytest.approx(
        [1.7, 3.6, 7.5, 18.4, 39.1, 76.1, 145.6, 310.1, 529.6, 1008.0], rel=0.03
    )


def test_data_sheets_alone_hold_published_iterations_on_up_to_3072_accelerators() -> None:
    model = fit_layouts(
        [],
        device=DEVICES["a100"],
        link=lookup("infiniband-200x8"),
        local_link=lookup("nvlink-a100"),
        workers_per_node=8,
    )
    found = predict(model)
    assert all(estimate.low <= true <= estimate.high for estimate, true in found)
    assert median([estimate.value / true for estimate, true in found]) < 1.3
    for run, seconds in published_nlg():
        assert model.predict(run).value == pytest.approx(seconds, rel=0.1)
