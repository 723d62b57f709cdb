"""How the command line starts: help for every verb, nothing heavy before its time, the user's files no libraries."""

import json
import os
import re
import subprocess
import sys

import pytest

from softmoe_clip.launch import CPU_MEMORY

pytestmark = pytest.mark.usefixtures("working_folder")

VERBS = (
    "demo",
    "pack",
    "check",
    "stats",
    "train-tokenizer",
    "train",
    "config",
    "plot",
    "eval",
    "compare",
    "embed",
    "index",
    "search",
    "summary",
    "upcycle",
    "soup",
    "export-onnx",
)
HEAVY = ("torch", "torchvision", "open_clip", "timm", "transformers", "accelerate", "faiss", "matplotlib", "pyarrow")


def test_help_lists_every_verb_and_nothing_is_missing_here(softmoe_clip):
    done = softmoe_clip("--help")
    assert done.returncode == 0
    for verb in VERBS:
        assert f" {verb} " in done.stdout
    assert "..." not in done.stdout.split("Commands:")[1], "a first sentence is cut off: make it shorter"
    assert softmoe_clip().stdout == done.stdout


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_one_example(softmoe_clip, verb):
    done = softmoe_clip(verb, "--help")
    assert done.returncode == 0
    assert done.stdout.count("Example: ") == 1
    assert f"Example: softmoe-clip {verb} " in done.stdout
    asked_for = re.findall(r"^  (?:-\S+ |\S+ <).*\n(?: {8,}.*\n)*", done.stdout.split("Arguments:")[-1], re.MULTILINE)
    assert asked_for
    for entry in asked_for:
        assert re.sub(r"<.*?>|\[(required|default: .*?)\]", "", " ".join(entry.split())).split()[1:], entry


LIGHT = """
import contextlib, io, json, sys
from softmoe_clip.cli import main
answers = []
for arguments in json.loads(sys.argv[1]):
    sys.argv = ["softmoe-clip", *arguments]
    out, err, status = io.StringIO(), io.StringIO(), None
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            main()
        except SystemExit as end:
            status = end.code
    heavy = [name for name in json.loads(sys.argv_heavy) if name in sys.modules]
    answers.append([arguments, status, heavy])
print(json.dumps(answers))
"""


def test_help_and_early_mistakes_import_nothing_heavy(tiny_yaml, process_environment):
    early = [
        ["--help"],
        *([verb, "--help"] for verb in VERBS),
        ["train", str(tiny_yaml), "optim.lrr=0.1"],
        ["train", "nowhere.yaml"],
        ["config", str(tiny_yaml), "optim.lrr=0.1"],
        ["pack", "nowhere", "out"],
        ["check", "nowhere"],
        ["stats", "nowhere", "out"],
        ["unknown-verb"],
    ]
    program = LIGHT.replace("sys.argv_heavy", repr(json.dumps(HEAVY)))
    command = [sys.executable, "-c", program, json.dumps(early)]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment, check=True)
    for arguments, status, heavy in json.loads(done.stdout):
        assert status == (0 if "--help" in arguments else 2), arguments
        assert heavy == [], arguments


def test_the_installed_command_and_the_module_answer_alike(process_environment):
    script = [os.path.join(os.path.dirname(sys.executable), "softmoe-clip")]
    done = [
        subprocess.run([*start, "train", "nowhere.yaml"], capture_output=True, text=True, env=process_environment)
        for start in (script, [sys.executable, "-m", "softmoe_clip"])
    ]
    assert done[0].returncode == done[1].returncode == 2
    assert (
        done[0].stderr
        == done[1].stderr
        == ("softmoe-clip: cannot read the config nowhere.yaml: No such file or directory\n")
    )


def test_files_of_the_user_do_not_pass_for_libraries(working_folder, tiny_yaml, process_environment):
    for name in ("eval", "random", "torch", "data_pipelines", "configs"):
        (working_folder / f"{name}.py").write_text("raise SystemExit('imported the wrong file')")
    script = os.path.join(os.path.dirname(sys.executable), "softmoe-clip")
    command = [script, "train", str(tiny_yaml), "data.train=nowhere"]
    done = subprocess.run(command, capture_output=True, text=True, env=process_environment)
    assert done.returncode == 2
    assert "nowhere" in done.stderr
    assert "wrong file" not in done.stderr


# Where a large block lies: in the heap, which is kept, or in a mapping of its own, which goes back to the system.
PLACE = """
import atexit, ctypes, softmoe_clip

@atexit.register
def tell():
    block = bytearray(64 << 20)
    start = ctypes.addressof(ctypes.c_char.from_buffer(block))
    with open("/proc/self/maps") as maps:
        heaps = [line.split()[0].split("-") for line in maps if line.rstrip().endswith("[heap]")]
    print("kept" if any(int(low, 16) <= start < int(high, 16) for low, high in heaps) else "given back")

"""
ON_LINUX = pytest.mark.skipif(sys.platform != "linux", reason="the settings are those of glibc")


def where_blocks_go(code: str, *arguments: str, **environment: str) -> subprocess.CompletedProcess:
    plain = {name: value for name, value in os.environ.items() if name not in CPU_MEMORY} | environment
    command = [sys.executable, "-c", PLACE + code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=plain)


@ON_LINUX
@pytest.mark.parametrize(
    ("arguments", "seen"),
    [
        (["train", "{yaml}", "data.train=nowhere"], "kept"),
        (["eval", "nowhere", "--suite", "{yaml}"], "given back"),  # no suite: ends before
        (["soup", "nowhere", "nowhere", "out"], "given back"),  # runs no tower
        (["soup", "nowhere", "nowhere", "out", "--suite", "suites/scenes.yaml"], "kept"),
        (["embed", "nowhere", "nowhere", "out"], "kept"),
        (["search", "nowhere", "a dog"], "given back"),
    ],
)
def test_verbs_that_run_towers_keep_memory(tiny_yaml, arguments, seen):
    arguments = [str(tiny_yaml) if argument == "{yaml}" else argument for argument in arguments]
    done = where_blocks_go("from softmoe_clip.cli import main; main()", *arguments)
    assert done.returncode == 2
    assert done.stdout.split("\n") == [seen, ""]
    assert done.stderr.count("\n") == 1


@ON_LINUX
def test_any_program_keeps_memory_with_one_call_and_what_the_user_has_set_holds():
    call = "softmoe_clip.keep_cpu_memory()"
    assert where_blocks_go("").stdout == "given back\n"
    assert where_blocks_go(call).stdout == "kept\n"
    assert where_blocks_go(call, MALLOC_MMAP_MAX_="65536", MALLOC_MMAP_THRESHOLD_="131072").stdout == "given back\n"
    assert where_blocks_go(call, GLIBC_TUNABLES="glibc.malloc.mmap_max=65536").stdout == "given back\n"
    shown = where_blocks_go(call + "; import os; print(os.environ['THP_MEM_ALLOC_ENABLE'])", THP_MEM_ALLOC_ENABLE="0")
    assert shown.stdout == "0\nkept\n"
