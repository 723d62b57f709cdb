"""torch.compile in one graph and torch.export for any batch: every layer and tower equals its plain form."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = Path(__file__).with_name("compiled.py")


@pytest.mark.slow
@pytest.mark.parametrize(
    "check",
    [
        "layers_in_one_graph",
        "towers_in_one_graph",
        "both_towers_in_one_graph",
        "a_new_collector_each_step_needs_no_new_graph",
        "layers_are_exported",
        "towers_are_exported",
        "sparse_towers_are_exported",
    ],
)
def test_compiled_and_exported_forms_equal_the_plain_one(check, process_environment):
    done = subprocess.run([sys.executable, "-W", "error", PROGRAM, check], env=process_environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs g++")
def test_inductors_code_equals_the_plain_towers_and_layers_forward_and_backward(process_environment, tmp_path):
    environment = process_environment | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, PROGRAM, "inductor"], env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()
