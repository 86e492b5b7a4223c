import math
from collections import OrderedDict
from functools import partial

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.func import functional_call, jacrev
from torch.nn.functional import cross_entropy, one_hot
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lqf_lightning.analysis.climb_baseline import chance_loss
from lqf_lightning.analysis.network_scrub import NetworkScrub
from lqf_lightning.analysis.scrub_network import scrub_network
from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.sampler import UnpaddedSampler
from lqf_lightning.forgetting.fisher_scrub import fisher_variance
from lqf_lightning.forgetting.noise import DiagonalNoise
from lqf_lightning.linear import Reducer, current_reducer
from lqf_lightning.methods import Finetune
from methods.dense_lqf import build as build_lqf
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, snapshot
from ranks import run_on_ranks

SAMPLES, DECAY, ALPHA = 12, 0.05, 5.0
FORGOTTEN = torch.tensor([7, 2, 9])
BASELINES = ("finetune", "gradient_ascent", "random_labels", "hide_class")


class Shared(TensorData):
    """Training samples that the ranks share, and that are known by their index."""

    def __init__(self, images, target):
        super().__init__(images, target, batch_size=4)
        rows = [("train", str(number), int(label)) for number, label in enumerate(target)]
        self.manifest = Manifest.build(rows, CLASSES)

    def fixed_train_dataloader(self):
        return self.chosen_dataloader(torch.arange(len(self.splits["train"][1])))

    def chosen_dataloader(self, indices):
        images, target = self.splits["train"]
        rows = TensorDataset(images[indices], target[indices], indices)
        reducer = current_reducer() if dist.is_initialized() else Reducer()
        batches = UnpaddedSampler(len(rows), rank=reducer.rank, world_size=reducer.world_size, batch_size=3)
        return DataLoader(rows, batch_sampler=batches, collate_fn=collate)


def collate(rows):
    if rows:
        return Batch(*default_collate(rows))
    return Batch(torch.empty(0, 3, 6, 6).double(), torch.zeros(0).long(), torch.zeros(0).long())


def attach(method, samples=SAMPLES):
    """The method with its trainer, which it refers to weakly."""
    images, target = draw(samples)
    trainer = build_trainer(1)
    trainer.datamodule = Shared(images, target)
    method.trainer = trainer
    return trainer, images, target


def tuned(seed=4, optimizer=SGD, **options):
    return Finetune(build_backbone(seed), CLASSES, optimizer=optimizer, **{"target_scale": ALPHA, **options})


def line(seed):
    """A network that is linear in its weights."""
    torch.manual_seed(seed)
    model = nn.Sequential(OrderedDict(flat=nn.Flatten(), fc=nn.Linear(108, 3))).double().eval()
    return Backbone("line", model, (0.5,) * 3, (0.5,) * 3, "fc", {"head": ("fc.weight", "fc.bias")}, 6, "random")


def rest_of(cohort, samples=SAMPLES):
    return torch.tensor([number for number in range(samples) if number not in cohort.tolist()])


def ridge_regression(images, target, center):
    """Weights (109, 3) that minimize the mean squared loss, half, and DECAY / 2 times the squared distance."""
    rows = torch.cat([images.flatten(1), torch.ones(len(images), 1).double()], 1)
    gram = rows.T @ rows / len(rows) + DECAY * torch.eye(109).double()
    return torch.linalg.solve(gram, rows.T @ (ALPHA * one_hot(target, 3).double()) / len(rows) + DECAY * center)


def joined(weights):
    return torch.cat([weights["fc.weight"].T, weights["fc.bias"][None]]).detach()


@pytest.mark.parametrize("center", ["zero", "start"])
def test_the_ntk_scrub_of_a_linear_network_at_its_optimum_is_retraining(center):
    start = line(1)
    optimizer = partial(torch.optim.SGD, lr=0.1, weight_decay=DECAY)
    method = Finetune(line(2), CLASSES, optimizer=optimizer, loss="squared", target_scale=ALPHA)
    _trainer, images, target = attach(method)
    pull = torch.zeros(109, 3).double() if center == "zero" else joined(dict(start.model.named_parameters()))
    optimum, kept = ridge_regression(images, target, pull), rest_of(FORGOTTEN)
    with torch.no_grad():
        method.model.fc.weight.copy_(optimum[:-1].T)
        method.model.fc.bias.copy_(optimum[-1])
    scrubbed = scrub_network(method, start, FORGOTTEN, name="ntk", center=center)
    wanted = ridge_regression(images[kept], target[kept], pull)
    torch.testing.assert_close(joined(scrubbed.weights), wanted, rtol=1e-8, atol=1e-9)
    assert float((wanted - optimum).norm()) > 0.01
    # Outputs at the start, the kernel's two passes and one pull; weights at zero need a push as well.
    work = (2 + 2 * 3 + 3 + (3 if center == "zero" else 0)) / 5
    assert scrubbed.passes == pytest.approx(work * SAMPLES / len(kept))


def dense_solutions(start, images, target, loss, mu, kept):
    model, names = start.model, [n for members in start.groups.values() for n in members]
    weights = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda own: functional_call(model, own, (images,)))(weights)
    rows = torch.cat([blocks[name].flatten(2) for name in names], 2)
    initial = model(images).detach()
    wanted = one_hot(target, 3).double()
    residual = ALPHA * wanted - initial if loss == "squared" else wanted - initial.softmax(1)

    def solve(chosen):
        flat = rows[chosen].flatten(0, 1)
        gram = flat.T @ flat + len(chosen) * mu * torch.eye(flat.shape[1]).double()
        return torch.linalg.solve(gram, flat.T @ residual[chosen].flatten())

    return names, solve(torch.arange(len(target))), solve(kept)


@pytest.mark.parametrize("loss", ["squared", "cross_entropy"])
@pytest.mark.parametrize("trapezium", [False, True])
def test_the_ntk_scrub_moves_by_the_difference_of_two_linearized_trainings_from_the_start(loss, trapezium):
    start, method = build_backbone(1), tuned(loss=loss)
    _trainer, images, target = attach(method)
    names, every, rest = dense_solutions(start, images, target, loss, 0.3, rest_of(FORGOTTEN))
    wanted = rest - every
    if trapezium:
        now = torch.cat([method.trained()[name].detach().flatten() for name in names])
        leg = now - torch.cat([dict(start.model.named_parameters())[n].detach().flatten() for n in names]) - rest
        cosine = wanted @ leg / wanted.norm() / leg.norm()
        wanted = wanted / wanted.norm() * (wanted.norm() + 2 * cosine.abs() * leg.norm())
    scrubbed = scrub_network(method, start, FORGOTTEN, name="ntk", ridge=0.3, trapezium=trapezium)
    found = torch.cat([(scrubbed.weights[name] - method.trained()[name]).detach().flatten() for name in names])
    torch.testing.assert_close(found, wanted, rtol=1e-7, atol=1e-9)


def test_without_weight_decay_the_ridge_is_chosen_by_leave_one_out():
    start, method = build_backbone(1), tuned()
    _trainer, *_ = attach(method)
    scrubbed = scrub_network(method, start, FORGOTTEN, name="ntk")
    again = scrub_network(method, start, FORGOTTEN, name="ntk", ridge="auto")
    other = scrub_network(method, start, FORGOTTEN, name="ntk", ridge=3.0)
    for name, weight in scrubbed.weights.items():
        assert torch.equal(weight, again.weights[name])
    assert not torch.allclose(scrubbed.weights["fc.weight"], other.weights["fc.weight"], rtol=1e-3)


def fisher_by_hand(model, images):
    weights = {name: p.detach() for name, p in model.named_parameters()}

    def logs(own):
        return functional_call(model, own, (images,)).log_softmax(1)

    share = model(images).softmax(1).detach()
    return {
        name: torch.einsum("nc,ncp->p", share, block.flatten(2).square()).view_as(weights[name]) / len(images)
        for name, block in jacrev(logs)(weights).items()
    }


def test_the_fisher_scrub_adds_noise_by_the_information_of_the_retained_samples_alone():
    method = tuned()
    _trainer, images, _ = attach(method)
    information = fisher_by_hand(method.model.eval(), images[rest_of(FORGOTTEN)])
    variance = fisher_variance(information, strength=1e-3, head=["fc.weight", "fc.bias"])
    scrubbed = scrub_network(method, build_backbone(), FORGOTTEN, name="fisher", strength=1e-3, noise_seed=5)
    noise = DiagonalNoise(variance).draw(method.trained(), 5)
    for name, parameter in method.trained().items():
        torch.testing.assert_close(scrubbed.weights[name], parameter.detach() + noise[name], rtol=1e-9, atol=1e-9)
    assert scrubbed.passes == pytest.approx((2 + 2 * 3) / 5)


def test_the_fisher_scrub_wipes_the_row_of_a_class_that_is_forgotten_as_a_whole():
    method = tuned()
    _trainer, _, target = attach(method)
    cohort = (target == 1).nonzero().flatten()
    scrubbed = scrub_network(method, build_backbone(), cohort, name="fisher", class_variance=1e-30)
    assert float(scrubbed.weights["fc.weight"][1].abs().max()) < 1e-13
    part = scrub_network(method, build_backbone(), cohort[1:], name="fisher", strength=1e-30)
    torch.testing.assert_close(part.weights["fc.weight"], method.model.fc.weight.detach(), rtol=0, atol=1e-12)


def test_noise_on_top_of_the_ntk_scrub_is_that_of_the_moved_weights():
    start, method = build_backbone(1), tuned()
    _trainer, images, _ = attach(method)
    moved = scrub_network(method, start, FORGOTTEN, name="ntk", ridge=0.3)
    model = build_backbone(4).model
    model.load_state_dict({**method.model.state_dict(), **moved.weights})
    information = fisher_by_hand(model.eval(), images[rest_of(FORGOTTEN)])
    noise = DiagonalNoise(fisher_variance(information, strength=1e-4, head=["fc.weight", "fc.bias"]))
    drawn = noise.draw(moved.weights, 0)
    scrubbed = scrub_network(method, start, FORGOTTEN, name="ntk", ridge=0.3, strength=1e-4, noise_seed=0)
    for name, weight in moved.weights.items():
        torch.testing.assert_close(scrubbed.weights[name], weight + drawn[name], rtol=1e-8, atol=1e-9)


def plain_descent(images, target, steps, rate, momentum):
    """The network in evaluation mode, all samples at every step."""
    model = build_backbone(4).model.eval()
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=momentum)
    for _ in range(steps):
        optimizer.zero_grad()
        cross_entropy(model(images), target).backward()
        optimizer.step()
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def test_fine_tuning_is_descent_on_the_retained_samples():
    method, kept = tuned(), rest_of(FORGOTTEN)
    _trainer, images, target = attach(method)
    options = {"learning_rate": 0.05, "momentum": 0.9, "epochs": 5}
    scrubbed = scrub_network(method, build_backbone(), FORGOTTEN, name="finetune", batch_size=99, **options)
    wanted = plain_descent(images[kept], target[kept], 5, 0.05, 0.9)
    for name, weight in scrubbed.weights.items():
        torch.testing.assert_close(weight, wanted[name], rtol=1e-9, atol=1e-11)
    assert (scrubbed.steps, scrubbed.passes) == (5, pytest.approx(5 * 3 / 5))
    first = cross_entropy(method.model.eval()(images[kept]), target[kept]).detach()
    assert scrubbed.curve[0] == {"passes": pytest.approx(0.6), "loss": pytest.approx(float(first))}
    small = scrub_network(method, build_backbone(), FORGOTTEN, name="finetune", batch_size=4, **options)
    assert (small.steps, small.passes) == (15, pytest.approx(5 * 3 / 5))


def test_random_labels_are_wrong_ones_and_only_those_of_the_cohort():
    method, member = tuned(), torch.tensor([5])
    _trainer, images, target = attach(method)
    options = {"learning_rate": 0.05, "epochs": 2, "batch_size": 99, "momentum": 0.5}
    found = scrub_network(method, build_backbone(), member, name="random_labels", **options).weights
    distances = []
    for shift in range(3):
        labels = target.clone()
        labels[5] = (labels[5] + shift) % 3
        wanted = plain_descent(images, labels, 2, 0.05, 0.5)
        distances.append(max(float((found[name] - wanted[name]).abs().max()) for name in found))
    assert distances[0] > 1e-4
    assert min(distances[1:]) < 1e-12


def cohort_loss(method, weights, images, target):
    with torch.no_grad():
        logits = functional_call(method.model.eval(), weights, (images[FORGOTTEN],))
    return float(method.loss(logits, target[FORGOTTEN]))


@pytest.mark.parametrize(("rate", "steps"), [(0.3, 200), (1000.0, 60)])
def test_gradient_ascent_stops_at_chance_and_does_not_blow_up(rate, steps):
    method = tuned()
    _trainer, images, target = attach(method)
    fitted = plain_descent(images, target, 300, 0.3, 0.9)
    method.model.load_state_dict(fitted, strict=False)
    options = {"learning_rate": rate, "max_steps": steps, "clip": 0.5}
    scrubbed = scrub_network(method, build_backbone(), FORGOTTEN, name="gradient_ascent", **options)
    reached = cohort_loss(method, scrubbed.weights, images, target)
    assert cohort_loss(method, fitted, images, target) < math.log(3) / 2
    assert math.log(3) <= reached <= 2 * math.log(3) + 1e-9
    assert scrubbed.curve[-1]["loss"] == pytest.approx(reached)
    assert scrubbed.steps < steps


def test_an_ascent_that_does_not_arrive_says_so(caplog):
    method = tuned()
    _trainer, *_ = attach(method)
    scrub_network(method, build_backbone(), FORGOTTEN, name="gradient_ascent", max_steps=1, ceiling=50.0)
    assert "++callbacks.scrub.options.max_steps=10" in caplog.text


def test_the_loss_of_chance_is_that_of_the_best_constant_answer():
    squared = tuned(loss="squared")
    target = torch.arange(3)
    constant = torch.full((3, 3), ALPHA / 3).double()
    assert chance_loss(squared) == pytest.approx(float(squared.loss(constant, target)))
    assert chance_loss(tuned()) == pytest.approx(float(tuned().loss(torch.zeros(3, 3), target)), rel=1e-6)


def test_a_hidden_class_is_never_answered_and_the_others_keep_their_outputs():
    method = tuned()
    _trainer, images, target = attach(method)
    cohort = (target == 2).nonzero().flatten()
    weights = scrub_network(method, build_backbone(), cohort, name="hide_class", hidden_logit=-99.0).weights
    before = method.model.eval()(images).detach()
    after = functional_call(method.model, weights, (images,)).detach()
    torch.testing.assert_close(after[:, :2], before[:, :2], rtol=1e-12, atol=1e-12)
    assert bool((after[:, 2] == -99.0).all())


@pytest.mark.parametrize("more", [[], [0]])
def test_only_whole_classes_are_hidden(more):
    method = tuned()
    _trainer, _, target = attach(method)
    members = (target == 2).nonzero().flatten().tolist()
    cohort = torch.tensor(members + more if more else members[1:])
    with pytest.raises(ValueError, match=r"callbacks\.scrub\.name=ntk"):
        scrub_network(method, build_backbone(), cohort, name="hide_class")


@pytest.mark.parametrize("name", ["fisher", "ntk", *BASELINES])
def test_the_method_stays_as_it_is_and_no_random_number_is_missed(name):
    start, method = build_backbone(), tuned()
    _trainer, _, target = attach(method)
    cohort = (target == 2).nonzero().flatten()
    before, state, modes = snapshot(method), torch.random.get_rng_state(), [m.training for m in method.modules()]
    scrub_network(method, start, cohort, name=name, reestimate=True, epochs=1, max_steps=2)
    assert all(torch.equal(value, before[key]) for key, value in method.state_dict().items())
    assert torch.equal(torch.random.get_rng_state(), state)
    assert [m.training for m in method.modules()] == modes
    assert all(parameter.grad is None and parameter.requires_grad for parameter in method.model.parameters())


def test_new_statistics_are_those_of_the_retained_samples_at_the_new_weights():
    method, kept = tuned(), rest_of(FORGOTTEN)
    _trainer, images, _ = attach(method)
    scrubbed = scrub_network(method, build_backbone(), FORGOTTEN, name="fisher", reestimate=True)
    inner = torch.nn.functional.conv2d(images[kept], scrubbed.weights["conv1.weight"])
    torch.testing.assert_close(scrubbed.buffers["bn1.running_mean"], inner.mean((0, 2, 3)))
    torch.testing.assert_close(scrubbed.buffers["bn1.running_var"], inner.var((0, 2, 3)))
    assert set(scrubbed.buffers) <= set(dict(method.model.named_buffers()))
    assert scrub_network(method, build_backbone(), FORGOTTEN, name="fisher").buffers is None


def test_noise_is_drawn_anew_unless_somebody_asks_for_a_seed():
    method = tuned()
    _trainer, *_ = attach(method)
    drawn = [scrub_network(method, build_backbone(), FORGOTTEN, name="fisher").weights["fc.weight"] for _ in range(2)]
    assert not torch.equal(*drawn)


def secret_noise():
    method = tuned()
    _trainer, *_ = attach(method)
    return scrub_network(method, build_backbone(), FORGOTTEN, name="fisher").weights["fc.weight"]


def test_ranks_share_noise_that_nobody_can_draw_again():
    assert torch.equal(*run_on_ranks(2, secret_noise))


def test_statistics_that_still_hold_the_cohort_are_told(caplog):
    method = tuned()
    _trainer, *_ = attach(method)
    scrub_network(method, build_backbone(), FORGOTTEN, name="finetune", epochs=1)
    assert "++callbacks.scrub.options.reestimate=true" in caplog.text


def scrub_everything():
    method = tuned(seed=4)
    _trainer, _, target = attach(method)
    cohort, found = (target == 2).nonzero().flatten(), {}
    for name in ("fisher", "ntk", *BASELINES):
        options = {"epochs": 2, "max_steps": 3, "batch_size": 5, "reestimate": name == "fisher", "noise_seed": 3}
        scrubbed = scrub_network(method, build_backbone(1), cohort, name=name, strength=1e-4, ridge=0.3, **options)
        found |= {f"{name}/{key}": value for key, value in scrubbed.weights.items()}
        found |= {f"{name}/{key}": value for key, value in (scrubbed.buffers or {}).items()}
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_agree_and_do_what_one_process_does(world):
    alone = scrub_everything()
    first, *others = run_on_ranks(world, scrub_everything)
    for name, weight in first.items():
        if not name.endswith("num_batches_tracked"):
            torch.testing.assert_close(weight, alone[name], rtol=1e-7, atol=1e-9)
        assert all(torch.equal(weight, other[name]) for other in others)


@pytest.mark.parametrize("cohort", [[], [SAMPLES], [-1], list(range(SAMPLES))])
def test_a_cohort_that_is_none_is_refused(cohort):
    method = tuned()
    _trainer, *_ = attach(method)
    with pytest.raises(ValueError, match="Set cohort="):
        scrub_network(method, build_backbone(), torch.tensor(cohort, dtype=torch.int64), name="fisher")


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match=r"callbacks\.scrub\.name=newton"):
        scrub_network(build_lqf(), build_backbone(), FORGOTTEN, name="ntk")


def test_a_kernel_that_is_too_large_is_refused(monkeypatch):
    method = tuned()
    _trainer, *_ = attach(method)
    monkeypatch.setattr("lqf_lightning.analysis.linearized_step.LIMIT", 3 * SAMPLES - 1)
    with pytest.raises(ValueError, match=r"callbacks\.scrub\.name=fisher"):
        scrub_network(method, build_backbone(), FORGOTTEN, name="ntk")


def test_a_ridge_that_is_too_small_is_refused():
    method = tuned()
    _trainer, *_ = attach(method)
    with pytest.raises(ValueError, match=r"Set \+\+callbacks\.scrub\.options\.ridge=auto"):
        scrub_network(method, build_backbone(), FORGOTTEN, name="ntk", ridge=1e-30)


def test_a_training_that_diverges_is_refused():
    method = tuned(loss="squared")
    _trainer, *_ = attach(method)
    with pytest.raises(ValueError, match=r"Set \+\+callbacks\.scrub\.options\.learning_rate="):
        scrub_network(method, build_backbone(), FORGOTTEN, name="finetune", learning_rate=1e200, epochs=4)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("name", "newton"), ("center", "middle"), ("strength", 0.0), ("cap", -1.0), ("epochs", 0), ("draws", 0.5),
        ("ridge", "best"), ("ridge", 0.0), ("momentum", 1.0), ("hidden_logit", 1.0), ("ceiling", math.inf),
    ],
)  # fmt: skip
def test_options_without_a_meaning_are_refused_with_a_way_out(option, value):
    with pytest.raises(ValueError, match=rf"Set [+]*callbacks\.scrub\.(options\.)?{option}="):
        NetworkScrub(**{option: value})
