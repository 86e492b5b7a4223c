import pandas as pd
import pytest
import torch
from torch import nn

from lqf_lightning.analysis.curation import Request, curate_problem
from lqf_lightning.analysis.run_problem import HeldOut, RunProblem
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.information.reweight import Reweighting
from lqf_lightning.linear import Kernel, QuadraticProblem
from lqf_lightning.methods.solvers.training_table import TrainingTable


def separable():
    """Four samples of two classes that a linear model tells apart, and two held-out ones."""
    rows = torch.tensor([[1.0, 0.2], [1.0, -0.1], [-1.0, 0.1], [-1.0, 0.3]]).double()
    label, others = torch.tensor([0, 0, 1, 1]), torch.tensor([[1.0, 0.0], [-1.0, 0.0]]).double()
    target, index = 4.0 * nn.functional.one_hot(label, 2).double(), torch.arange(4)
    problem = QuadraticProblem(torch.zeros(4, 2).double(), target, ridge=0.1)
    method = nn.Module()
    method.target_scale = 4.0
    return RunProblem(
        method,
        TrainingTable(index, label, problem.initial, index, shard=None),
        Kernel({"all": (rows @ rows.T)[None]}, outputs=2, form="trace"),
        {"all": 1.0},
        problem,
        HeldOut(torch.arange(4, 6), torch.tensor([0, 1]), torch.zeros(2, 2).double()),
        Kernel({"all": (others @ rows.T)[None]}, outputs=2, form="trace"),
    ), Manifest.build([("train", f"{number}.png", int(k)) for number, k in enumerate(label)], ["a", "b"])


@pytest.mark.parametrize("by", ["validation", "leave_one_out"])
@pytest.mark.parametrize("task", ["detrimental", "reweight"])
def test_a_loss_that_nothing_can_lower_says_nothing_about_samples(task, by):
    """At the best temperature the cross-entropy is 0 where all held-out predictions are right."""
    run, manifest = separable()
    with pytest.raises(ValueError, match="Set loss=squared"):
        curate_problem(run, manifest, Request(task, by=by, loss="cross_entropy"))


def test_weights_that_empty_a_class_are_refused(monkeypatch):
    run, manifest = separable()
    emptied = Reweighting(torch.tensor([1.0, 2.0, 0.0, 0.0]), [1.0, 0.5], torch.zeros(4))
    monkeypatch.setattr("lqf_lightning.analysis.curation.reweight", lambda *_, **__: emptied)
    with pytest.raises(ValueError, match=r"no sample of b .* Set reweight\.length=0\.1"):
        curate_problem(run, manifest, Request("reweight"))


def test_detrimental_samples_are_not_a_whole_class():
    run, manifest = separable()
    with pytest.raises(ValueError, match=r"Set detrimental\.share=0\.1"):
        curate_problem(run, manifest, Request("detrimental", share=1.0))
    found = curate_problem(run, manifest, Request("detrimental", share=0.25))
    assert set(pd.concat(found.tables.values())["index"]) == {0, 1, 2, 3}
