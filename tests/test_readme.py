"""The README does what it says: its commands, its callback, its Python, its tables."""

import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from tiny import compose, tiny_overrides

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", TEXT, flags=re.DOTALL)
FILES = dict(re.findall(r"^`([\w/.]+)`\n\n```\w+\n(.*?)```", TEXT, flags=re.DOTALL | re.MULTILINE))
COMMANDS = [
    line.partition("  #")[0].strip()
    for language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("lqf-")
]


@pytest.fixture
def their_package(tmp_path):
    """The outside package of the section "Write a callback", file by file as printed."""
    assert set(FILES) == {
        "our_callbacks/hard_samples.py",
        "our_callbacks/conf/callbacks/hard_samples.yaml",
        "pyproject.toml",
    }
    for name, content in FILES.items():
        path = tmp_path / "theirs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    for package in ("our_callbacks", "our_callbacks/conf"):
        (tmp_path / "theirs" / package / "__init__.py").touch()
    return tmp_path / "theirs"


def hard_samples(folder):
    return json.loads((folder / "hard_samples.json").read_text())


RANKS = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2", "trainer.max_epochs=1"]
CHOICE = "callbacks=[learning_curves,hard_samples]"


def test_callback_is_chosen_by_config_dir_on_two_ranks(console, tmp_path, their_package, folder_of_shapes):
    shown = next(command for command in COMMANDS if "--config-dir our_callbacks/conf" in command)
    assert shown.split()[-1] == CHOICE
    environment = {"PYTHONPATH": str(their_package)}
    options = ["--config-dir", their_package / "our_callbacks" / "conf", CHOICE, *tiny_overrides(folder_of_shapes)]
    options += ["method=linear_probe", "logger=csv"]
    console("lqf-train", *options, *RANKS, "hydra.run.dir=two", env=environment)
    console("lqf-train", *options, "trainer.max_epochs=1", "hydra.run.dir=one", env=environment)
    one, two = hard_samples(tmp_path / "one"), hard_samples(tmp_path / "two")
    assert len(one) == 5
    assert [row["confidence"] for row in two] == pytest.approx([row["confidence"] for row in one], rel=1e-3)
    assert len({row["index"] for row in two}) == 5


def test_callback_is_found_by_its_entry_point_on_two_ranks(console, tmp_path, their_package, folder_of_shapes):
    site = tmp_path / "site"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--target",
        site,
        their_package,
    ]
    subprocess.run(install, check=True, capture_output=True)
    options = [CHOICE, *tiny_overrides(folder_of_shapes), "method=linear_probe", "logger=csv", *RANKS]
    console("lqf-train", *options, "hydra.run.dir=run", env={"PYTHONPATH": str(site)})
    assert len(hard_samples(tmp_path / "run")) == 5
    without = console("lqf-train", *options, "hydra.run.dir=none", check=False)
    assert without.returncode != 0
    assert "hard_samples" in without.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_compose(command):
    program, *words = shlex.split(command)
    if "--help" in words or "--config-dir" in words:
        pytest.skip("needs files of the user's, or prints; the tests above and below run it")
    multirun = "-m" in words
    overrides = [word for word in words if word != "-m"]
    if multirun:  # the first value of each swept key
        pairs = [override.partition("=")[::2] for override in overrides]
        overrides = [f"{key}={'0' if value.startswith('range(') else value.split(',')[0]}" for key, value in pairs]
    folder = [] if program == "lqf-export" else ["paths.output_dir=out"]
    config = compose(
        *overrides,
        *folder,
        name=program.removeprefix("lqf-"),
    )
    assert config


def test_help_lists_the_groups(console):
    text = console("lqf-train", "--help").stdout
    for group in ("backbone", "callbacks", "data", "method", "trainer"):
        assert re.search(rf"^{group}: ", text, flags=re.MULTILINE), group


def test_groups_of_the_table_are_those_of_the_configuration():
    table = TEXT[TEXT.index("| group |") : TEXT.index("`batch_size` is that")]
    for group in ("data", "backbone", "method", "trainer"):
        (row,) = [line for line in table.splitlines() if line.startswith(f"| `{group}` |")]
        shown = set(re.findall(r"`(\w+)`", row.split("|")[2]))
        files = {path.stem for path in (ROOT / "conf" / group).glob("*.yaml") if not path.stem.startswith("_")}
        assert shown == files


def test_quick_start_with_real_weights_beats_its_probe(console, tmp_path):
    """The main command on a third of the digits at half the size: real weights, offline, tracked."""
    quick = ["data.image_size=32", "data.subset_ratio=0.3", "trainer.max_epochs=4", "hydra.run.dir=run"]
    done = console("lqf-train", *quick)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["test/linear_probe_acc"] > 0.7
    assert metrics["test/acc"] > metrics["test/linear_probe_acc"]  # the point of LQF
    for text in ("linear probe on the same features", "Run folder", "confusion.png", "wandb sync", "Next:"):
        assert text in done.stdout


def test_python_examples_run():
    engine, start = [block for language, block in BLOCKS if language == "python" and "LinearizedModel" in block]
    for example in (engine, start):
        command = [sys.executable, "-c", example]
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=os.environ)
        assert done.returncode == 0, done.stderr
        if example is engine:
            iterated, exact = (float(g) for g in re.findall(r"Certificate\(relative_gradient=([^,]+)", done.stdout))
            assert exact < 1e-10 < iterated <= 1e-4


def test_tables_are_those_of_the_committed_results(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    spec = importlib.util.spec_from_file_location("readme_tables", ROOT / "benchmarks" / "readme_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.render(TEXT) == TEXT
    for name in ("digits", "dtd10", "gtsrb43", "cars50", "cifar10"):
        assert re.search(rf"^\| {name} \|", TEXT, flags=re.MULTILINE), name


def test_test_command_is_that_of_ci():
    (command,) = [line for line in TEXT.splitlines() if line.endswith("bin/pytest")]
    plain = (ROOT / ".ci" / "run").read_text().replace("install -q ", "install ")
    assert command in plain


@pytest.mark.parametrize("script", ["step_cost", "accuracy", "ema_update"])
def test_benchmarks_run_and_end_with_one_json_line(script, tmp_path):
    command = [sys.executable, ROOT / "benchmarks" / f"{script}.py", "--quick", "--output", tmp_path / "out.json"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report == json.loads((tmp_path / "out.json").read_text())
    assert {"benchmark", "cases", "claims"} <= set(report)
    committed = json.loads((ROOT / "benchmarks" / "results" / f"{script}.json").read_text())
    assert committed["quick"] is False
    assert len(committed["claims"]) >= 2
    for claim in committed["claims"]:
        assert set(claim) == {"claim", "value", "target", "holds"}
        assert len(claim["claim"]) > 10
        assert claim["holds"] is (claim["value"] <= claim["target"]) is True
