import pytest
import torch
import torch.nn.functional as F

from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.output_loss import CrossEntropyOutputLoss, SquaredOutputLoss
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.training_curve import TrainingGroup, training_curve
from lqf_lightning.linear.training_modes import TrainingModes, training_error
from lqf_lightning.linear.training_rule import TrainingRule
from lqf_lightning.linear.training_time import training_times

SAMPLES, OUTPUTS, STEPS = 12, 3, 100
SIZES = {"body": 20, "head": 6}
RULES = [(0.0, False), (0.9, False), (0.8, True)]


class Linear:
    """f0 + J dw with groups of weights, trained by torch's own optimizer."""

    def __init__(self, seed=0):
        draw = torch.Generator().manual_seed(seed)
        normal = lambda *shape: torch.randn(*shape, generator=draw, dtype=torch.float64)  # noqa: E731  # short
        self.jacobian = {name: 0.3 * normal(SAMPLES, OUTPUTS, size) for name, size in SIZES.items()}
        self.start = {name: normal(size) for name, size in SIZES.items()}
        self.initial = normal(SAMPLES, OUTPUTS)
        self.label = torch.randint(OUTPUTS, (SAMPLES,), generator=draw)
        self.target = 3.0 * F.one_hot(self.label, OUTPUTS).double()
        flat = {name: part.flatten(0, 1) for name, part in self.jacobian.items()}
        self.kernel = Kernel({name: (part @ part.T).unsqueeze(0) for name, part in flat.items()}, OUTPUTS)

    def origin(self, name):
        return self.jacobian[name] @ self.start[name]

    def loss(self, outputs, rows, kind):
        if kind == "cross_entropy":
            return F.cross_entropy(outputs, self.label[rows])
        return 0.5 * (outputs - self.target[rows]).square().sum(1).mean()

    def output_loss(self, kind):
        return CrossEntropyOutputLoss(self.label) if kind == "cross_entropy" else SquaredOutputLoss(self.target)

    def train(self, rates, options, groups, kind="squared", batches=None, centered=True):
        """Losses and errors on all samples, and losses of batches, with weights of torch."""
        deltas = {
            name: (torch.zeros_like(w) if centered else w.clone()).requires_grad_() for name, w in self.start.items()
        }
        entries = [{"params": [deltas[n]], "weight_decay": g.decay, "lr": g.factor} for n, g in groups.items()]
        optimizer = torch.optim.SGD(entries, lr=1.0, **options)
        everyone, seen, loss, error = torch.arange(SAMPLES), [], [], []

        def outputs():
            moved = deltas if centered else {n: d - self.start[n] for n, d in deltas.items()}
            return self.initial + sum(self.jacobian[n] @ d for n, d in moved.items())

        def note():
            now = outputs().detach()
            loss.append(self.loss(now, everyone, kind))
            error.append((now.argmax(1) != self.label).double().mean())

        note()
        for number, rate in enumerate(rates.tolist()):
            for entry, group in zip(optimizer.param_groups, groups.values(), strict=True):
                entry["lr"] = rate * group.factor
            rows = everyone if batches is None else batches[number]
            optimizer.zero_grad()
            value = self.loss(outputs()[rows], rows, kind)
            value.backward()
            seen.append(value.detach())
            optimizer.step()
            note()
        return torch.stack(loss), torch.stack(error), torch.stack(seen)


@pytest.fixture(scope="module")
def problem():
    return Linear()


def schedule(highest=0.3):
    """A rise, a plateau and a decay."""
    t = torch.arange(STEPS, dtype=torch.float64)
    return highest * torch.minimum((t + 1) / 20, 0.5 + 0.5 * torch.cos(t / STEPS * 3))


def draw_batches(size, seed=3):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randperm(SAMPLES, generator=draw)[:size] for _ in range(STEPS)]


def close(got, expected):
    torch.testing.assert_close(got, expected, rtol=1e-10, atol=1e-12)


PLAIN = {name: TrainingGroup() for name in SIZES}
DECAY = {name: TrainingGroup(decay=0.03) for name in SIZES}
MIXED = {"body": TrainingGroup(0.5, 0.02), "head": TrainingGroup(2.0, 0.1)}


@pytest.mark.parametrize(("momentum", "nesterov"), RULES)
@pytest.mark.parametrize("groups", [PLAIN, DECAY, MIXED, {"body": TrainingGroup(0.5), "head": TrainingGroup(2.0)}])
@pytest.mark.parametrize(
    ("kind", "size"), [("squared", None), ("cross_entropy", None), ("squared", 5), ("cross_entropy", 5)]
)
def test_the_curve_is_that_of_torchs_optimizer(problem, momentum, nesterov, groups, kind, size):
    rates, batches = schedule(0.08), None if size is None else draw_batches(size)
    options = {"momentum": momentum, "nesterov": nesterov}
    loss, error, seen = problem.train(rates, options, groups, kind, batches)
    found = training_curve(
        problem.kernel, problem.initial, problem.output_loss(kind), TrainingRule(rates, momentum, nesterov),
        groups=groups, batches=batches,
    )  # fmt: skip
    close(found.loss, loss)
    close(found.batch_loss, seen)
    assert torch.equal(found.error, error)
    assert kind == "cross_entropy" or len(set(found.error.tolist())) > 1
    assert float(loss[-1]) < 0.9 * float(loss[0])


@pytest.mark.parametrize("groups", [DECAY, MIXED])
def test_decay_towards_zero_pulls_at_the_weights_themselves(problem, groups):
    rates = schedule(0.08)
    loss, _, _ = problem.train(rates, {"momentum": 0.9}, groups, centered=False)
    towards = {n: TrainingGroup(g.factor, g.decay, problem.origin(n)) for n, g in groups.items()}
    rule, outputs = TrainingRule(rates, 0.9), problem.output_loss("squared")
    close(training_curve(problem.kernel, problem.initial, outputs, rule, groups=towards).loss, loss)
    centered = training_curve(problem.kernel, problem.initial, outputs, rule, groups=groups).loss
    assert float((centered - loss).abs().max()) > 0.01 * float(loss[-1])


def modes_of(problem, *, target=None, weight=None, origin=None):
    quadratic = QuadraticProblem(problem.initial, problem.target if target is None else target, 1.0, weight)
    spectrum = KernelSpectrum(quadratic, problem.kernel)
    return spectrum, TrainingModes.of(spectrum, origin)


@pytest.mark.parametrize(("momentum", "nesterov"), RULES)
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_one_number_per_mode_gives_the_curve_of_torchs_optimizer(problem, momentum, nesterov, decay):
    rates = schedule(0.08)
    groups = {name: TrainingGroup(decay=decay) for name in SIZES}
    loss, error, _ = problem.train(rates, {"momentum": momentum, "nesterov": nesterov}, groups)
    spectrum, modes = modes_of(problem)
    rule = TrainingRule(rates, momentum, nesterov)
    found = modes.loss(rule, decay)
    close(found, loss)
    assert torch.equal(training_error(spectrum, modes.residuals(rule, decay), problem.label, chunk=7), error)
    fractions = (0.9, 0.8, 0.6)
    steps = [time.steps for time in training_times(found, fractions)]
    assert steps == [time.steps for time in training_times(loss, fractions)]
    assert None not in steps


def test_modes_know_decay_towards_zero(problem):
    rates = schedule(0.08)
    loss, _, _ = problem.train(rates, {"momentum": 0.9}, DECAY, centered=False)
    _, modes = modes_of(problem, origin=sum(problem.origin(name) for name in SIZES))
    close(modes.loss(TrainingRule(rates, 0.9), 0.03), loss)


def test_sample_weights_count_in_gradient_and_loss(problem):
    weight = torch.arange(SAMPLES, dtype=torch.float64) / 5
    _, modes = modes_of(problem, weight=weight)
    f, jacobian = problem.initial.clone(), torch.cat(list(problem.jacobian.values()), 2).flatten(0, 1)
    expected = []
    for _ in range(20):
        error = f - problem.target
        expected.append(0.5 * (weight[:, None] * error.square()).sum() / SAMPLES)
        f = f - 0.1 / SAMPLES * (jacobian @ (jacobian.T @ (weight[:, None] * error).flatten())).reshape(f.shape)
    close(modes.loss(TrainingRule(torch.full((19,), 0.1, dtype=torch.float64)), 0.0), torch.stack(expected))


@pytest.mark.parametrize(("momentum", "nesterov"), RULES)
@pytest.mark.parametrize("share", [0.01, 0.1, 0.5])
def test_modes_left_out_cost_no_more_than_they_are_allowed_to(problem, momentum, nesterov, share):
    _, modes = modes_of(problem)
    wide = TrainingModes(
        modes.values * torch.logspace(-6, 0, len(modes.values), dtype=torch.float64), modes.residual, SAMPLES
    )
    rule = TrainingRule(schedule(0.08), momentum, nesterov)
    fewer = wide.leading(rule, share)
    assert 2 < len(fewer.values) < len(wide.values) - 2
    full, reduced = wide.loss(rule), fewer.loss(rule)
    excess = reduced - full
    assert float(excess.min()) > -1e-12
    floor = 0.5 * fewer.floor / SAMPLES
    assert float(excess.max()) <= share * floor
    assert float(excess.max()) > 0


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_modes_are_kept_from_the_bound_on(momentum):
    rule, samples = TrainingRule(torch.tensor([0.1, 0.3, 0.2], dtype=torch.float64), momentum), 8
    bound = 0.05 * samples * (1 - momentum) / (2 * 0.6)  # 2 kappa T / n = share
    values = bound * torch.tensor([0.99, 1.01], dtype=torch.float64)
    fewer = TrainingModes(values, torch.tensor([3.0, 2.0], dtype=torch.float64), samples, floor=1.0).leading(rule, 0.05)
    assert fewer.values.tolist() == values[1:].tolist()
    assert fewer.floor == 10.0


@pytest.mark.parametrize("kind", ["squared", "cross_entropy"])
def test_weights_of_samples_are_those_of_their_losses(problem, kind):
    weight = torch.arange(SAMPLES, dtype=torch.float64) / 5
    loss, rows = problem.output_loss(kind), torch.tensor([3, 8])
    heavy = type(loss)(loss.label if kind == "cross_entropy" else loss.target, weight)
    outputs = problem.initial[rows].clone().requires_grad_()
    value = heavy.value(outputs, rows)
    close(value, loss.value(outputs, rows) * weight[rows])
    close(heavy.gradient(outputs, rows).detach(), torch.autograd.grad(value.sum(), outputs)[0])


def test_a_batch_of_all_samples_in_any_order_is_a_step_on_all(problem):
    loss, rule = problem.output_loss("squared"), TrainingRule(torch.full((5,), 0.1))
    shuffled = [torch.randperm(SAMPLES) for _ in range(5)]
    one, two = (training_curve(problem.kernel, problem.initial, loss, rule, batches=b) for b in (None, shuffled))
    close(two.loss, one.loss)


def test_steps_that_diverge_are_refused_with_a_rate_that_does_not(problem):
    _, modes = modes_of(problem)
    top = float(modes.values.max()) / SAMPLES
    rule = TrainingRule(torch.full((5,), 1.01 * 2 * 1.5 / (top + 0.1)), 0.5)
    with pytest.raises(ValueError, match=r"Set method\.optimizer\.lr="):
        modes.loss(rule, 0.1)
    TrainingModes.loss(modes, TrainingRule(0.98 * rule.rates, 0.5), 0.1)


def test_samples_that_come_twice_in_a_batch_count_twice(problem):
    rates = torch.full((1,), 0.1, dtype=torch.float64)
    rows = torch.tensor([4, 4, 7])
    loss, _, seen = problem.train(rates, {}, PLAIN, batches=[rows])
    found = training_curve(
        problem.kernel, problem.initial, problem.output_loss("squared"), TrainingRule(rates), batches=[rows]
    )
    close(found.loss, loss)
    close(found.batch_loss, seen)


@pytest.mark.parametrize("form", ["diagonal", "trace"])
def test_surrogate_kernels_train_the_model_that_they_are_of(problem, form):
    per_output = torch.stack([
        problem.jacobian["body"][:, c] @ problem.jacobian["body"][:, c].T for c in range(OUTPUTS)
    ])
    blocks = per_output if form == "diagonal" else per_output.mean(0, keepdim=True)
    rates, batches = torch.full((STEPS,), 0.05, dtype=torch.float64), draw_batches(5)
    found = training_curve(
        Kernel({"body": blocks}, OUTPUTS, form), problem.initial, SquaredOutputLoss(problem.target),
        TrainingRule(rates, 0.5), batches=batches,
    )  # fmt: skip
    f, v = problem.initial.clone(), torch.zeros_like(problem.initial)
    for rows in batches:
        gradient = torch.zeros_like(f)
        gradient[rows] = (f - problem.target)[rows] / 5
        v = 0.5 * v + torch.stack([blocks[c % len(blocks)] @ gradient[:, c] for c in range(OUTPUTS)], 1)
        f = f - 0.05 * v
    close(found.loss[-1], 0.5 * (f - problem.target).square().sum(1).mean())


def test_what_does_not_fit_is_refused(problem):
    loss, rule = problem.output_loss("squared"), TrainingRule(torch.full((3,), 0.1))
    with pytest.raises(ValueError, match="layer groups"):
        training_curve(problem.kernel, problem.initial, loss, rule, groups={"body": TrainingGroup()})
    with pytest.raises(ValueError, match="negative"):
        training_curve(problem.kernel, problem.initial, loss, rule, groups=PLAIN | {"body": TrainingGroup(-1.0)})
    with pytest.raises(ValueError, match="step 2 of 3"):
        training_curve(problem.kernel, problem.initial, loss, rule, batches=[torch.tensor([0])])
    quadratic = QuadraticProblem(problem.initial, problem.target, 1.0, intercept=True)
    with pytest.raises(ValueError, match="intercept"):
        TrainingModes.of(KernelSpectrum(quadratic, problem.kernel))
