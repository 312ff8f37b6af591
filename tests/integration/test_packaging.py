"""The wheel is what users install: it is complete, typed, and works without extras."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

LOCAL_PROGRAM = """
import asyncio, sys
import wove
from wove import ExecutorRuntime, MissingDispatchFeatureError

async def main():
    async with ExecutorRuntime({"here": {"executor": "local"}}) as runtime:
        assert await runtime["here"].run(lambda a, b: a + b, 40, b=2) == 42
    try:
        async with ExecutorRuntime({"fleet": {"executor": "celery", "executor_config": {"broker_url": "redis://x"}}}):
            pass
    except MissingDispatchFeatureError as exc:
        assert 'pip install "wove[celery]"' in str(exc), exc

asyncio.run(main())
print(wove.__file__)
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel, built from a copy, so that nothing is written into the sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("wove", "adapters", "callback_server"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source / name)
    # The build's own tools come from this environment: tests need no network.
    subprocess.run(
        [
            sys.executable,
            "-m",
            "build",
            "--wheel",
            "--no-isolation",
            "--outdir",
            str(source / "dist"),
            str(source),
        ],
        check=True,
        capture_output=True,
    )
    (built,) = (source / "dist").glob("wove-*.whl")
    return built


def test_the_wheel_holds_every_module_under_its_import_name(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    expected = {
        f"{package}/{path.relative_to(ROOT / folder)}"
        for folder, package in (
            ("wove", "wove"),
            ("adapters", "wove/adapters"),
            ("callback_server", "wove/callback_server"),
        )
        for path in (ROOT / folder).rglob("*.py")
    }
    modules = {name for name in names if name.endswith(".py")}
    assert modules == expected
    assert "wove/py.typed" in names


def test_the_unit_tests_pass_against_the_unpacked_wheel(wheel: Path, tmp_path: Path) -> None:
    unpacked, tests = tmp_path / "unpacked", tmp_path / "tests"
    zipfile.ZipFile(wheel).extractall(unpacked)
    shutil.copytree(ROOT / "tests" / "unit", tests / "unit", ignore=shutil.ignore_patterns("__pycache__"))
    (tests / "unit" / "test_import_rules.py").unlink(missing_ok=True)  # reads the sources
    shutil.copytree(
        ROOT / "tests" / "support", tests / "support", ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "tests" / "conftest.py", tests / "conftest.py")
    shutil.copy(ROOT / "pyproject.toml", tmp_path / "pyproject.toml")
    probe = "import wove, wove.adapters, wove.callback_server; print(wove.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(unpacked), "PYTHONSAFEPATH": "1"}
    where = subprocess.run(
        [sys.executable, "-c", probe],
        env=environment,
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    assert where.stdout.startswith(str(unpacked))
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/unit"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stdout[-5000:] + result.stderr[-2000:]


def test_the_bare_install_runs_the_local_executor(wheel: Path, tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", with_pip=False)
    (site,) = (tmp_path / "bare").glob("lib/python*/site-packages")
    zipfile.ZipFile(wheel).extractall(site)
    result = subprocess.run(
        [str(tmp_path / "bare" / "bin" / "python"), "-W", "error", "-c", LOCAL_PROGRAM],
        cwd=tmp_path,
        env={name: value for name, value in os.environ.items() if name != "PYTHONPATH"},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().startswith(str(site))
