"""Which build runs on which card."""

import pytest

from vlquant import gpu_support as support


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (["sm_60"], (6, 1), True),  # as torch's wheels have it for a GTX 1080 Ti
        (["sm_61"], (6, 0), False),
        (["sm_70", "sm_75"], (6, 1), False),
        (["sm_80"], (9, 0), False),
        (["compute_80"], (9, 0), True),
        (["compute_90"], (8, 6), False),
        (["sm_90a"], (9, 0), True),
        (["sm_100a"], (10, 3), False),
        (["sm_120"], (12, 0), True),
        ([], (9, 0), False),
    ],
)
def test_code_runs_on_later_cards_of_its_own_major_number(architectures, capability, runs):
    assert support.has_code(architectures, capability) == runs


def test_floors_fall_where_wheels_dropped_cards():
    assert support.floor_of(support.ONNXRUNTIME_GPU, (1, 26, 0)) == (6, 0)
    assert support.floor_of(support.ONNXRUNTIME_GPU, (1, 27)) == (7, 5)
    assert support.floor_of(support.BITSANDBYTES, (12, 6)) == (6, 0)
    assert support.floor_of(support.BITSANDBYTES, (12, 9)) == (7, 0)
    assert support.floor_of(support.CUDNN, (9, 10, 2, 21)) < (6, 1) < support.floor_of(support.CUDNN, (9, 11))
    assert support.floor_of(support.DRIVER, (580, 159, 3)) < (6, 1) < support.floor_of(support.DRIVER, (590, 44, 1))


@pytest.mark.parametrize(
    ("cards", "driver", "file"),
    [
        ([], None, "cpu.txt"), ([(6, 1)], (580,), "pascal.txt"), ([(7, 0)], (580,), "pascal.txt"), ([(7, 5)], (580,), "cpu.txt"),
        ([(7, 5)], (535,), "pascal.txt"), ([(8, 6), (6, 1)], (580,), "pascal.txt"), ([(12, 0)], (580,), "cpu.txt"),
    ],
)  # fmt: skip
def test_the_first_set_that_serves_every_card(cards, driver, file):
    assert support.set_for(cards, driver).file == file


def test_some_machines_no_set_serves():
    assert support.set_for([(5, 2)], None) is support.set_for([(12, 0), (6, 1)], None) is support.set_for([(6, 1)], (470,)) is None


def test_the_pinned_sets_serve_the_cards_they_are_said_to():
    pascal, today = support.pinned_versions("pascal.txt"), support.pinned_versions("cpu.txt")
    assert support.floor_of(support.ONNXRUNTIME_GPU, support.numbers(pascal["onnxruntime-gpu"])) == (6, 0)
    assert support.floor_of(support.CUDNN, support.numbers(pascal["nvidia-cudnn-cu12"])) < (6, 1)
    assert support.numbers(pascal["bitsandbytes"]) < support.HALF_PRECISION_BITSANDBYTES <= support.numbers(today["bitsandbytes"])


def test_sets_say_for_which_systems_they_have_wheels():
    cpu, pascal = support.SETS
    assert pascal.installs("3.11.7", "Linux x86_64") and pascal.installs("3.13.1", "Linux x86_64")
    assert not pascal.installs("3.14.0", "Linux x86_64") and not pascal.installs("3.11.7", "Linux aarch64")
    assert cpu.installs("3.14.0", "Darwin arm64")
    assert support.set_for([(6, 1)], None, [cpu]) is None


def test_numbers_of_versions():
    assert support.numbers("2.7.1+cu126") == (2, 7, 1) and support.numbers("1.27.0rc1") == (1, 27, 0)


def test_generations():
    names = {(5, 2): "Maxwell", (6, 1): "Pascal", (7, 0): "Volta", (7, 5): "Turing", (8, 6): "Ampere", (8, 9): "Ada", (9, 0): "Hopper", (12, 0): "Blackwell"}
    assert {capability: support.generation(capability) for capability in names} == names
    assert support.generation((3, 5)) == "older than Maxwell"


@pytest.mark.parametrize(("device", "capability"), [(0x1B06, (6, 1)), (0x1B38, (6, 1)), (0x15F8, (6, 0)), (0x1DB4, (7, 0)), (0x13C2, (5, 0)), (0x2204, None)])
def test_cards_on_the_bus(device, capability):
    assert support.pci_capability(device) == capability
