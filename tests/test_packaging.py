"""Locks, wheel, sdist and editable install: complete, free of addresses, and usable from any folder."""

import os
import re
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
from checkout import ROOT, checkout_files, copy_checkout, outside_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PACKED = ("softmoe_clip", "configs", "data_pipelines", "eval")
LINKED = PACKED[1:]
# A file of these names in a user's working folder must not stand in for ours, nor for what ours import.
HOSTILE = ("eval", "configs", "config", "data_pipelines", "models", "search", "training", "report", "moe", "launch")

PRINT_PLACES = """
import softmoe_clip.eval, softmoe_clip.data_pipelines.pack, softmoe_clip.report as report
from pathlib import Path
package = Path(softmoe_clip.__file__).parent
print(package)
print(softmoe_clip.eval.__file__)
print(softmoe_clip.data_pipelines.pack.__file__)
print(Path(report.__file__).parent / "page.html.j2")
for name in ("demo.yaml", "suites/scenes.yaml", "models/SoftMoE-demo.json"):
    print(package / "configs" / name)
"""


def pins(lock: str) -> dict[str, tuple[str, str]]:
    """Return name to (version, the rest of its entry) of a lock; a package locked twice has a marker on each."""
    entries = re.findall(r"^([A-Za-z0-9._-]+)==(\S+)(.*(?:\n +.*)*)", (ROOT / lock).read_text(), re.MULTILINE)
    return {f"{canonicalize_name(name)}{marker(rest)}": (version, rest) for name, version, rest in entries}


def marker(rest: str) -> str:
    """Return what stands behind `;` on the first line of a lock's entry."""
    first = rest.splitlines()[0].rstrip(" \\")
    return first if ";" in first else ""


@pytest.fixture(scope="module")
def project():
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_every_locked_package_has_hashes_and_no_address(lock):
    text = (ROOT / lock).read_text()
    packages = pins(lock)
    assert len(packages) == len(re.findall(r"^[^\s#]", text, re.MULTILINE)) > 80
    assert [name for name, (_, rest) in packages.items() if "--hash=sha256:" not in rest] == []
    assert re.findall(r"\S*(?://|@|-url|-links|-host)\S*", text) == []


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_locks_agree_with_the_project(lock, project):
    wanted = [*project["project"]["dependencies"], *(project["dependency-groups"]["dev"] if "dev" in lock else [])]
    for requirement in map(Requirement, wanted):
        versions = [
            v for name, (v, _) in pins(lock).items() if name.split(" ")[0] == canonicalize_name(requirement.name)
        ]
        assert versions, f"{requirement.name} is not in {lock}: lock again"
        assert all(requirement.specifier.contains(version) for version in versions), f"{requirement} against {lock}"


def test_the_dev_lock_holds_the_other_lock():
    dev = pins("requirements-dev.lock")
    assert [name for name, (version, _) in pins("requirements.lock").items() if dev[name][0] != version] == []


def test_the_project_gives_lower_bounds_and_no_pins(project):
    for requirement in map(Requirement, project["project"]["dependencies"]):
        operators = sorted(specifier.operator for specifier in requirement.specifier)
        assert operators in ([">="], ["<", ">="]), requirement
        # open_clip 5 does not exist yet, and its authors announce that names will go.
        assert operators == [">="] or requirement.name == "open-clip-torch", requirement


def test_versions_agree(project):
    cited = re.search(r"^version: (.+)$", (ROOT / "CITATION.cff").read_text(), re.MULTILINE)
    assert cited.group(1) == project["project"]["version"]


# Builds and installs


def build(checkout: Path, out: Path, target: str) -> Path:
    """Build with the locked hatchling, so that no registry is needed; return the archive."""
    out.mkdir(parents=True)
    subprocess.run([sys.executable, "-m", "hatchling", "build", "-t", target, "-d", out], cwd=checkout, check=True)
    (archive,) = out.iterdir()
    return archive


def install(wheel: Path, folder: Path) -> Path:
    """Install a wheel into a fresh environment that sees this environment's dependencies; return its bin folder."""
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    binaries = folder / ("Scripts" if os.name == "nt" else "bin")
    pip = [binaries / "python", "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", wheel]
    subprocess.run(pip, check=True, env=outside_environment(PIP_DISABLE_PIP_VERSION_CHECK="1"))
    # After pip, which would else find the package of this environment and leave it at that.
    (site_packages,) = folder.rglob("site-packages")
    (site_packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return binaries


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    return copy_checkout(tmp_path_factory.mktemp("check out"))


@pytest.fixture(scope="module")
def wheel(checkout, tmp_path_factory):
    return build(checkout, tmp_path_factory.mktemp("wheel") / "out", "wheel")


@pytest.fixture(scope="module")
def sdist(checkout, tmp_path_factory):
    return build(checkout, tmp_path_factory.mktemp("sdist") / "out", "sdist")


@pytest.fixture(scope="module")
def installed(wheel, tmp_path_factory):
    """The bin folder of an environment with the wheel in it."""
    return install(wheel, tmp_path_factory.mktemp("installed") / "environment")


@pytest.fixture(scope="module")
def hostile_folder(tmp_path_factory):
    """A working folder with modules of our names, each of which stops whoever imports it."""
    folder = tmp_path_factory.mktemp("hostile")
    for name in HOSTILE:
        (folder / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working folder was imported')")
    return folder


def run(command, folder):
    environment = outside_environment(PYTHONWARNINGS="error", SOFTMOE_CLIP_QUIET="1")
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.slow
def test_the_wheel_holds_each_file_of_the_package_once_and_nothing_else(wheel):
    members = zipfile.ZipFile(wheel).namelist()
    files = [path.as_posix() for path in checkout_files() if path.parts[0] in PACKED and not (ROOT / path).is_symlink()]
    packed = [f"softmoe_clip/{name}" if name.split("/")[0] in LINKED else name for name in files]
    information = [name for name in members if ".dist-info/" in name]
    assert sorted(members) == sorted([*packed, *information])
    assert any(name.endswith("licenses/LICENSE") for name in information)


@pytest.mark.slow
def test_the_sdist_holds_no_links_and_gives_the_same_wheel(wheel, sdist, tmp_path):
    with tarfile.open(sdist) as archive:
        assert [member.name for member in archive if not (member.isfile() or member.isdir())] == []
        archive.extractall(tmp_path, filter="data")
    (source,) = tmp_path.iterdir()
    assert not (source / "tests").exists()
    again = build(source, tmp_path / "out", "wheel")
    first, second = zipfile.ZipFile(wheel), zipfile.ZipFile(again)
    assert {name: first.read(name) for name in first.namelist()} == {n: second.read(n) for n in second.namelist()}


@pytest.mark.slow
def test_an_installed_wheel_works_from_a_folder_with_modules_of_our_names(installed, hostile_folder):
    for command in (["softmoe-clip"], ["python", "-m", "softmoe_clip"]):
        shown = run([installed / command[0], *command[1:], "--help"], hostile_folder)
        assert (shown.returncode, shown.stderr) == (0, "")
        printed = run([installed / command[0], *command[1:], "config", "configs/demo.yaml", "steps=7"], hostile_folder)
        assert (printed.returncode, printed.stderr) == (0, "")
        assert "steps: 7\n" in printed.stdout

    places = run([installed / "python", "-c", PRINT_PLACES], hostile_folder)
    assert places.stderr == ""
    for place in map(Path, places.stdout.splitlines()):
        assert place.is_relative_to(installed.parent)
        assert place.exists()


@pytest.mark.slow
def test_an_installed_wheel_makes_its_models_known_to_open_clip(installed, hostile_folder):
    code = "import softmoe_clip.plugin, open_clip; print('SoftMoE-demo' in open_clip.list_models())"
    asked = subprocess.run([installed / "python", "-c", code], cwd=hostile_folder, capture_output=True, text=True)
    assert asked.stdout == "True\n", asked.stderr


@pytest.mark.slow
def test_an_editable_install_is_the_checkout_itself(hostile_folder, tmp_path):
    checkout = copy_checkout(tmp_path / "checkout")
    binaries = install(build(checkout, tmp_path / "out", "wheel:editable"), tmp_path / "environment")
    copies = [
        path for path in (tmp_path / "environment").rglob("softmoe_clip*") if not path.name.endswith(".dist-info")
    ]
    assert copies == []

    places = run([binaries / "python", "-c", PRINT_PLACES], hostile_folder)
    assert places.stderr == ""
    for place in map(Path, places.stdout.splitlines()):
        assert place.is_relative_to(checkout)
        assert place.exists()

    (checkout / "eval" / "__init__.py").write_text("CHANGED = True\n")
    (checkout / "configs" / "mine.yaml").write_text((checkout / "configs" / "demo.yaml").read_text())
    seen = run([binaries / "python", "-c", "from softmoe_clip.eval import CHANGED"], hostile_folder)
    assert (seen.returncode, seen.stderr) == (0, "")
    assert run([binaries / "softmoe-clip", "config", "configs/mine.yaml"], hostile_folder).returncode == 0
