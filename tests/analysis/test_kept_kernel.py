import pytest
import torch

from analysis.test_scrub_linear import ALL, COHORT, EXACT, MU, RETAINED, SAMPLES, apart, attach, dense, write
from linear.problems import SCALES, make_toy
from lqf_lightning.analysis.kept_kernel import KeptKernel
from lqf_lightning.analysis.scrub_linear import scrub_linear
from lqf_lightning.linear import DualFactor, Kernel
from lqf_lightning.linear.leave_group_out import remove_group
from lqf_lightning.linear.restrict import restrict_problem
from methods.dense_lqf import build, flat
from methods.tensors import TensorData, build_trainer, draw, fit_on


def random_kernel(outputs=2, samples=5, groups=("stem", "head")):
    draws = torch.randn(2, 1, outputs * samples, outputs * samples, generator=torch.Generator().manual_seed(0))
    return KeptKernel(dict(zip(groups, draws, strict=True)), outputs, torch.tensor([2, 3, 5, 8, 9])[:samples])


def test_forgetting_samples_cuts_out_their_rows_and_columns_of_all_outputs():
    kept = random_kernel()
    left = kept.without(torch.tensor([3, 9, 77]))
    assert left.index.tolist() == [2, 5, 8]
    rows = [0, 1, 4, 5, 6, 7]
    for name, matrix in kept.groups.items():
        assert torch.equal(left.groups[name][0], matrix[0][rows][:, rows])
        assert left.groups[name].untyped_storage().nbytes() == 4 * 36  # no view of what is forgotten
    assert torch.equal(kept.only(torch.tensor([8, 2, 5])).groups["stem"], left.groups["stem"])


def test_what_is_written_is_read_and_holds_nothing_of_the_forgotten(tmp_path):
    kept = random_kernel()
    assert KeptKernel.read(tmp_path) is None
    file = kept.without(torch.tensor([3])).write(tmp_path / "new")
    back = KeptKernel.read(tmp_path / "new")
    assert back.index.tolist() == [2, 5, 8, 9]
    assert back.outputs == 2
    assert list(back.groups) == ["head", "stem"] or list(back.groups) == ["stem", "head"]
    content = file.read_bytes()
    for name, matrix in kept.groups.items():
        assert torch.equal(back.groups[name], kept.without(torch.tensor([3])).groups[name])
        assert matrix[0, 0, 0].numpy().tobytes() in content
        for forgotten in (matrix[0, 2:4].flatten(), matrix[0, :, 2:4].flatten()):
            assert not any(number.numpy().tobytes() in content for number in forgotten)


def test_a_kernel_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    from lqf_lightning.analysis import kept_kernel

    kept = random_kernel()
    kept.write(tmp_path)

    def full_disk(tensors, file, **_):
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr(kept_kernel, "save_file", full_disk)
    with pytest.raises(OSError, match="no space"):
        kept.without(torch.tensor([3])).write(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["train_kernel.safetensors"]
    assert torch.equal(KeptKernel.read(tmp_path).index, kept.index)


def test_parts_that_do_not_fit_are_refused():
    kept = random_kernel()
    with pytest.raises(ValueError, match=r"matrices \(1, 8, 8\), got \{'stem': \(1, 10, 10\)"):
        KeptKernel(kept.groups, 2, kept.index[:4])
    with pytest.raises(ValueError, match="ascending"):
        KeptKernel(kept.groups, 2, kept.index.flip(0))
    with pytest.raises(ValueError, match="does not have sample 4"):
        kept.only(torch.tensor([2, 4]))


def trained_with_a_folder(folder, **options):
    method = build(ridge=MU, solver="kernel", kernel_folder=str(folder), **options)
    fit_on(build_trainer(1), method, TensorData(*draw(SAMPLES), 4))
    return method


@pytest.mark.parametrize("factors", [None, {"stem": 2.0, "head": 0.3}])
def test_requests_on_a_run_use_the_kernel_that_its_training_kept(factors, tmp_path, monkeypatch):
    method = trained_with_a_folder(tmp_path / "parts", group_ridge=factors)
    kept = KeptKernel.from_parts(tmp_path / "parts", torch.arange(SAMPLES))
    assert len(kept.groups) == (1 if factors is None else 3)
    from lqf_lightning.analysis import kernel_scrub

    monkeypatch.setattr(kernel_scrub, "assemble_kernel", lambda *_, **__: pytest.fail("the kernel is there"))
    left = list(ALL)
    for number, cohort in enumerate(([4], COHORT)):
        left = [sample for sample in left if sample not in cohort]
        kept = kept.without(torch.tensor(cohort))
        kept.write(tmp_path / str(number))
        kept = KeptKernel.read(tmp_path / str(number))
        found = scrub_linear(attach(method, left), kernel=kept, tolerance=EXACT)
        assert found.name == "kernel"
        assert apart(flat(found.weights), dense(left, method, factors).optimum()) < 1e-9
        assert found.passes == pytest.approx((1 + 5 + 3 + 3) / 5)
        write(method, flat(found.weights))
    assert left == RETAINED


def test_a_kernel_of_all_samples_serves_as_well_as_that_of_those_left(tmp_path):
    method = attach(trained_with_a_folder(tmp_path), RETAINED)
    whole = KeptKernel.from_parts(tmp_path, torch.arange(SAMPLES))
    found = [
        scrub_linear(method, kernel=kernel, tolerance=EXACT) for kernel in (whole, whole.without(torch.tensor(COHORT)))
    ]
    assert torch.equal(flat(found[0].weights), flat(found[1].weights))


def test_parts_of_other_samples_are_refused_and_missing_ones_are_none(tmp_path):
    assert KeptKernel.from_parts(tmp_path / "nothing", torch.arange(SAMPLES)) is None
    assert KeptKernel.from_parts(tmp_path, torch.arange(SAMPLES)) is None
    method = trained_with_a_folder(tmp_path)
    with pytest.raises(ValueError, match=r"a kernel of 11 samples, the run has trained on 10.*solver=newton"):
        KeptKernel.from_parts(tmp_path, torch.arange(SAMPLES - 1))
    odd = KeptKernel({"ridge x 3": torch.eye(3 * SAMPLES)[None]}, 3, torch.arange(SAMPLES))
    with pytest.raises(ValueError, match=r"parts \['ridge x 3'\].*an assembly was interrupted"):
        scrub_linear(attach(method, RETAINED), kernel=odd)


@pytest.mark.parametrize("intercept", [True, False])
def test_at_a_fixed_ridge_a_downdate_is_the_factorization_of_those_left(intercept):
    toy = make_toy(intercept=intercept)
    keep, gone = torch.tensor([0, 2, 3, 5, 6, 8]), torch.tensor([1, 4, 7])
    factor = DualFactor(toy.problem, toy.kernel)
    downdated = (factor.solution().coefficients - remove_group(factor, gone).coefficients)[keep]
    rows = (3 * keep[:, None] + torch.arange(3)).flatten()
    groups = {name: matrix[:, rows][:, :, rows] for name, matrix in toy.kernel.groups.items()}
    anew = DualFactor(restrict_problem(toy.problem, keep), Kernel(groups, 3)).solution()
    assert torch.allclose(downdated, anew.coefficients, rtol=1e-10, atol=1e-11)


def test_the_block_form_of_the_change_has_its_sign():
    # w(retained) - w(all) = -P J_f^T M V at a fixed sum-form ridge, with residuals y - f0.
    toy = make_toy(samples=7, ridge=0.7)
    kept = KeptKernel(toy.kernel.groups, 3, torch.arange(7))
    keep, gone = torch.tensor([0, 1, 3, 4, 6]), torch.tensor([2, 5])
    rows = toy.features[0]
    error = toy.problem.residual
    weights = rows.flatten(0, 1).T @ DualFactor(toy.problem, kept.kernel, SCALES).solution().coefficients.flatten()
    left = DualFactor(restrict_problem(toy.problem, keep), kept.without(gone).kernel, SCALES).solution()
    left = rows[keep].flatten(0, 1).T @ left.coefficients.flatten()
    j_r, j_f = rows[keep].flatten(0, 1), rows[gone].flatten(0, 1)
    ridge = toy.problem.ridge
    theta = j_r @ j_r.T + ridge * torch.eye(len(j_r), dtype=torch.float64)
    inner = j_f @ j_f.T + ridge * torch.eye(len(j_f), dtype=torch.float64)
    cross = torch.linalg.solve(theta, j_r @ j_f.T)
    middle = torch.linalg.inv(inner - j_f @ j_r.T @ cross)
    value = error[gone].flatten() - cross.T @ error[keep].flatten()
    moved = j_f.T @ middle @ value
    change = -(moved - j_r.T @ torch.linalg.solve(theta, j_r @ moved))
    assert torch.allclose(left - weights, change, rtol=1e-9, atol=1e-11)
    assert change.norm() > 1e-2
