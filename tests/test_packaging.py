"""What users install: every file inside exactly once, and nothing else in the global namespace."""

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SETTINGS = tomllib.loads((ROOT / "pyproject.toml").read_text())
MAPPED = {"callbacks": "lqf_lightning/callbacks", "conf": "lqf_lightning/conf"}


def shipped():
    """Source files that belong into the wheel, by their path inside it."""
    for folder in ("lqf_lightning", "callbacks", "conf"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in {".py", ".yaml", ".typed"} and "__pycache__" not in path.parts:
                inside = path.relative_to(ROOT).as_posix()
                top, _, rest = inside.partition("/")
                yield f"{MAPPED.get(top, top)}/{rest}"


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    tracked = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    for name in filter(None, tracked):
        if (ROOT / name).is_file():
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", folder, source]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "would be ignored" not in done.stderr
    (path,) = folder.glob("*.whl")
    return path


def test_packages_listed_are_those_in_the_tree():
    listed = set(SETTINGS["tool"]["setuptools"]["packages"])
    folders = {Path(name).parent.as_posix().replace("/", ".") for name in shipped()}
    assert listed == folders


def test_wheel_holds_every_file_once_and_nothing_else(wheel):
    counts = Counter(n for n in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in n)
    assert set(counts) == set(shipped())
    assert set(counts.values()) == {1}


def test_installed_wheel_composes_and_runs_from_anywhere(wheel, tmp_path):
    """The wheel alone, unpacked beside nothing of the repository, finds its configurations and callbacks."""
    site = tmp_path / "site"
    zipfile.ZipFile(wheel).extractall(site)
    code = (
        "import lqf_lightning, lqf_lightning.callbacks, sys; from pathlib import Path;"
        f"assert Path(lqf_lightning.callbacks.__file__).is_relative_to(Path({str(site)!r})), lqf_lightning.callbacks;"
        "from lqf_lightning.train import main;"
        "sys.argv = ['lqf-train', '--cfg', 'job', 'method=finetune', 'callbacks=[learning_curves]']; main()"
    )
    environment = {**os.environ, "PYTHONPATH": str(site)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert "lqf_lightning.methods.Finetune" in done.stdout
    assert "lqf_lightning.callbacks.LearningCurves" in done.stdout


def test_editable_install_is_live_and_leaves_the_namespace_alone(tmp_path):
    code = (
        "import importlib.util as u, lqf_lightning.callbacks.learning_curves as m; print(m.__file__);"
        "print([n for n in ('callbacks', 'conf', 'tests', 'notebooks') if u.find_spec(n)])"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    file, polluted = done.stdout.splitlines()
    assert Path(file).samefile(ROOT / "callbacks" / "learning_curves.py")
    assert polluted == "[]"


def test_importing_the_package_is_light():
    code = "import sys, lqf_lightning; print(sorted({'torch', 'lightning', 'wandb', 'hydra'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_constraints_pin_every_direct_dependency():
    def normal(name):
        return re.split(r"[\[<>=~! ]", name)[0].lower().replace("_", "-")

    pinned = {normal(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line}
    project = SETTINGS["project"]
    wanted = project["dependencies"] + [d for extra in project["optional-dependencies"].values() for d in extra]
    assert {normal(d) for d in wanted} - {"lqf-lightning"} <= pinned
