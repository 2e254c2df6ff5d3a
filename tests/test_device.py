"""The catalogue of devices: what ships, what a file of one's own must say."""

import pickle
import re
from dataclasses import replace
from pathlib import Path

import pytest

from memsplit.models import Workload, device_named, devices, links
from memsplit.models.device import EXAMPLE, read_devices
from memsplit.models.presets import LLAMA3_1_8B
from memsplit.models.units import GB, TFLOPS

MINE = """[[device]]
name = "mine"
family = "Ampere"
memory = "HBM"
capacity = "80 GB"
bandwidth = "2 TB/s"
"""


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.toml"
    path.write_text(text)
    return path


def test_the_catalogue_has_the_devices_and_links_that_users_ask_for() -> None:
    known = devices()
    for name in ("A100-SXM-80GB", "A40", "H100-SXM", "H200-SXM", "L40S", "RTX 4090", "T4", "V100-PCIe-32GB", "GH200-96GB"):
        assert known[name].peak("bf16") > 0
        assert known[name].source
    assert {device.memory for device in known.values()} >= {"LPDDR5X", "DDR4", "DDR5"}
    assert set(links()) == {"PCIe 3.0 x16", "PCIe 4.0 x16", "PCIe 5.0 x16", "NVLink-C2C"}
    assert all(device.link in {"", "unified", *links()} for device in known.values())


def test_no_two_devices_share_a_name_or_an_alias() -> None:
    names = [each.casefold() for device in devices().values() for each in (device.name, *device.aliases)]
    assert len(names) == len(set(names))


def test_a_device_is_found_by_alias_in_any_case_and_survives_pickling() -> None:
    device = device_named("h100_SXM")
    assert device.name == "H100-SXM"
    assert pickle.loads(pickle.dumps(device)) == device


def test_precisions_of_one_peak() -> None:
    device = device_named("A100-SXM-80GB")
    assert device.peak("fp16") == device.peak("w4") == device.peak("bf16") == 312 * TFLOPS
    with pytest.raises(ValueError, match="no peak of 'fp8' is known"):
        device.peak("fp8")


def test_a_device_is_a_system_of_one_memory() -> None:
    system = device_named("L40S").system()
    assert system.tiers[0].capacity == 48 * GB
    assert Workload(llm=LLAMA3_1_8B, batch=1, context=1).weight_bytes < system.tiers[0].capacity


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    device = device_named(written(tmp_path, MINE))
    assert (device.name, device.bandwidth, device.multiprocessors) == ("mine", 2e12, None)
    with pytest.raises(ValueError, match="number of multiprocessors is not known; add it"):
        device.cores()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (MINE.replace('"80 GB"', "80"), "device 'mine': capacity: 80 has no unit"),
        (MINE.replace('"2 TB/s"', '"2 TB"'), "bandwidth: '2 TB' has the unit 'TB'"),
        (MINE + "colour = 3\n", "colour: Extra inputs are not permitted"),
        (MINE.replace('"2 TB/s"', '"inf TB/s"'), "bandwidth"),
        ('[[tier]]\nname = "HBM"\n', r"must hold a \[\[device\]\], and has \[\[tier\]\], so it is the data sheet of a system; write"),
        ('name = "x"\nbandwidth = "4 TB/s"\n', r"must hold a \[\[device\]\], and has name; write \[\[device\]\] name = "),
        (MINE + MINE, "two devices have one name"),
        (MINE + 'peaks = { bf16 = "0 TFLOP/s" }\n', "peak of bf16 must be a number above 0"),
        ("name = [", "is no TOML file"),
        ("[[device]]\nname = 'x'\n", "device 'x': family: Field required"),
        ("device = 3\n", "device"),
    ],
)
def test_damaged_files_are_refused_in_one_sentence(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_devices(written(tmp_path, text))


def test_the_example_in_messages_is_a_data_sheet(tmp_path: Path) -> None:
    text = re.sub(r" (?=[a-z0-9]+ = (?!\"312))", "\n", EXAMPLE.removesuffix(", each on a line of its own"))
    device = device_named(written(tmp_path, text))
    assert (device.family, device.multiprocessors, device.l2, device.peak("bf16")) == ("Ampere", 108, 40e6, 312e12)
    with pytest.raises(ValueError, match="bandwidth must be a number above 0 and finite"):
        replace(device, bandwidth=float("inf"))


def test_unknown_names_say_what_there_is(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no device and no file 'B9000'; name a data sheet"):
        device_named("B9000")
    with pytest.raises(ValueError, match=r"must have one \[\[device\]\], not 0"):
        device_named(written(tmp_path, '[[link]]\nname = "x"\nbandwidth = "1 GB/s"\n'))
    with pytest.raises(ValueError, match="cannot read the devices"):
        read_devices(tmp_path / "absent.toml")
