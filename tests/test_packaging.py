"""The launcher of a checkout: a small checkout with one dependency, real environments, real pip, no network."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from tests.machine import need

ROOT = Path(__file__).resolve().parents[1]
PROBE = "probe-for-the-launcher"

MAIN = """
import json, os, sys
import probe_for_the_launcher as probe
print(json.dumps({"args": sys.argv[1:], "cwd": os.getcwd(), "probe": probe.VERSION, "prefix": sys.prefix}))
"""


def make_wheel(folder: Path, version: str) -> None:
    """The smallest package that pip installs (Binary distribution format, PyPA specifications)."""
    name = PROBE.replace("-", "_")
    info = f"{name}-{version}.dist-info"
    folder.mkdir(exist_ok=True)
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as wheel:
        wheel.writestr(f"{name}.py", f"VERSION = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {PROBE}\nVersion: {version}\n")
        wheel.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        wheel.writestr(f"{info}/RECORD", f"{name}.py,,\n{info}/METADATA,,\n{info}/WHEEL,,\n{info}/RECORD,,\n")


def write_pyproject(checkout: Path, version: str) -> None:
    (checkout / "pyproject.toml").write_text(
        f'[project]\nname = "ferrotype"\ndependencies = ["{PROBE}=={version}"]\n'
        "[project.optional-dependencies]\ndev = []\n"
    )


def make_checkout(where: Path) -> Path:
    """The project's own launcher beside a package that tells how it was started."""
    package = where / "src" / "ferrotype"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "__main__.py").write_text(MAIN)
    (package / "unused.py").touch()
    shutil.copy2(ROOT / "ferrotype", where / "ferrotype")
    write_pyproject(where, "1.0")
    for version in ("1.0", "2.0"):
        make_wheel(where / "wheels", version)
    return where


def surroundings(checkout: Path, **more: str) -> dict[str, str]:
    """An environment in which pip sees nothing but the checkout's wheels."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("PIP_", "PYTHON", "FERROTYPE_"))}
    path = f"{Path(sys.executable).resolve().parent}:{kept['PATH']}"
    pip = {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": (checkout / "wheels").as_uri(), "PIP_CONFIG_FILE": os.devnull}
    return kept | pip | {"PATH": path} | more


def launch(
    checkout: Path, *args: str, by: Path | None = None, cwd: Path | None = None, **more: str
) -> subprocess.CompletedProcess[str]:
    command = [str(by or checkout / "ferrotype"), *args]
    env = surroundings(checkout, **more)
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=env, check=False, timeout=300)


def told(done: subprocess.CompletedProcess[str]) -> dict[str, object]:
    assert done.returncode == 0, done.stderr
    facts: dict[str, object] = json.loads(done.stdout)
    return facts


@pytest.fixture(scope="module")
def ready(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkout whose launcher was used once."""
    need("flock", "cmp")
    pytest.importorskip("ensurepip")
    checkout = make_checkout(tmp_path_factory.mktemp("packaging") / "a check out")
    first = launch(checkout, "first")
    assert told(first)["args"] == ["first"]
    assert len(first.stderr.splitlines()) == 1
    assert "takes about a minute" in first.stderr
    return checkout


def test_runs_from_anywhere_and_through_symlinks(ready: Path, tmp_path: Path) -> None:
    direct = tmp_path / "ft"
    direct.symlink_to(ready / "ferrotype")
    (tmp_path / "folder").symlink_to(ready)
    twice = tmp_path / "again"
    twice.symlink_to("ft")
    for by in (ready / "ferrotype", direct, twice, tmp_path / "folder" / "ferrotype"):
        done = launch(ready, "a b", "", "--c=*", by=by, cwd=tmp_path)
        facts = told(done)
        assert facts["args"] == ["a b", "", "--c=*"]
        assert facts["cwd"] == str(tmp_path)
        assert Path(str(facts["prefix"])).resolve() == ready / ".venv"
        assert done.stderr == ""


def test_runs_by_a_relative_path(ready: Path) -> None:
    done = subprocess.run(
        ["./ferrotype", "x"], cwd=ready, env=surroundings(ready), capture_output=True, text=True, check=False
    )
    assert told(done)["args"] == ["x"]


def test_the_current_folder_is_never_imported_from(ready: Path, tmp_path: Path) -> None:
    for name in ("json.py", "ferrotype.py", "probe_for_the_launcher.py"):
        (tmp_path / name).write_text("raise SystemExit('imported from the current folder')\n")
    assert told(launch(ready, cwd=tmp_path))["probe"] == "1.0"


def test_is_quick_once_set_up(ready: Path) -> None:
    """Quick is: of what the launcher runs before Python, a few steps, and none that starts anything slow."""
    trace = subprocess.run(
        ["sh", "-x", ready / "ferrotype"], env=surroundings(ready), capture_output=True, text=True, check=True
    )
    steps = [line for line in trace.stderr.splitlines() if line.startswith("+")]
    assert len(steps) < 30, steps
    assert not any(word in step for step in steps for word in (" -m venv", " -m pip", "flock"))


def test_sources_are_compiled_at_the_set_up(ready: Path) -> None:
    """Who starts the program later may not be allowed to write beside them."""
    assert list((ready / "src/ferrotype/__pycache__").glob("unused.*.pyc"))


def test_changed_sources_count_at_once(ready: Path) -> None:
    main = ready / "src/ferrotype/__main__.py"
    try:
        main.write_text("print('changed')\n")
        done = launch(ready)
        assert (done.stdout, done.stderr) == ("changed\n", "")
    finally:
        main.write_text(MAIN)


def test_changed_requirements_are_installed_and_a_moved_checkout_runs(ready: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "moved"
    shutil.copytree(ready, checkout, symlinks=True)
    write_pyproject(checkout, "2.0")
    done = launch(checkout)
    facts = told(done)
    assert facts["probe"] == "2.0"
    assert Path(str(facts["prefix"])).resolve() == checkout / ".venv"
    assert len(done.stderr.splitlines()) == 1
    assert launch(checkout).stderr == ""


def test_a_failure_shows_what_pip_said_and_the_next_use_starts_over(ready: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "broken"
    shutil.copytree(ready, checkout, symlinks=True)
    write_pyproject(checkout, "3.0")
    failed = launch(checkout)
    assert failed.returncode == 6
    assert f"{PROBE}==3.0" in failed.stderr
    assert failed.stderr.splitlines()[-1].startswith("ferrotype: setting up failed")
    assert failed.stdout == ""
    write_pyproject(checkout, "2.0")
    (checkout / ".venv/bin/python").unlink()  # as an interrupted set-up may leave it
    assert told(launch(checkout))["probe"] == "2.0"


def test_two_first_uses_at_once_both_work(ready: Path, tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "new")
    command = [str(checkout / "ferrotype"), "go"]
    env = surroundings(checkout)
    both = [
        subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert all('"probe": "1.0"' in out for out, _ in said)
    assert sorted(len(err.splitlines()) for _, err in said) == [1, 1]
    assert sum("waiting for it" in err for _, err in said) == 1


def test_a_setup_for_development_also_serves_plain_use(ready: Path, tmp_path: Path) -> None:
    checkout = tmp_path / "dev"
    shutil.copytree(ready, checkout, symlinks=True)
    done = launch(checkout, FERROTYPE_SETUP="dev")
    assert (done.returncode, done.stdout) == (0, "")
    assert launch(checkout, FERROTYPE_SETUP="dev").stderr == ""
    assert launch(checkout).stderr == ""


# ---------------------------------------------------------------------- machines that lack something


def only_these(folder: Path, **programs: str) -> str:
    """A PATH with the few tools the launcher calls, and shell scripts in the place of some programs."""
    folder.mkdir()
    for tool in ("sh", "readlink", "cmp", "cat", "mkdir", "rm", "cp", "mv", "flock", "env"):
        found = shutil.which(tool)
        assert found is not None
        (folder / tool).symlink_to(found)
    for name, script in programs.items():
        program = folder / name.replace("_", ".")
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    return str(folder)


# What the launcher asks of a Python before it takes it, answered by one that is too old and by one without ensurepip.
TOO_OLD = 'case "$2" in *print*) echo 3.9 ;; *) exit 1 ;; esac'
BARE = 'case "$2" in *print*) echo 3.11 ;; *ensurepip*) [ -e "$(dirname "$0")/added" ] || exit 1 ;; *) exit 0 ;; esac'


@pytest.mark.parametrize(
    ("programs", "code", "sentence"),
    [
        ({}, 6, "needs Python 3.11 or newer and found none"),
        ({"python3": TOO_OLD}, 6, "found only Python 3.9"),
        ({"python3_11": BARE}, 6, "no ensurepip"),
        ({"python3_11": BARE, "apt_get": "", "id": "echo 1000"}, 6, "run 'sudo apt-get install python3.11-venv'"),
    ],
)
def test_what_is_missing_is_one_sentence(tmp_path: Path, programs: dict[str, str], code: int, sentence: str) -> None:
    checkout = make_checkout(tmp_path / "new")
    scripts = {("apt-get" if name == "apt_get" else name): script for name, script in programs.items()}
    done = launch(checkout, PATH=only_these(tmp_path / "bin", **scripts))
    assert done.returncode == code
    assert done.stdout == ""
    assert sentence in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 2
    assert not (checkout / ".venv/stamp").exists()


def test_root_on_debian_gets_the_missing_module_from_apt(tmp_path: Path) -> None:
    checkout = make_checkout(tmp_path / "new")
    asked = tmp_path / "asked"
    apt = f'echo "$@" >>{asked}; case "$*" in *install*) : >"$(dirname "$0")/added" ;; esac'
    programs = {"python3_11": BARE, "apt-get": apt, "id": "echo 0"}
    path = only_these(tmp_path / "bin", **programs)
    (tmp_path / "bin/dirname").symlink_to(str(shutil.which("dirname")))
    done = launch(checkout, PATH=path)
    lines = asked.read_text().splitlines()
    assert lines[0].endswith("update")
    assert lines[1].endswith("install --no-install-recommends python3.11-venv")
    assert "installing python3.11-venv with apt-get" in done.stderr
    assert done.returncode == 6  # this Python makes no environment after all, and that is not passed over


# ---------------------------------------------------------------------- what a checkout holds


def test_the_programs_of_the_checkout_are_executable_and_parse() -> None:
    for name, shell in (("ferrotype", "sh"), ("test", "bash"), (".ci/run", "sh"), ("bench/run", "sh")):
        program = ROOT / name
        assert os.access(program, os.X_OK), name
        need(shell)
        subprocess.run([shell, "-n", program], check=True)


def test_continuous_integration_runs_the_tests_and_nothing_else(tmp_path: Path) -> None:
    (tmp_path / ".ci").mkdir()
    shutil.copy2(ROOT / ".ci/run", tmp_path / ".ci/run")
    (tmp_path / "test").write_text('#!/bin/sh\necho "test $*"\nexit 7\n')
    (tmp_path / "test").chmod(0o755)
    done = subprocess.run([tmp_path / ".ci/run", "-k", "x"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (7, "test -k x\n", "")


def test_a_release_holds_the_specification_and_the_second_reader(tmp_path: Path) -> None:
    pytest.importorskip("setuptools")
    checkout = tmp_path / "checkout"
    unneeded = shutil.ignore_patterns(".venv", ".git", "tests", "bench", "*.egg-info", ".*_cache", "__pycache__")
    shutil.copytree(ROOT, checkout, ignore=unneeded)
    build = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"
    subprocess.run([sys.executable, "-c", build, tmp_path / "dist"], cwd=checkout, capture_output=True, check=True)
    (release,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(release) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"docs/format.md", "tools/read_ferro.py", "LICENSE"} <= names
    assert any(name.startswith("src/ferrotype/cli/") for name in names)


def test_the_second_reader_stands_alone() -> None:
    text = (ROOT / "tools/read_ferro.py").read_text()
    assert len(text.splitlines()) < 450
    assert not re.search(r"^\s*(import|from)\s+(ferrotype|tests)\b", text, re.MULTILINE)


def test_the_licence_is_whole() -> None:
    text = (ROOT / "LICENSE").read_text()
    assert "Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
