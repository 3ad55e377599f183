"""What the doctor says about machines made up of facts: healthy ones, and each way an installation is known to break."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from tests.made_up_machines import (
    BOTH_PROVIDERS, CARDS, CUDA128, CUDA130, CUDA132, NO_GPU, NVRTC12, NVRTC13, changed, pascal_set, todays_set,
)  # fmt: skip
from vlquant.doctor import NO, YES, doctor
from vlquant.doctor_rules import BROKEN, NOTE, SLOW, UNUSED
from vlquant.doctor_table import print_diagnosis, to_json
from vlquant.gpu_support import pinned_versions
from vlquant.probes import Cpu, Place

ROOT = Path(__file__).parents[1]
CPU_LINE = "pip install -e '.[cpu]' -c vlquant/pins/cpu.txt"
GPU_LINE = "pip install -e '.[gpu]' -c vlquant/pins/cpu.txt"
PASCAL_LINE = "pip install -e '.[gpu]' -c vlquant/pins/pascal.txt"
GPTQ, NF4, INT8, FP32, FP16, VISION_INT8 = (
    "GPTQ 4 and 8 bit (own kernels)", "NF4 (bitsandbytes)", "int8 (own kernels)", "vision fp32", "vision fp16", "vision int8",
)  # fmt: skip

EVERYTHING_RUNS = {GPTQ: YES, NF4: YES, INT8: YES, FP32: YES, FP16: YES, VISION_INT8: NO}


def runs(diagnosis, card=0):
    return {row.name: row.runs for row in diagnosis.cards[card].rows}


def commands(diagnosis):
    return [each.command for each in diagnosis.install]


def found(diagnosis):
    return [(each.severity, each.part) for each in diagnosis.findings]


def test_no_gpu_is_nothing_wrong():
    diagnosis = doctor(NO_GPU)
    assert (diagnosis.exit_code, diagnosis.findings, diagnosis.cards) == (0, (), ())
    assert commands(diagnosis) == [CPU_LINE]
    assert diagnosis.verdict == ("vlquant runs on the CPU", "no GPU that could be used was found, which is nothing wrong")


@pytest.mark.parametrize("card", ["1080 Ti", "P40"])
def test_a_pascal_card_with_its_own_set(card):
    diagnosis = doctor(pascal_set(card))
    assert (diagnosis.exit_code, diagnosis.findings, commands(diagnosis)) == (0, (), [PASCAL_LINE])
    assert runs(diagnosis) == EVERYTHING_RUNS


@pytest.mark.parametrize("card", ["T4", "3090", "H200"])
def test_later_cards_with_todays_wheels(card):
    diagnosis = doctor(todays_set(card))
    assert (diagnosis.exit_code, diagnosis.findings, commands(diagnosis)) == (0, (), [GPU_LINE])
    assert runs(diagnosis) == EVERYTHING_RUNS


def test_packed_weights_need_our_kernels_and_nf4_needs_bitsandbytes():
    """int8 is made with bitsandbytes, and multiplied by our kernels: cuda_linear.py lays it out for them."""
    without = pascal_set("1080 Ti", bitsandbytes=None, problems={"bitsandbytes on cuda": "no kernel image"})
    assert {name: runs(doctor(without))[name] for name in (GPTQ, INT8, NF4)} == {GPTQ: YES, INT8: YES, NF4: NO}
    without = pascal_set("1080 Ti", nvrtc=())
    assert {name: runs(doctor(without))[name] for name in (GPTQ, INT8, NF4)} == {GPTQ: NO, INT8: NO, NF4: YES}


def test_a_row_says_what_carries_it_or_what_is_lacking():
    rows = {row.name: row for row in doctor(pascal_set("P100")).cards[0].rows}
    assert rows[INT8].why == "it begins at compute capability 6.1, and the card has 6.0"
    assert (rows[NF4].runs, rows[NF4].why) == (YES, "bitsandbytes' kernels; made with it too, which any CPU can")


def test_the_pascal_set_serves_later_cards_too():
    assert doctor(pascal_set("H200")).findings == ()


BREAKAGES = {
    "default torch 2.15 on a 1080 Ti": (
        pascal_set("1080 Ti", versions={"torch": "2.15.0"}, torch=CUDA132, nvrtc=NVRTC13),
        "torch 2.15.0 (CUDA 13.2) has no code for NVIDIA GeForce GTX 1080 Ti", "pip uninstall -y torch && " + PASCAL_LINE,
        {GPTQ: NO, NF4: NO, FP32: NO},
    ),
    "torch for CUDA 12.8": (
        pascal_set("1080 Ti", versions={"torch": "2.8.0"}, torch=CUDA128, bitsandbytes="libbitsandbytes_cuda128.so"),
        "bitsandbytes 0.49.2 picks libbitsandbytes_cuda128.so, without code for NVIDIA GeForce GTX 1080 Ti",
        "pip uninstall -y torch bitsandbytes && " + PASCAL_LINE, {GPTQ: NO, NF4: NO, FP32: NO},
    ),
    "both packages of ONNX Runtime": (
        pascal_set("1080 Ti", versions={"onnxruntime": "1.31.1"}),
        "onnxruntime 1.31.1 and onnxruntime-gpu 1.23.2 are installed together", "pip uninstall -y onnxruntime onnxruntime-gpu && " + PASCAL_LINE,
        {GPTQ: YES, NF4: YES, FP32: NO, FP16: NO},
    ),
    "ONNX Runtime 1.27 on a P40": (
        pascal_set("P40", versions={"onnxruntime-gpu": "1.27.0"}, ran=("CPUExecutionProvider",)),
        "onnxruntime-gpu 1.27.0 has no code for Tesla P40", "pip uninstall -y onnxruntime-gpu && " + PASCAL_LINE,
        {GPTQ: YES, NF4: YES, FP32: NO},
    ),
    "cuDNN raised by another package": (
        pascal_set("1080 Ti", versions={"nvidia-cudnn-cu12": "9.11.0.98"}),
        "cuDNN 9.11.0.98 (nvidia-cudnn) has no code for NVIDIA GeForce GTX 1080 Ti",
        "pip uninstall -y torch nvidia-cudnn-cu12 && " + PASCAL_LINE, {GPTQ: YES, NF4: YES, FP32: NO},
    ),
    "a driver too old for CUDA 13": (
        todays_set("T4", driver="535.230.02"), "driver 535.230.02 is too old for torch's CUDA 13.0",
        "install a driver of branch R580 or later, or: pip uninstall -y torch && " + PASCAL_LINE, {GPTQ: NO, NF4: NO, FP32: NO},
    ),
    "a driver too old for anything": (
        pascal_set("1080 Ti", driver="470.256.02"), "driver 470.256.02 is too old for torch's CUDA 12.6",
        "install a driver of branch R525 or later", {GPTQ: NO, NF4: NO, FP32: NO},
    ),
    "a driver that came after the card's last": (
        pascal_set("1080 Ti", driver="590.44.01"), "driver 590.44.01 no longer runs NVIDIA GeForce GTX 1080 Ti",
        "install NVIDIA's driver, branch R580", {GPTQ: NO, NF4: NO, FP32: NO},
    ),
    "a provider that is listed and does not load": (
        pascal_set("3090", ran=("CPUExecutionProvider",), problems={"onnxruntime on cuda": "libcublasLt.so.12: cannot open shared object file"}),
        "ONNX Runtime lists its CUDA provider, which does not load", "pip uninstall -y onnxruntime-gpu && " + GPU_LINE,
        {GPTQ: YES, NF4: YES, FP32: NO},
    ),
    "NVRTC 13 on Pascal": (
        pascal_set("P40", nvrtc=NVRTC13), "NVRTC 13.0 cannot compile for Tesla P40", "pip uninstall -y torch && " + PASCAL_LINE,
        {GPTQ: NO, NF4: YES, FP32: YES},
    ),
    "NVRTC 12.6 on a card that came after it": (
        todays_set("5090", nvrtc=NVRTC12), "NVRTC 12.6 cannot compile for NVIDIA GeForce RTX 5090", "pip uninstall -y torch && " + GPU_LINE,
        {GPTQ: NO, INT8: NO, NF4: YES, FP32: YES},
    ),
    "a torch that does not compute": (
        todays_set("H200", problems={"torch on cuda": "AcceleratorError: CUDA error: out of memory"}), "torch 2.13.0 does not compute on the GPU",
        "pip uninstall -y torch && " + GPU_LINE, {GPTQ: NO, NF4: NO, FP32: NO},
    ),
    "a bitsandbytes that does not compute": (
        todays_set("T4", problems={"bitsandbytes on cuda": "no kernel image"}), "bitsandbytes 0.50.2 does not work on the GPU",
        "pip uninstall -y bitsandbytes && " + GPU_LINE, {GPTQ: YES, NF4: NO, INT8: YES, FP32: YES},
    ),
}  # fmt: skip


@pytest.mark.parametrize(("machine", "sentence", "mended_by", "table"), BREAKAGES.values(), ids=BREAKAGES)
def test_what_is_broken_is_named_with_the_line_that_mends_it(machine, sentence, mended_by, table):
    diagnosis = doctor(machine)
    [finding] = [each for each in diagnosis.findings if each.sentence == sentence]
    assert (finding.severity, finding.mend, diagnosis.exit_code) == (BROKEN, mended_by, 3)
    assert {name: runs(diagnosis)[name] for name in table} == table


def test_bitsandbytes_0_50_is_slow_where_half_precision_is():
    diagnosis = doctor(pascal_set("1080 Ti", versions={"bitsandbytes": "0.50.2"}))
    assert (runs(diagnosis)[NF4], diagnosis.exit_code) == (SLOW, 0)
    [finding] = diagnosis.findings
    assert "1/64" in finding.why and finding.mend == "pip uninstall -y bitsandbytes && " + PASCAL_LINE
    assert doctor(pascal_set("P100", versions={"bitsandbytes": "0.50.2"})).findings == ()  # its half precision is fast
    assert doctor(todays_set("T4")).findings == ()


def test_builds_for_a_cpu_beside_a_gpu_leave_it_idle_and_are_not_broken():
    diagnosis = doctor(changed(NO_GPU, gpus=(CARDS["3090"],), driver="580.65.06", problems={"torch on cuda": "torch sees no CUDA device"}))
    assert found(diagnosis) == [(UNUSED, "torch"), (UNUSED, "onnxruntime")]
    assert set(runs(diagnosis).values()) == {NO} and diagnosis.exit_code == 0
    assert [each.mend for each in diagnosis.findings] == [f"pip uninstall -y {each} && {GPU_LINE}" for each in ("torch", "onnxruntime")]


def test_a_mismatch_of_cuda_is_named_beside_the_loaders_words():
    machine = pascal_set("3090", versions={"onnxruntime-gpu": "1.31.1"}, ran=("CPUExecutionProvider",), problems={"onnxruntime on cuda": "no libcudart.so.13"})
    [finding] = doctor(machine).findings
    assert finding.why == "no libcudart.so.13; onnxruntime-gpu 1.31.1 needs libraries of CUDA 13, and torch brings 12.6"


def test_a_card_older_than_every_set_stays_idle():
    diagnosis = doctor(pascal_set("970"))
    assert found(diagnosis) == [(UNUSED, "all")] and set(runs(diagnosis).values()) == {NO}
    assert (commands(diagnosis), diagnosis.exit_code) == ([CPU_LINE], 0)


def test_a_card_that_its_driver_dropped_is_found_on_the_bus():
    diagnosis = doctor(changed(NO_GPU, driver="590.44.01", unseen=(0x1B06,)))
    assert diagnosis.findings[0].sentence == "driver 590.44.01 no longer runs the NVIDIA card 1b06 (Pascal)"
    assert (commands(diagnosis), diagnosis.exit_code) == ([PASCAL_LINE], 3)
    assert doctor(changed(NO_GPU, driver="590.44.01", unseen=(0x2204,))).findings[0].mend == "look into the system's log for what the driver says"


def test_a_card_without_a_driver_is_not_an_error():
    diagnosis = doctor(changed(NO_GPU, unseen=(0x1B06, 0x2204)))
    assert [each.mend for each in diagnosis.findings] == ["install NVIDIA's driver, branch R580", "install NVIDIA's driver, branch R580 or later"]
    assert diagnosis.exit_code == 0


def test_two_cards_are_judged_each_by_itself_and_get_the_set_that_serves_both():
    machine = todays_set("T4", gpus=(CARDS["3090"], CARDS["1080 Ti"]))
    diagnosis = doctor(machine)
    assert (runs(diagnosis, 0)[NF4], runs(diagnosis, 1)[NF4]) == (YES, NO)
    assert all(PASCAL_LINE in each.mend for each in diagnosis.findings)
    assert commands(diagnosis) == [f"pip uninstall -y torch nvidia-cudnn-cu13 onnxruntime-gpu bitsandbytes && {PASCAL_LINE}"]


def test_cards_that_no_set_serves_together_get_a_way_each():
    diagnosis = doctor(pascal_set("1080 Ti", gpus=(CARDS["1080 Ti"], CARDS["5090"], CARDS["P40"])))
    mends = {each.part: each.mend for each in diagnosis.findings if each.card == CARDS["5090"].name}
    assert mends["torch"] == "pip uninstall -y torch && " + GPU_LINE and mends["nvrtc"] == mends["torch"]
    assert not [each for each in diagnosis.findings if each.card == CARDS["1080 Ti"].name]
    assert [(each.cards, each.command.rpartition(" && ")[2]) for each in diagnosis.install] == [
        ((CARDS["1080 Ti"].name, CARDS["P40"].name), PASCAL_LINE), ((CARDS["5090"].name,), GPU_LINE),
    ]  # fmt: skip
    assert "each way below excludes the others" in diagnosis.verdict[-1]
    text = printed(pascal_set("1080 Ti", gpus=(CARDS["1080 Ti"], CARDS["5090"])), terminal=False)
    assert "to install what fits NVIDIA GeForce RTX 5090: pip" in text


def test_what_concerns_no_one_card_is_mended_for_each_that_needs_its_own():
    machine = pascal_set("1080 Ti", gpus=(CARDS["1080 Ti"], CARDS["5090"]), problems={"onnxruntime": "SIGILL"})
    [finding] = [each for each in doctor(machine).findings if each.sentence == "onnxruntime does not work"]
    assert finding.mend == (
        f"for {CARDS['1080 Ti'].name}: pip uninstall -y onnxruntime-gpu && {PASCAL_LINE}; "
        f"or for {CARDS['5090'].name}: pip uninstall -y onnxruntime-gpu && {GPU_LINE}"
    )


def test_a_card_that_its_driver_dropped_is_told_beside_one_that_works():
    diagnosis = doctor(todays_set("3090", driver="590.44.01", unseen=(0x1B06,)))
    assert [each.sentence for each in diagnosis.findings] == ["driver 590.44.01 no longer runs the NVIDIA card 1b06 (Pascal)"]
    assert diagnosis.exit_code == 3 and runs(diagnosis) == EVERYTHING_RUNS  # The other card has nothing to do with it.


def test_a_card_that_is_kept_from_here_is_a_note():
    diagnosis = doctor(todays_set("H200", unseen=(0x2335,)))
    assert found(diagnosis) == [(NOTE, "driver")] and diagnosis.exit_code == 0 and runs(diagnosis) == EVERYTHING_RUNS


@pytest.mark.parametrize("changes", [{"python": "3.14.2"}, {"system": "Windows AMD64"}])
def test_a_set_that_has_no_wheels_for_this_python_or_system_is_not_advised(changes):
    diagnosis = doctor(pascal_set("1080 Ti", torch=CUDA130, **changes))
    told = {each.part: each for each in diagnosis.findings}
    assert "pascal.txt is made of wheels for Linux x86_64 and Python 3.11 to 3.13" in told["pins"].why
    assert told["torch"].mend is None and not any("pascal.txt" in each for each in commands(diagnosis))
    assert doctor(pascal_set("1080 Ti", python="3.13.0")).findings == ()


@pytest.mark.parametrize(("compiler", "mend"), [("gcc", "pip install --no-deps -e ."), (None, "install a C compiler (gcc or clang, with the headers of Python), then: pip install --no-deps -e .")])
def test_kernels_that_were_not_compiled_are_told(compiler, mend):
    diagnosis = doctor(changed(NO_GPU, cpu_kernels=None, compiler=compiler))
    assert (found(diagnosis), diagnosis.exit_code) == ([(SLOW, "cpu kernels")], 0) and diagnosis.findings[0].mend == mend
    assert doctor(changed(NO_GPU, cpu_kernels=None, cpu=Cpu("an old one", (), 2, None))).findings == ()
    elsewhere = changed(NO_GPU, cpu_kernels=None, place=Place(None, "/somewhere/vlquant/pins"))
    assert doctor(elsewhere).findings[0].mend == "install vlquant again from its sources"


@pytest.mark.parametrize(("asked", "choices"), [("bogus", ("avx2", "vnni")), ("vnni", ("avx2",)), ("avx2", ())])
def test_a_choice_of_kernels_that_is_none_is_broken(asked, choices):
    diagnosis = doctor(changed(NO_GPU, kernels_asked=asked, kernel_choices=choices))
    [finding] = diagnosis.findings
    assert (finding.sentence, finding.mend) == (f"the environment variable VLQUANT_KERNELS is {asked!r}", "unset VLQUANT_KERNELS")
    assert finding.why.endswith(f"takes {', '.join(('torch', *choices))}") and diagnosis.exit_code == 3


@pytest.mark.parametrize(("asked", "told"), [("torch", "_kernels.abi3.so, switched off, as the environment variable VLQUANT_KERNELS is torch"), ("avx2", "_kernels.abi3.so, the environment variable VLQUANT_KERNELS is avx2"), ("", "_kernels.abi3.so")])
def test_kernels_that_were_chosen_are_told(asked, told):
    diagnosis = doctor(changed(NO_GPU, kernels_asked=asked, kernel_choices=("avx2",)))
    assert (dict(diagnosis.facts)["CPU kernels"], diagnosis.findings, diagnosis.exit_code) == (told, (), 0)


def test_one_core_is_one_core():
    machines = [changed(NO_GPU, cpu=replace(NO_GPU.cpu, cores=cores)) for cores in (1, 2)]
    assert [dict(doctor(each).facts)["processor"].split(", ")[1] for each in machines] == ["1 core", "2 cores"]


def test_lines_work_wherever_the_command_runs():
    installed = pascal_set("P40", place=Place(None, "/some where/vlquant/pins"))
    assert commands(doctor(installed)) == ["pip install 'vlquant[gpu]' -c '/some where/vlquant/pins/pascal.txt'"]
    checkout = pascal_set("P40", place=Place("/src/vlquant", "/src/vlquant/vlquant/pins"))
    assert commands(doctor(checkout)) == ["pip install -e '/src/vlquant[gpu]' -c /src/vlquant/vlquant/pins/pascal.txt"]


def test_one_command_mends_everything_at_once():
    machine = pascal_set("1080 Ti", versions={"onnxruntime": "1.31.1", "torch": "2.15.0"}, torch=CUDA132)
    assert commands(doctor(machine)) == [f"pip uninstall -y onnxruntime onnxruntime-gpu torch nvidia-cudnn-cu12 bitsandbytes && {PASCAL_LINE}"]


def test_the_same_card_twice_is_told_once():
    machine = pascal_set("P40", gpus=(CARDS["P40"],) * 2, nvrtc=NVRTC13)
    assert len(doctor(machine).findings) == 1 and len(doctor(machine).cards) == 2


def test_libraries_that_do_not_load_are_broken_without_a_gpu_too():
    machine = changed(NO_GPU, torch=None, problems={"torch": "its process was ended by SIGILL", "onnxruntime on cpu": "no torch"})
    diagnosis = doctor(machine)
    assert diagnosis.verdict[0] == "vlquant cannot run without torch" and diagnosis.exit_code == 3
    assert [(each.part, each.why) for each in diagnosis.findings] == [("torch", "its process was ended by SIGILL")]


def test_without_torch_nothing_runs():
    diagnosis = doctor(changed(NO_GPU, torch=None))
    assert [each.sentence for each in diagnosis.findings] == ["torch is not installed"] and diagnosis.exit_code == 3


def test_without_onnx_runtime_vlquant_still_runs():
    versions = {name: version for name, version in NO_GPU.versions.items() if name != "onnxruntime"}
    machine = changed(NO_GPU, providers=(), ran=())
    diagnosis = doctor(type(machine)(**{**vars(machine), "versions": versions}))
    assert found(diagnosis) == [(NOTE, "onnxruntime")] and diagnosis.exit_code == 0


def test_every_command_is_one_of_readme():
    machines = [NO_GPU, *(machine for machine, *_ in BREAKAGES.values())]
    lines = {line.rpartition(" && ")[2] for machine in machines for line in commands(doctor(machine))}
    readme = (ROOT / "README.md").read_text()
    assert lines == {CPU_LINE, GPU_LINE, PASCAL_LINE}
    assert CPU_LINE in readme and PASCAL_LINE in readme and "`'.[gpu]'` for ONNX Runtime on CUDA" in readme


def test_the_made_up_pascal_machine_is_the_pinned_set():
    pins = pinned_versions("pascal.txt")
    assert all(pins[name] == version for name, version in pascal_set("1080 Ti").versions.items() if name in pins)


def printed(machine, *, terminal):
    console = Console(force_terminal=terminal, record=True, width=100, file=open("/dev/null", "w"))
    print_diagnosis(doctor(machine), console)
    return console.export_text()


@pytest.mark.parametrize("terminal", [True, False])
def test_it_is_printed_whole_and_claims_no_measurement(terminal):
    text = printed(BREAKAGES["torch for CUDA 12.8"][0], terminal=terminal)
    assert "GTX 1080 Ti, compute capability 6.1 (Pascal), 11.7 GB" in text
    assert "not measured on this card" in re.sub(r"\s+", " ", text)
    assert f"  mend: pip uninstall -y torch && {PASCAL_LINE}\n" in text  # whole, on one line, to be copied
    assert ("━" in text or "│" in text) == terminal


def test_json_is_the_diagnosis():
    told = json.loads(to_json(doctor(pascal_set("P40", torch=CUDA130, ran=BOTH_PROVIDERS))))
    assert told["exit_code"] == 3 and told["findings"][0]["severity"] == BROKEN
    assert told["cards"][0]["capability"] == [6, 1] and len(told["cards"][0]["rows"]) == 6
    assert set(told) == {"facts", "findings", "cards", "verdict", "install", "exit_code"}
