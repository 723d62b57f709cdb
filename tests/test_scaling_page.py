"""docs/scaling.md: its tables are what its script computes."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_the_tables_of_the_page_are_those_of_the_script(process_environment):
    command = [sys.executable, "benchmarks/scaling.py"]
    done = subprocess.run(command, cwd=ROOT, env=process_environment, capture_output=True, text=True, check=True)
    assert "SoftMoE-H-14" in done.stdout
    assert done.stdout.strip() in (ROOT / "docs/scaling.md").read_text()
