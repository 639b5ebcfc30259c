"""The folders at the top level never shadow installed packages, and built distributions hold every file of the package."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
LINKS = ("configs", "kernels", "sample", "tokenizers", "train")
SOURCES = ("pyproject.toml", "README.md", "LICENSE", "vargen", *LINKS)


def run_python(code: str, cwd: Path) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True).stdout.strip()


def package_files() -> dict[str, bytes]:
    """Every file that the package must hold, by its path inside a wheel."""
    files = {}
    for folder in (ROOT / "vargen", *(ROOT / "vargen" / link for link in LINKS)):
        for path in folder.rglob("*"):
            kept = (
                path.suffix == ".py" or path.is_relative_to(ROOT / "vargen/configs") or path.is_relative_to(ROOT / "vargen/assets")
            )
            if path.is_file() and kept and "__pycache__" not in path.parts:
                files[str(path.relative_to(ROOT))] = path.read_bytes()
    return files


@pytest.fixture(scope="module")
def distributions(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A sdist of a copy of the repository, and a wheel built from that sdist alone."""
    work = tmp_path_factory.mktemp("build")
    copy = work / "copy"
    copy.mkdir()
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, copy / name)
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(work / "dist"), str(copy)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    (sdist,), (wheel,) = (work / "dist").glob("*.tar.gz"), (work / "dist").glob("*.whl")
    return sdist, wheel


def test_code_folders_have_no_init_file() -> None:
    for link in LINKS:
        assert not (ROOT / link / "__init__.py").exists(), "a package of this name would hide an installed one"
        assert (ROOT / "vargen" / link).is_symlink()
        assert (ROOT / "vargen" / link).resolve() == ROOT / link


def test_installed_tokenizers_is_not_shadowed(tmp_path: Path) -> None:
    code = "import tokenizers; print(tokenizers.__file__); tokenizers.Tokenizer"
    inside, outside = run_python(code, ROOT), run_python(code, tmp_path)
    assert inside == outside
    assert not Path(inside).is_relative_to(ROOT / "tokenizers")


def test_transformers_takes_no_folder_of_ours_for_a_package() -> None:
    assert run_python("from transformers.utils import is_kernels_available as f; print(f())", ROOT) == run_python(
        "from transformers.utils import is_kernels_available as f; print(f())", Path("/")
    )


def test_wheel_holds_every_file(distributions: tuple[Path, Path]) -> None:
    expected = package_files()
    with zipfile.ZipFile(distributions[1]) as wheel:
        held = {name: wheel.read(name) for name in wheel.namelist() if name.startswith("vargen/")}
        top_level = {name.split("/")[0] for name in wheel.namelist()}
    assert sorted(held) == sorted(expected)
    assert held == expected
    assert {name for name in top_level if not name.endswith(".dist-info")} == {"vargen"}


def test_sdist_holds_real_files(distributions: tuple[Path, Path]) -> None:
    with tarfile.open(distributions[0]) as sdist:
        members = {member.name.split("/", 1)[-1]: member for member in sdist.getmembers()}
        assert not [name for name, member in members.items() if member.issym() or member.islnk()]
    assert set(package_files()) <= set(members)
