"""Dependency ranges in pyproject.toml, and the pins of requirements.lock that lie inside them."""

import re
import tomllib
from collections.abc import Iterator

from packaging.requirements import Requirement

from tests.cluster.runs import ROOT


def stated() -> Iterator[Requirement]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for group in (project["dependencies"], *project["optional-dependencies"].values()):
        yield from map(Requirement, group)


def pinned(lock: str) -> dict[str, str]:
    lines = (ROOT / lock).read_text(encoding="utf-8").split()
    return {name.partition("[")[0]: version for name, version in (x.split("==") for x in lines)}


def test_nobody_who_installs_supple_is_forced_to_one_version_of_anything() -> None:
    for requirement in stated():
        operators = {spec.operator for spec in requirement.specifier}
        assert ">=" in operators, f"{requirement} states no lowest version"
        assert operators <= {">=", "<"}, f"{requirement} shuts versions out one by one"


def test_every_torch_from_2_11_on_is_allowed() -> None:
    (torch,) = (requirement for requirement in stated() if requirement.name == "torch")
    allowed = [torch.specifier.contains(version) for version in ("2.10.0", "2.11.0", "2.15.0")]
    assert allowed == [False, True, True]


def test_the_lock_pins_what_is_stated_to_a_version_inside_its_range() -> None:
    pins = pinned("requirements.lock")
    for requirement in stated():
        assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_versions_stand_in_the_lock_alone() -> None:
    assert not re.findall(r"\w==\d", (ROOT / "Makefile").read_text(encoding="utf-8"))
