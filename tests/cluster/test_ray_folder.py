"""Ray's folder is private and goes; what a killed process left goes too, and nothing else."""

import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from supple.cluster import ray_folder
from supple.cluster.ray_folder import RayFolder
from supple.core.service.spec import ServeSpec, Slo
from supple.core.spec import SpecError
from tests.cluster.runs import ROOT

SPEC = ServeSpec(name="app", target="app.py:Model", slo=Slo(share=0.99, within_s=0.1))
_MAKE = (
    "import sys; from supple.cluster.ray_folder import RayFolder; folder = RayFolder(); "
    "(folder.path / 'file').touch(); print(folder.path, flush=True); sys.stdin.read()"
)


@pytest.fixture
def base(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rf-", dir="/tmp") as name:
        path = Path(name).resolve()
        path.chmod(0o1777)
        monkeypatch.setenv("RAY_TMPDIR", str(path))
        monkeypatch.setattr(ray_folder, "temporary", lambda: [path])
        yield path


def test_the_folder_is_closed_to_others_and_goes_with_all_that_is_in_it(base: Path) -> None:
    folder = RayFolder()
    assert folder.path.parent == base
    assert folder.path.stat().st_mode & 0o777 == 0o700
    assert folder.for_ray.parent == folder.path  # Ray opens what it is given to everybody
    (folder.for_ray / "session").mkdir(parents=True)
    folder.remove()
    assert list(base.iterdir()) == []


def test_a_folder_in_use_stays_and_one_of_a_killed_process_goes(base: Path) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", _MAKE],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT / "src")},
    ) as other:
        assert other.stdout is not None
        used = Path(other.stdout.readline().strip())
        assert used.parent == base
        RayFolder().remove()
        assert (used / "file").exists()
        other.send_signal(signal.SIGKILL)
        other.wait(30)
        folder = RayFolder()
        assert list(base.iterdir()) == [folder.path]
        folder.remove()


def test_what_only_looks_like_a_folder_of_ours_is_left_alone(base: Path) -> None:
    precious = base / "precious"
    precious.mkdir(mode=0o700)
    (precious / "file").touch()
    (base / "supple-ray-aaaaaaaa").symlink_to(precious)
    (base / "supple-ray-bbbbbbbb").mkdir()
    (base / "supple-ray-bbbbbbbb").chmod(0o777)
    (base / "supple-ray-cccccccc").touch()
    before = sorted(base.iterdir())
    RayFolder().remove()
    assert sorted(base.iterdir()) == before
    assert (precious / "file").exists()


def test_a_path_too_long_for_the_sockets_in_it_is_not_used(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    long = tmp_path / ("x" * 60)
    long.mkdir()
    monkeypatch.setenv("RAY_TMPDIR", str(long))
    folder = RayFolder()
    assert folder.path.parent == base
    folder.remove()
    monkeypatch.setattr(ray_folder, "temporary", lambda: [long])
    with pytest.raises(SpecError, match="Set TMPDIR to a folder with a path of at most"):
        RayFolder()


def test_a_place_where_others_rename_folders_is_not_used(
    base: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    exposed = base / "x"
    exposed.mkdir()
    exposed.chmod(0o777)  # without the sticky bit
    monkeypatch.setenv("RAY_TMPDIR", str(exposed))
    folder = RayFolder()
    assert folder.path.parent == base
    folder.remove()
    monkeypatch.setattr(ray_folder, "temporary", lambda: [])
    with pytest.raises(SpecError, match=f"others may rename what is in {exposed}"):
        RayFolder()
    assert list(exposed.iterdir()) == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Ray Serve's own, when it is imported
@pytest.mark.slow
def test_all_that_haproxy_is_started_with_is_in_the_folder_and_not_where_others_write(
    tmp_path: Path,
) -> None:
    from supple.cluster.services import ingress

    if ingress.haproxy() is None:
        pytest.skip("Ray Serve comes without HAProxy here")
    settings = ingress.environment(SPEC, tmp_path)
    paths = {name: value for name, value in settings.items() if value.startswith("/")}
    assert len(paths) == 6
    for name, value in paths.items():
        assert Path(value) == tmp_path or Path(value).parent == tmp_path, name
    script = Path(settings["RAY_SERVE_HAPROXY_BINARY_PATH"])
    assert script.stat().st_mode & 0o077 == 0
