import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# From the bottom up. `linear` needs nothing but torch, so it lies below the backbones that it linearizes.
STRATA = [
    "linear", "backbones", "teachers", "congruence", "information", "forgetting", "data", "methods", "analysis",
    "callbacks", "entry",
]  # fmt: skip
ENTRY = {
    "train",
    "evaluate",
    "compare",
    "export",
    "sync_batch_norm",
    "_launch",
    "_instantiate",
    "_plugins",
    "references",
    "resume",
    "run_folder",
}
ENTRY |= {"tracking", "summary", "comparison", "weights_origin"}
ENTRY |= {"score", "curate", "predict", "finished_run", "memorization_report", "memorization_runs", "sample_files"}
ENTRY |= {"forget", "deletion", "adapt", "adapted_file", "fitted_head", "starting_head"}
ANYWHERE = {"progress", "__init__"}
SHELL_ONLY = {"hydra", "omegaconf", "wandb"}


def files():
    found = [*(ROOT / "lqf_lightning").rglob("*.py"), *(ROOT / "callbacks").rglob("*.py")]
    return [path for path in found if path.stem not in ANYWHERE or path.parent.name != "lqf_lightning"]


def stratum(path):
    parts = path.relative_to(ROOT).parts
    if parts[0] == "callbacks":
        return "callbacks"
    if len(parts) == 2:
        assert path.stem in ENTRY, f"{path.name} belongs to no stratum: place it in STRATA or ENTRY"
        return "entry"
    return "entry" if parts[1] in ENTRY else parts[1]


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield "." * node.level + (node.module or "")


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_imports_point_down(path):
    own = STRATA.index(stratum(path))
    for name in imports(path):
        parts = name.split(".")
        if parts[0] == "lqf_lightning" and len(parts) > 1 and parts[1] not in ANYWHERE:
            target = parts[1] if parts[1] in STRATA else "entry"
            assert STRATA.index(target) <= own, f"{path.name} imports {name}, which lies above it"
            assert target != "callbacks" or own == STRATA.index("callbacks"), f"nothing imports callbacks: {path.name}"


@pytest.mark.parametrize("path", files(), ids=lambda p: str(p.relative_to(ROOT)))
def test_libraries_stay_in_their_stratum(path):
    own = stratum(path)
    roots = {name.split(".")[0] for name in imports(path)}
    if own != "entry":
        assert not roots & SHELL_ONLY, f"{path.name} imports {roots & SHELL_ONLY}"
    if own == "linear":
        foreign = roots - {"torch", "lqf_lightning"} - set(__import__("sys").stdlib_module_names)
        assert not foreign, f"linear needs nothing but torch, {path.name} imports {foreign}"
    if own == "backbones":
        assert not roots & {"lightning", "torchmetrics"}
