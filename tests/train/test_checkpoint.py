"""Checkpoints survive what disks, users and dying processes do to them, or say what happened."""

import errno
import hashlib
import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from supple.train.checkpoint.store import CheckpointError, CheckpointStore
from supple.train.state.train_state import TrainState
from tests.train.crashes import SIGNATURE, found_in, save, state_of

META = {"signature": SIGNATURE}
ROOT = Path(__file__).parents[2]
NOBODY = 65534


def saved(store: CheckpointStore, step: int) -> Path:
    return store.save(step, state_of(step), META)


def steps_in(folder: Path) -> list[int]:
    """Of every whole checkpoint in `folder`, in the order they were saved."""
    manifests = [path / "manifest.json" for path in sorted(folder.iterdir())]
    return [json.loads(manifest.read_bytes())["step"] for manifest in manifests]


def refusal(path: Path, signature: list[list[Any]] = SIGNATURE) -> str:
    """Why loading `path` is refused."""
    with pytest.raises(CheckpointError) as caught:
        CheckpointStore.containing(str(path)).load(path, expected_signature=signature)
    return str(caught.value)


def flip(file: Path, bit: int) -> None:
    content = bytearray(file.read_bytes())
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def replace_state(path: Path, content: bytes) -> None:
    """Another state with sums that are right for it, as one who means harm would write."""
    (path / "state.pt").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_bytes())
    del manifest["manifest_sha256"]
    manifest |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    own = hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
    (path / "manifest.json").write_text(json.dumps(manifest | {"manifest_sha256": own}))


# What is saved comes back


def test_a_state_comes_back_as_it_was_with_what_was_said_about_it(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    payload = {
        "tensors": [torch.arange(6.0).reshape(2, 3), torch.tensor(1, dtype=torch.bfloat16)],
        "scalars": {"step": 7, "lr": 1e-3, "position": (3, [1, 2]), "none": None, "raw": b"\x00"},
        "kept": OrderedDict(shape=torch.Size([2]), dtype=torch.int8, seen={1, 2}, big=1 << 200),
    }
    path = store.save(7, payload, {**META, "epoch": 2})
    loaded, meta = store.load(path, expected_signature=SIGNATURE)
    assert all(map(torch.equal, loaded.pop("tensors"), payload.pop("tensors")))
    assert loaded == payload
    assert (meta["step"], meta["epoch"], meta["signature"]) == (7, 2, SIGNATURE)
    assert (meta["supple"], meta["bytes"]) == ("0.1.0", (path / "state.pt").stat().st_size)


def test_a_model_and_its_optimizer_go_on_from_a_checkpoint_as_if_never_stopped(
    tmp_path: Path,
) -> None:
    def built() -> tuple[torch.nn.Module, torch.optim.Optimizer, TrainState]:
        torch.manual_seed(0)
        model = torch.nn.Linear(4, 2)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
        return model, optimizer, TrainState(model, optimizer, {})

    def trained(model: torch.nn.Module, optimizer: torch.optim.Optimizer, num_steps: int) -> None:
        for _ in range(num_steps):
            optimizer.zero_grad()
            model(torch.ones(1, 4)).square().sum().backward()
            optimizer.step()

    model, optimizer, state = built()
    trained(model, optimizer, 3)
    store = CheckpointStore(tmp_path)
    path = store.save(3, state.payload({"step": 3}), {"signature": state.signature()})
    trained(model, optimizer, 3)

    other, other_optimizer, other_state = built()
    payload, _ = store.load(path, expected_signature=other_state.signature())
    assert other_state.restore(payload) == {"step": 3}
    trained(other, other_optimizer, 3)
    assert all(map(torch.equal, other.parameters(), model.parameters()))


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (np.float64(1), "numpy.float64"),
        (np.ones(2), "numpy.ndarray"),
        (frozenset({1}), "builtins.frozenset"),
        (CheckpointStore, "builtins.type"),
    ],
)
def test_what_could_not_be_loaded_again_is_refused_when_it_is_saved(
    tmp_path: Path, value: Any, named: str
) -> None:
    store = CheckpointStore(tmp_path)
    saved(store, 1)
    with pytest.raises(CheckpointError) as caught:
        store.save(2, {"kept": {"sampler": [1, value]}}, META)
    assert f"step 2 cannot be saved in {tmp_path}" in str(caught.value)
    assert f"the state['kept']['sampler'][1] is a {named}" in str(caught.value)
    assert "state_dict()" in str(caught.value) and "step 1" in str(caught.value)
    assert steps_in(tmp_path) == [1]


# Which ones are kept, and which is the newest


def test_the_newest_two_are_kept(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    for step in (1, 2, 3, 10):
        saved(store, step)
    assert steps_in(tmp_path) == [3, 10]


def test_a_job_begun_again_at_step_zero_does_not_lose_what_it_saves(tmp_path: Path) -> None:
    first = CheckpointStore(tmp_path)
    saved(first, 1000)
    saved(first, 2000)
    again = CheckpointStore(tmp_path)
    path = saved(again, 5)
    assert path.is_dir() and steps_in(tmp_path) == [2000, 5]
    latest = again.latest()
    assert latest is not None and latest.path == path


def test_the_same_step_saved_again_stands_beside_the_first(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    first, second = saved(store, 5), saved(store, 5)
    assert first != second and steps_in(tmp_path) == [5, 5]
    flip(second / "state.pt", 999)
    assert found_in_any(tmp_path) == first


def found_in_any(folder: Path) -> Path | None:
    latest = CheckpointStore(folder).latest()
    return latest.path if latest else None


def test_keeping_none_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="keep=0"):
        CheckpointStore(tmp_path, keep=0)


def test_an_empty_or_absent_folder_has_no_latest(tmp_path: Path) -> None:
    assert CheckpointStore(tmp_path).latest() is None
    assert CheckpointStore(tmp_path / "absent").latest() is None


def test_what_a_dead_process_left_half_written_is_ignored_and_then_removed(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    path = saved(store, 1)
    shutil.copytree(path, tmp_path / ".temporary-4711")
    assert found_in_any(tmp_path) == path
    saved(store, 2)
    assert steps_in(tmp_path) == [1, 2]


@pytest.mark.slow
@given(
    saves=st.lists(st.tuples(st.integers(0, 50), st.booleans()), max_size=8),
    keep=st.integers(1, 3),
)
def test_the_latest_is_the_last_whole_one_in_any_history(
    saves: list[tuple[int, bool]], keep: int
) -> None:
    with tempfile.TemporaryDirectory() as name:
        store = CheckpointStore(Path(name), keep=keep)
        history: list[tuple[Path, bool]] = []
        for step, damage in saves:
            path = saved(store, step)
            if damage:
                flip(path / "state.pt", 8 * 100)
            history.append((path, damage))
        kept = history[-keep:]
        assert sorted(Path(name).iterdir()) == sorted(path for path, _ in kept)
        whole = [path for path, damage in kept if not damage]
        latest = store.latest()
        assert (latest.path if latest else None) == (whole[-1] if whole else None)
        if latest is not None:
            newer = [path for path, _ in kept[kept.index((latest.path, False)) + 1 :]]
            assert len(latest.skipped) == len(newer)


# Damage is found, and the good one named


@pytest.fixture(scope="module")
def intact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(CheckpointStore(tmp_path_factory.mktemp("intact")), 1)


@pytest.mark.slow
@given(data=st.data(), name=st.sampled_from(["state.pt", "manifest.json"]))
def test_any_flipped_bit_is_found(intact: Path, data: st.DataObject, name: str) -> None:
    file = intact / name
    before = file.read_bytes()
    flip(file, data.draw(st.integers(0, 8 * len(before) - 1)))
    try:
        assert CheckpointStore.containing(str(intact)).latest() is None
        assert name in refusal(intact) and "corrupt" in refusal(intact)
    finally:
        file.write_bytes(before)
    assert found_in_any(intact.parent) == intact


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
@pytest.mark.parametrize("num_bytes", [0, 1, 100])
def test_a_truncated_file_is_found(tmp_path: Path, name: str, num_bytes: int) -> None:
    path = saved(CheckpointStore(tmp_path), 1)
    os.truncate(path / name, num_bytes)
    assert f"the checkpoint {path} is corrupt: {name}" in refusal(path)


def test_a_corrupt_newest_one_is_skipped_and_told_and_the_good_one_named(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    good, bad = saved(store, 1), saved(store, 2)
    flip(bad / "state.pt", 4096)
    actual = hashlib.sha256((bad / "state.pt").read_bytes()).hexdigest()
    expected = json.loads((bad / "manifest.json").read_bytes())["sha256"]
    latest = store.latest()
    assert latest is not None and latest.path == good and latest.step == 1
    (skipped,) = latest.skipped
    assert str(bad) in skipped and actual[:12] in skipped and expected[:12] in skipped
    assert refusal(bad) == f"{skipped} A good one is of step 1: --resume {good}"


def test_a_corrupt_only_one_says_that_there_is_no_other(tmp_path: Path) -> None:
    path = saved(CheckpointStore(tmp_path), 1)
    flip(path / "state.pt", 4096)
    assert refusal(path).endswith("No good one is beside it: start without --resume.")


class Bomb:
    """Makes a folder when it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.target),)


def test_a_state_that_would_run_code_is_refused_and_runs_none(tmp_path: Path) -> None:
    good = saved(CheckpointStore(tmp_path), 1)
    path = saved(CheckpointStore(tmp_path), 2)
    torch.save({"weight": Bomb(tmp_path / "exploded")}, tmp_path / "bomb.pt")
    replace_state(path, (tmp_path / "bomb.pt").read_bytes())
    problem = refusal(path)
    assert "is refused" in problem and "mkdir" in problem and f"--resume {good}" in problem
    assert not (tmp_path / "exploded").exists()
    torch.load(tmp_path / "bomb.pt", weights_only=False)
    assert (tmp_path / "exploded").exists(), "the bomb itself was harmless"


@pytest.mark.parametrize(
    "content", [b"", b"no archive", pickle.dumps({"weight": 1}), b"PK\x03\x04" + bytes(40)]
)
def test_what_torch_cannot_read_is_one_clear_error(tmp_path: Path, content: bytes) -> None:
    path = saved(CheckpointStore(tmp_path), 1)
    replace_state(path, content)
    problem = refusal(path)
    assert f"the checkpoint {path}" in problem and "start without --resume" in problem
    assert "\n" not in problem


# Another model


@pytest.mark.parametrize(
    ("expected", "told"),
    [
        ([["param/weight", [9], "torch.float32"]], "weight is [8] torch.float32 there, [9]"),
        ([["param/weight", [8], "torch.float64"]], "torch.float32 there, [8] torch.float64 here"),
        (
            [*SIGNATURE, ["param/bias", [1], "torch.float32"]],
            "1 of 2 tensors differ, first bias is absent there, [1] torch.float32 here",
        ),
        ([], "1 of 1 tensors differ, first weight is [8] torch.float32 there, absent here"),
    ],
)
def test_another_model_is_refused_with_the_first_tensor_that_differs(
    tmp_path: Path, expected: list[list[Any]], told: str
) -> None:
    problem = refusal(saved(CheckpointStore(tmp_path), 1), expected)
    assert "of another model" in problem and told in problem and "the script that" in problem


def test_the_same_tensors_in_another_order_are_another_model(tmp_path: Path) -> None:
    rows = [["param/a", [1], "torch.float32"], ["param/b", [1], "torch.float32"]]
    path = CheckpointStore(tmp_path).save(1, {}, {"signature": rows})
    assert "another order, first a there, b here" in refusal(path, rows[::-1])


# Not a checkpoint


def test_a_path_that_is_no_checkpoint_says_what_it_is(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "folder").mkdir()
    assert f"{tmp_path / 'absent'} does not exist" in refusal(tmp_path / "absent")
    assert f"{tmp_path / 'file'} is not a checkpoint but a file" in refusal(tmp_path / "file")
    assert "no manifest.json in it" in refusal(tmp_path / "folder")
    assert "A checkpoint is a folder with state.pt" in refusal(tmp_path / "folder")


def test_a_folder_of_checkpoints_or_a_run_names_the_one_to_resume_from(tmp_path: Path) -> None:
    path = saved(CheckpointStore(tmp_path / "checkpoints"), 3)
    for given_path in (tmp_path, tmp_path / "checkpoints", path.with_name("000009-step-9")):
        assert refusal(given_path).endswith(f"A good one is of step 3: --resume {path}")


# The disk says no


@contextmanager
def forbidden(path: Path) -> Iterator[None]:
    """Nobody may do anything with `path`; root, who may all the same, is nobody meanwhile."""
    mode = path.stat().st_mode
    path.chmod(0)
    was_root = os.geteuid() == 0
    if was_root:
        os.seteuid(NOBODY)
    try:
        yield
    finally:
        if was_root:
            os.seteuid(0)
        path.chmod(mode)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which `tmp_path` is not."""
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        yield Path(name)


@pytest.mark.parametrize("name", ["", "state.pt", "manifest.json"])
def test_a_checkpoint_that_may_not_be_read_says_who_tried(open_folder: Path, name: str) -> None:
    path = saved(CheckpointStore(open_folder), 1)
    with forbidden(path / name):
        user_id = os.geteuid()
        problem = refusal(path)
    assert f"the checkpoint {path} cannot be read" in problem
    assert f"Permission denied for user id {user_id}" in problem and "read permission" in problem


def test_a_folder_that_may_not_be_listed_is_not_taken_for_an_empty_one(open_folder: Path) -> None:
    store = CheckpointStore(open_folder / "checkpoints")
    saved(store, 1)
    with (
        forbidden(open_folder / "checkpoints"),
        pytest.raises(CheckpointError, match="cannot be listed: Permission denied"),
    ):
        store.latest()


def test_a_folder_that_may_not_be_written_is_a_clear_error(open_folder: Path) -> None:
    store = CheckpointStore(open_folder / "checkpoints")
    saved(store, 1)
    with (
        forbidden(open_folder / "checkpoints"),
        pytest.raises(CheckpointError, match=r"step 2 .*: Permission denied") as caught,
    ):
        saved(store, 2)
    assert "--run-dir" in str(caught.value) and "Earlier checkpoints" in str(caught.value)
    assert steps_in(open_folder / "checkpoints") == [1]


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 1 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "supple-test", str(folder)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount; the file size limit is tested all the same")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_keeps_the_last_good_one_and_says_what_it_would_take(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    good = saved(store, 1)
    with pytest.raises(CheckpointError) as caught:
        store.save(2, state_of(2, num_elements=1 << 19), META)
    problem = str(caught.value)
    assert f"step 2 cannot be saved in {small_disk}: {os.strerror(errno.ENOSPC)}" in problem
    assert "needs 2,097,160 bytes" in problem and "are free" in problem
    assert f"The last good one is kept: step 1, {good}" in problem and "--run-dir" in problem
    assert list(small_disk.iterdir()) == [good] and found_in_any(small_disk) == good
    saved(store, 3)
    assert steps_in(small_disk) == [1, 3]


def test_a_disk_too_full_for_the_last_bytes_is_the_same_error(small_disk: Path) -> None:
    store = CheckpointStore(small_disk)
    good = saved(store, 1)
    free = shutil.disk_usage(small_disk).free
    (small_disk / "filler").write_bytes(bytes(free - 4096))
    with pytest.raises(CheckpointError, match=os.strerror(errno.ENOSPC)):
        saved(store, 2)
    (small_disk / "filler").unlink()
    assert list(small_disk.iterdir()) == [good] and found_in_any(small_disk) == good


def test_a_file_size_limit_in_the_middle_of_a_state_costs_only_that_save(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    good = saved(store, 1)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=os.strerror(errno.EFBIG)) as caught:
            store.save(2, state_of(2, num_elements=1 << 20), META)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(good) in str(caught.value) and list(tmp_path.iterdir()) == [good]


# Written behind the training loop


def test_a_save_behind_tells_its_path_once_it_can_be_loaded(tmp_path: Path) -> None:
    store = CheckpointStore(tmp_path)
    heard: list[tuple[str, str]] = []
    store.save_async(4, state_of(4), META, lambda path, error: heard.append((path, error)))
    store.wait()
    assert heard == [(str(found_in_any(tmp_path)), "")] and found_in(tmp_path) == 4


def test_a_save_behind_tells_why_it_failed(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    store = CheckpointStore(tmp_path / "file")
    heard: list[tuple[str, str]] = []
    store.save_async(4, state_of(4), META, lambda path, error: heard.append((path, error)))
    store.wait()
    ((path, error),) = heard
    assert path == "" and "step 4 cannot be saved" in error and "--run-dir" in error


def test_a_save_while_one_is_being_written_is_refused_and_a_later_one_is_not(
    tmp_path: Path,
) -> None:
    store = CheckpointStore(tmp_path)
    heard: list[tuple[str, str]] = []
    release = threading.Event()

    def slowly(path: str, error: str) -> None:
        release.wait()
        heard.append((path, error))

    store.save_async(1, state_of(1), META, slowly)
    store.save_async(2, state_of(2), META, lambda path, error: heard.append((path, error)))
    ((path, error),) = heard
    assert path == "" and "step 2 was not saved" in error and "--checkpoint-every" in error
    release.set()
    store.wait()
    store.save_async(3, state_of(3), META, lambda path, error: heard.append((path, error)))
    store.wait()
    assert [bool(path) for path, _ in heard] == [False, True, True]
    assert steps_in(tmp_path) == [1, 3]


# Killed


@pytest.mark.slow
def test_a_process_killed_at_any_file_operation_of_a_save_leaves_a_good_one(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.train.crashes", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    *crashes, last = [line.split() for line in done.stdout.splitlines()]
    assert last == ["survived", "2"]
    assert {"open", "os.mkdir", "os.rename", "shutil.rmtree"} <= {name for name, _ in crashes}
    found = [int(step) for _, step in crashes]
    assert found == sorted(found) and {*found} == {1, 2}


@pytest.mark.slow
def test_a_process_killed_at_any_byte_of_a_state_leaves_the_good_one_before(tmp_path: Path) -> None:
    num_elements = 16 << 20
    save(tmp_path, 1)
    script = (
        "import sys; from pathlib import Path; from tests.train.crashes import save\n"
        f"for step in sys.stdin: save(Path({str(tmp_path)!r}), 2, {num_elements})"
    )
    for tenth in (0, 3, 6, 9):
        with subprocess.Popen(
            [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, text=True
        ) as process:
            assert process.stdin is not None
            process.stdin.write("save\n")
            process.stdin.flush()
            state = tmp_path / f".temporary-{process.pid}" / "state.pt"
            while not state.exists() or state.stat().st_size < num_elements * 4 * tenth // 10:
                assert process.poll() is None, "the process ended by itself"
            process.send_signal(signal.SIGKILL)
            process.stdin.close()
        assert process.returncode == -signal.SIGKILL
        assert found_in(tmp_path) == 1
    save(tmp_path, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["000002-step-3"]
