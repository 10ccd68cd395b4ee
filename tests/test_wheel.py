"""What is shipped is complete: a wheel, installed into an empty folder, finds its presets."""

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from egtrain.config.files import preset_names

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_an_installed_wheel_finds_its_presets(tmp_path: Path) -> None:
    build = [
        sys.executable,
        "-m",
        "build",
        "--wheel",
        "--no-isolation",
        "--outdir",
        str(tmp_path),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True)
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        # What pip does with a wheel of plain Python; the dependencies are those of this
        # environment.
        archive.extractall(tmp_path / "site")
    assert "egtrain/py.typed" in names
    assert not [name for name in names if name.startswith(("tests/", "docs/"))]
    listed = subprocess.run(
        [
            sys.executable,
            "-P",
            "-c",
            "import egtrain.config.files as c; print(c.__file__, *c.preset_names(), sep='\\n')",
        ],
        check=True,
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path / "site")},
    ).stdout.splitlines()
    assert listed[0].startswith(str(tmp_path / "site"))
    assert listed[1:] == preset_names()
