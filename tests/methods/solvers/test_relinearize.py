import logging

import pytest
import torch
from torch.func import functional_call, jacrev
from torch.nn.functional import one_hot

from lqf_lightning.analysis.linear_twin import refuse_method
from lqf_lightning.analysis.verify_linear import refuse_linear
from methods.dense_lqf import ALPHA, build, flat, outputs_at_start, penalized
from methods.solvers.runs import Note, solve
from methods.tensors import draw

SAMPLES = 12
SOLVERS = pytest.mark.parametrize("solver", ["kernel", "cg"])


def expanded(solver, **options):
    return build(**{"solver": solver, "ridge": 0.05, "relinearize": 2, "tolerance": 1e-9} | options)


def optimum(method):
    """Of the expansion around the network as it is now, by its dense Jacobian."""
    images, label = draw(SAMPLES)
    model, names = method.linearized.model, list(method.linearized.deltas)
    weights = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda own: functional_call(model, weights | own, (images,)))({n: weights[n] for n in names})
    rows = torch.cat([blocks[name].flatten(2) for name in names], 2).flatten(0, 1)
    error = (ALPHA * one_hot(label, 3).double() - model(images).detach()).flatten()
    return torch.linalg.solve(rows.T @ rows + SAMPLES * method.ridge * torch.diag(penalized(names)), rows.T @ error)


def squares(outputs):
    return float((outputs.detach() - ALPHA * one_hot(draw(SAMPLES)[1], 3)).square().sum())


@SOLVERS
def test_the_last_expansion_is_solved_exactly_and_fits_better_than_the_first(solver):
    method, plain = expanded(solver), expanded(solver, relinearize=0)
    for one in (method, plain):
        solve(one, samples=SAMPLES)
    wanted = optimum(method)
    assert method.expansions == 2
    assert (flat(method.linearized.deltas) - wanted).norm() < 1e-7 * wanted.norm()
    images = draw(SAMPLES)[0]
    assert squares(method.linearized.model(images)) < 0.7 * squares(outputs_at_start(images))
    assert squares(method(images)) < squares(plain(images))


@SOLVERS
def test_the_last_epoch_expands_no_more_since_nothing_would_be_solved_there(solver, caplog):
    note, plain = Note(), expanded(solver, relinearize=0)
    enough = solve(plain, samples=SAMPLES).current_epoch
    method = expanded(solver)
    solve(method, samples=SAMPLES, epochs=enough, callbacks=[note])
    assert method.expansions == 0
    assert any("after 0 of 2 expansions" in text and "trainer.max_epochs higher" in text for text in caplog.messages)
    assert torch.equal(flat(method.linearized.deltas), flat(plain.linearized.deltas))
    assert float(flat(method.linearized.deltas).norm()) > 0


@SOLVERS
@pytest.mark.parametrize("past", [False, True])
def test_an_interrupted_run_makes_the_expansions_that_are_left(solver, past, tmp_path):
    # At the end of the epoch that arrives; before the method has seen it end (as a checkpoint after validation), or
    # after it has moved the start.
    epochs = solve(expanded(solver, relinearize=0), samples=SAMPLES).current_epoch
    first = expanded(solver, relinearize=2 if past else 0)
    solve(first, samples=SAMPLES, epochs=epochs + past).save_checkpoint(tmp_path / "run.ckpt")
    assert first.expansions == int(past)
    second = expanded(solver)
    solve(second, samples=SAMPLES, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    wanted = optimum(second)
    assert second.expansions == 2
    assert (flat(second.linearized.deltas) - wanted).norm() < 1e-7 * wanted.norm()


def test_every_expansion_keeps_its_own_kernel(tmp_path):
    method = expanded("kernel", kernel_folder=str(tmp_path))
    solve(method, samples=SAMPLES)
    wanted = optimum(method)
    assert (flat(method.linearized.deltas) - wanted).norm() < 1e-9 * wanted.norm()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"expansion1", "expansion2"}


@pytest.mark.parametrize("refuse", [refuse_method, refuse_linear])
def test_what_needs_a_start_that_has_seen_no_label_is_refused(refuse):
    refuse(expanded("cg", relinearize=0))
    with pytest.raises(ValueError, match=r"relinearize=2 \(0 times so far\).*Train with method\.relinearize=0"):
        refuse(expanded("cg"))


def test_steps_are_told(caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    solve(expanded("kernel"), samples=SAMPLES)
    assert any("expansion 1 of 2, after 0.5 of the way" in text for text in caplog.messages)
