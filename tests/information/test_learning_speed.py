import math
from itertools import pairwise

import pytest
import torch

from lqf_lightning.information.learning_speed import LearningHistory, learning_speed
from lqf_lightning.information.sample_outcomes import sample_outcomes
from lqf_lightning.linear import DualFactor, Kernel, QuadraticProblem, leave_one_out

NAMES = ("correct", "confidence", "top_confidence", "margin", "loss")
EPOCHS, SIZE = 9, 40


def draw(seed=0):
    """Columns of every epoch, with samples that did not come, or came twice and were right once."""
    generator = torch.Generator().manual_seed(seed)
    columns = {name: torch.randn(EPOCHS, SIZE, generator=generator) for name in NAMES}
    columns["correct"] = torch.randint(0, 3, (EPOCHS, SIZE), generator=generator) / 2
    columns["correct"][:, :3] = torch.tensor([0.0, 0.5, 1.0])  # never, never in more than half, always
    absent = torch.rand(EPOCHS, SIZE, generator=generator) < 0.2
    absent[:, 3] = True
    absent[:, :3] = False
    return {name: rows.masked_fill(absent, math.nan) for name, rows in columns.items()}


def by_hand(columns, sample):
    """One sample, in a loop over the epochs in which it came."""
    seen = [e for e in range(EPOCHS) if not math.isnan(columns["correct"][e, sample])]
    right = [columns["correct"][e, sample].item() > 0.5 for e in seen]
    mean = {n: sum(columns[n][e, sample].item() for e in seen) / len(seen) if seen else math.nan for n in NAMES}
    return {
        "epochs": len(seen),
        "cumulative_correctness": mean["correct"],
        "cumulative_confidence": mean["confidence"],
        "cumulative_top_confidence": mean["top_confidence"],
        "mean_margin": mean["margin"],
        "mean_loss": mean["loss"],
        "final_loss": columns["loss"][seen[-1], sample].item() if seen else math.nan,
        "final_correct": int(right[-1]) if seen else -1,
        "forgetting_events": sum(a and not b for a, b in pairwise(right)),
        "first_learned": next((e for e, r in zip(seen, right, strict=True) if r), -1),
        "never_learned": bool(seen) and not any(right),
    }


def test_scores_are_those_of_a_loop_over_epochs():
    columns = draw()
    scores = learning_speed(columns)
    for sample in range(SIZE):
        got = {name: values[sample].item() for name, values in scores.items()}
        assert got == pytest.approx(by_hand(columns, sample), rel=1e-5, abs=1e-6, nan_ok=True)
    assert scores["forgetting_events"].max() > 2
    assert scores["never_learned"][:4].tolist() == [True, True, False, False]


@pytest.mark.parametrize("cut", range(EPOCHS + 1))
def test_a_history_goes_on_from_its_state(cut):
    columns, history, resumed = draw(1), LearningHistory(SIZE), LearningHistory(SIZE)
    for epoch in range(EPOCHS):
        if epoch == cut:
            resumed.restore(history.state())
        for one in (history, *([resumed] if epoch >= cut else [])):
            one.observe(epoch, {name: rows[epoch] for name, rows in columns.items()})
    if cut == EPOCHS:
        resumed.restore(history.state())
    for name, values in history.scores().items():
        assert torch.equal(values.nan_to_num(-7.0), resumed.scores()[name].nan_to_num(-7.0)), name


def test_a_state_is_not_changed_by_what_comes_after():
    columns, history = draw(), LearningHistory(SIZE)
    state = history.state()
    history.observe(0, {name: rows[0] for name, rows in columns.items()})
    assert not history.empty
    history.restore(state)
    assert history.empty


def test_samples_added_since_follow_at_the_end():
    columns, small, large = draw(), LearningHistory(SIZE), LearningHistory(SIZE + 2)
    small.observe(0, {name: rows[0] for name, rows in columns.items()})
    large.restore(small.state())
    assert large.scores()["epochs"].tolist() == [*small.scores()["epochs"].tolist(), 0, 0]
    with pytest.raises(ValueError, match=r"of 42 samples, expected .* of at most 40. Set ckpt_path=null"):
        small.restore(large.state())
    with pytest.raises(ValueError, match="the checkpoint holds events of 3 samples"):
        small.restore({"events": torch.zeros(3)})


def ranks(values):
    return values.double().argsort().argsort().double()


def test_wrong_labels_are_learned_late_like_samples_that_the_others_predict_badly():
    """Gradient descent on a ridge problem whose exact leave-one-out residuals are known."""
    generator = torch.Generator().manual_seed(0)
    size, classes, ridge = 120, 3, 1.0
    true = torch.arange(size) % classes
    centers = 2.5 * torch.randn(classes, 40, generator=generator, dtype=torch.float64)
    x = centers[true] + 2 * torch.randn(size, 40, generator=generator, dtype=torch.float64)
    wrong = torch.randperm(size, generator=generator)[: size // 20]
    label = true.clone()
    label[wrong] = (true[wrong] + 1) % classes
    target = torch.nn.functional.one_hot(label, classes).double()

    history, weight = LearningHistory(size), torch.zeros(40, classes, dtype=torch.float64)
    step = 1 / (torch.linalg.matrix_norm(x, 2).square() + ridge)
    for epoch in range(200):
        history.observe(epoch, sample_outcomes(x @ weight, label))
        weight -= step * (x.T @ (x @ weight - target) + ridge * weight)
    scores = history.scores()
    problem = QuadraticProblem(torch.zeros_like(target), target, ridge)
    kernel = Kernel({"all": (x @ x.T)[None]}, classes, "trace")
    residual = leave_one_out(DualFactor(problem, kernel)).residual.gather(1, label[:, None]).squeeze(1)

    flipped = torch.zeros(size, dtype=torch.bool).index_fill(0, wrong, True)
    for name in ("cumulative_correctness", "cumulative_confidence"):
        area = (scores[name][flipped][:, None] < scores[name][~flipped]).double().mean()  # ties count as misses
        assert area > 0.9
    assert torch.corrcoef(torch.stack([ranks(scores["cumulative_confidence"]), ranks(-residual)]))[0, 1] > 0.7
