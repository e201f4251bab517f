"""Energy, with counters made of files."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from niwaki.errors import InputError, NiwakiError
from niwaki.measure import Energy
from niwaki.measure import energy as module

X = torch.zeros(1, 2)


def zones(root: Path, *microjoules: int) -> list[Path]:
    made = []
    for number, value in enumerate(microjoules):
        zone = root / f"intel-rapl:{number}"
        zone.mkdir(parents=True)
        (zone / "energy_uj").write_text(str(value))
        (zone / "max_energy_range_uj").write_text("1000000")
        made.append(zone / "energy_uj")
    (root / "intel-rapl:0:0").mkdir(exist_ok=True)  # a part of a package, which is counted with it
    return made


class Burning(nn.Module):
    """Each pass takes 30 000 microjoules of each package."""

    def __init__(self, files: list[Path]) -> None:
        super().__init__()
        self.files = files

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for file in self.files:
            file.write_text(str((int(file.read_text()) + 30_000) % 1_000_000))
        return x


def test_joules_of_a_pass(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two packages, 0.06 J together."""
    files = zones(tmp_path, 0, 500)
    monkeypatch.setattr(module.processor_counters, "__defaults__", (str(tmp_path),))
    found = Energy(seconds=1e-9, warm_up=1)(Burning(files), X)
    assert found.value == pytest.approx(0.06) and found.unit == "J" and "over 1 forward passes" in found.definition


def test_a_counter_that_begins_again(tmp_path: Path) -> None:
    (file,) = zones(tmp_path, 990_000)
    (counter,) = module.processor_counters(str(tmp_path))
    file.write_text("20000")  # 30 000 later, in a range of 1 000 000
    assert counter() == pytest.approx(0.03)
    assert counter() == pytest.approx(0.03)


def test_the_platform_is_not_counted_on_top_of_its_packages(tmp_path: Path) -> None:
    """Of three zones one is "psys", in which the packages are; alone it is none."""
    files = zones(tmp_path, 0, 0, 0)
    for file, name in zip(files, ("package-0", "psys", "package-1"), strict=True):
        (file.parent / "name").write_text(f"{name}\n")
    counters = module.processor_counters(str(tmp_path))
    for file in files:
        file.write_text("20000")
    assert sum(counter() for counter in counters) == pytest.approx(0.04)
    for file in files[::2]:
        (file.parent / "name").write_text("psys-1\n")
    with pytest.raises(NiwakiError, match="no RAPL counters"):
        module.processor_counters(str(tmp_path))


def test_no_counters(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module.processor_counters, "__defaults__", (str(tmp_path),))
    with pytest.raises(NiwakiError, match=r"no RAPL counters: no package named intel-rapl:\* in"):
        Energy()(nn.Linear(2, 2), X)
    zones(tmp_path, 5)[0].unlink()
    with pytest.raises(NiwakiError, match="can't be read"):
        Energy()(nn.Linear(2, 2), X)


@pytest.mark.parametrize("wrong", [{"seconds": 0.0}, {"seconds": float("nan")}, {"warm_up": -1}], ids=str)
def test_settings(wrong: dict[str, Any]) -> None:
    with pytest.raises(InputError):
        Energy(**wrong)


def test_meta() -> None:
    with pytest.raises(InputError, match="meta device"):
        Energy()(nn.Linear(2, 2, device="meta"), X)
