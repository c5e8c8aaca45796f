"""Benchmarks that run models take a device, and say which there are."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import mixing, moram, scale
from benchmarks.__main__ import main
from benchmarks.timing import devices, environment
from tests.fake_device import FakeDevice


def test_a_device_that_is_not_there_is_refused_with_those_that_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    absent = next(name for name in ("mps", "cuda") if name not in devices())
    with pytest.raises(SystemExit) as caught:
        main(["moram", "--device", absent])
    assert caught.value.code == 2
    said = capsys.readouterr().err
    assert f"no device {absent}" in said
    assert "cpu" in said.rpartition(":")[2]


def test_a_benchmark_without_models_takes_no_device(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["startup", "--device", "cpu"])
    assert "startup takes no --device" in capsys.readouterr().err


def test_the_table_of_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    main(["moram", "--sizes", "20", "--repeats", "1", "--device", "cpu"])
    rows = capsys.readouterr().out.splitlines()
    assert len(rows) == 3
    for row in rows[:2]:
        assert "20 atoms" in row
        assert " to " in row  # its quartiles
        assert "limit <= " in row
    assert environment("cpu")["device"] == "cpu"


def test_the_products_that_are_counted_are_those_that_are_done() -> None:
    count = moram.RANK  # all are kept, so that every product is one of matrices
    layer = moram.Layer(count)
    counted = {}
    for name, forward in (("atoms", layer.atoms), ("frozen", layer.frozen)):
        with FlopCounterMode(display=False) as counter:
            layer.train(forward)()
        counted[name] = counter.get_total_flops()
    in_place = count / (2 * moram.WIDTH)  # that of the values is added in place: torch counts none
    found = counted["atoms"] / counted["frozen"] + in_place
    assert found == pytest.approx(moram.products(count), rel=1e-6)


pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")


@torch.no_grad()
def test_what_is_timed_runs_on_the_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mixing, "WIDTH", 16)
    index = {"adapters.picks.Picks.of"}
    with FakeDevice("cuda") as device:
        assert moram.Layer(160, device.device).atoms().device == device.device
        assert moram.Layer(320, device.device).rough().device == device.device
        x = torch.zeros(mixing.BATCH, 3, 16).to(device.device)
        for layers, rows in ((mixing.arrow_layers, 16), (mixing.named_layers, 48)):
            _, ours = layers(5, torch.float32, str(device.device))
            y = ours(x, x.new_zeros(mixing.BATCH, 3, rows))
            assert y.device == device.device
        model = scale.memories([10], device.device)["top 4", 10]
        batch = scale.images().to(device.device)
        device.waits.clear()
        features, weights = model.with_coefficients(batch)
        assert features.device == weights.device == device.device
        assert set(device.waits) <= index
        assert device.doubles == {}
