"""The TensorBoard files of a run, read back."""

from pathlib import Path
from typing import Any

from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from supple.core.types import Decision, JobId, Progress
from supple.report.curves import Curves


def progress(step: int, **changes: Any) -> Progress:
    fields: dict[str, Any] = {
        "generation": 1,
        "step": step,
        "epoch": 0,
        "num_epochs": 1,
        "samples_done": step * 64,
        "samples_total": None,
        "num_workers": 2,
        "global_batch_size": 64,
        "lr": 1e-3,
        "step_time_s": 0.25,
        "forward_time_s": 0.0,
        "backward_time_s": 0.0,
        "optimizer_time_s": 0.0,
        "sync_time_s": 0.125,
        "micro_batch_size": 1,
        "num_accumulation_steps": 1,
        "largest_micro_batch": 1,
        "num_nodes": 1,
        "most_per_node": 1,
        "data_time_s": 0.0,
        "noise_scale": None,
        "efficiency": None,
        "base_batch_size": 64,
        "base_lr": 1e-3,
        "optimizer": "AdamW",
        "gradient_bytes": 4,
    }
    return Progress(**(fields | changes))


def never(path: str, error: str) -> None:
    raise AssertionError(f"{path} was lost: {error}")


def read(folder: Path) -> dict[str, list[tuple[int, float]]]:
    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def test_a_speed_that_is_not_known_yet_has_no_point(tmp_path: Path) -> None:
    """As where a resumed run reports its state before its first step."""
    with Curves(tmp_path, never) as curves:
        curves.progressed(progress(10, step_time_s=0.0, efficiency=0.5))
        curves.progressed(progress(11, efficiency=0.5))
    found = read(tmp_path)
    for name, value in (("samples_per_s", 256.0), ("goodput", 128.0), ("step_time_s", 0.25)):
        assert found[f"supple/{name}"] == [(11, value)]


def test_scalars_stand_against_the_committed_steps(tmp_path: Path) -> None:
    with Curves(tmp_path, never) as curves:
        curves.progressed(progress(10))
        curves.progressed(progress(20, num_workers=3, metrics={"loss": 0.5}))
    written = read(tmp_path)
    assert written["supple/num_workers"] == [(10, 2.0), (20, 3.0)]
    assert written["supple/samples_per_s"] == [(10, 256.0), (20, 256.0)]
    assert written["script/loss"] == [(20, 0.5)]


def test_what_is_not_known_yet_is_left_out(tmp_path: Path) -> None:
    with Curves(tmp_path, never) as curves:
        curves.progressed(progress(10))
        curves.progressed(progress(20, noise_scale=32.0, efficiency=0.5))
    written = read(tmp_path)
    assert written["supple/noise_scale"] == [(20, 32.0)]
    assert written["supple/goodput"] == [(20, 128.0)]


def test_a_decision_is_told_with_its_reason_at_the_step_it_was_made(tmp_path: Path) -> None:
    with Curves(tmp_path, never) as curves:
        curves.progressed(progress(30))
        curves.decided(
            Decision(
                job_id=JobId("job"), generation=1, kind="grow", num_workers=3, reason="asked for 3"
            )
        )
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    (told,) = events.Tensors("decision/text_summary")
    assert told.step == 30
    assert told.tensor_proto.string_val == [b"grow: asked for 3"]


def test_a_disk_that_takes_no_more_ends_the_curves_and_nothing_else(tmp_path: Path) -> None:
    lost: list[tuple[str, str]] = []
    (tmp_path / "file").write_text("")
    with Curves(tmp_path / "file" / "tensorboard", lambda *what: lost.append(what)) as curves:
        curves.progressed(progress(10))
        curves.decided(
            Decision(job_id=JobId("job"), generation=1, kind="grow", num_workers=3, reason="why")
        )
    assert [error for _, error in lost] == ["Not a directory"]


def test_a_name_that_is_no_valid_unicode_is_written_all_the_same(tmp_path: Path) -> None:
    with Curves(tmp_path, never) as curves:
        curves.progressed(progress(10, metrics={"loss\udcff": 0.5}))
    assert any(name.startswith("script/loss") for name in read(tmp_path))
