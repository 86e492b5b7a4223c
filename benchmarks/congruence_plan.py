"""Which models `congruence.py` trains, and which update leads from which to which."""

from dataclasses import dataclass, field
from pathlib import Path

LITE0 = ("backbone=efficientnet_lite0",)
ADAMW = ("method/optimizer=adamw", "method.optimizer.lr=0.001")  # in a few epochs better than the default
MEMBERS = 4  # of an ensemble
METHODS = {
    "none": ("method=finetune",),
    "naive": ("method=focal_distillation", "method.distance=none"),
    "distillation": ("method=distillation",),
    "fd_kl": ("method=focal_distillation", "method.distance=kl"),
    "fd_lm": ("method=focal_distillation",),
    "fd_kl_strong": ("method=focal_distillation", "method.distance=kl", "method.strength=5"),
    "fd_lm_strong": ("method=focal_distillation", "method.strength=5"),
    "elodi": ("method=elodi",),
}


@dataclass(frozen=True)
class Model:
    """A run of `lqf-train`.

    Attributes:
        name: Also that of its folder.
        overrides: Of the command, beside those of its data set.
        reference: Models that it learns from; several make an ensemble.
    """

    name: str
    overrides: tuple[str, ...]
    reference: tuple[str, ...] = ()


@dataclass
class Update:
    """A replacement of an old model by a new one.

    Attributes:
        name: What changes.
        old: Old models, one per seed; a tuple of names is an ensemble.
        new: New models by method, one per seed.
        old_of: Old models of methods that change the old side too.
        averaged: Pairs for which weights are averaged after the fact: (old, new) per seed.
    """

    name: str
    old: list[tuple[str, ...]]
    new: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    old_of: dict[str, list[tuple[str, ...]]] = field(default_factory=dict)
    averaged: list[tuple[str, str]] = field(default_factory=list)


@dataclass
class Plan:
    """Models in the order in which they are trained, and updates between them."""

    models: dict[str, Model] = field(default_factory=dict)
    updates: list[Update] = field(default_factory=list)

    def add(self, name: str, overrides: tuple[str, ...], reference: tuple[str, ...] = ()) -> str:
        """Note a model, once."""
        self.models.setdefault(name, Model(name, overrides, reference))
        return name


def network(name: str, weights: Path | None) -> tuple[str, ...]:
    """Overrides that choose a network whose weights are in a file."""
    if name == "lite0":
        return LITE0
    return ("backbone=torchvision", f"backbone.name={name}", f"backbone.weights={weights / f'{name}.pth'}")


def nonlinear(share: float, seeds: int, weights: Path | None, elodi: bool) -> Plan:
    """Updates of ordinary networks: seed to seed, half the data to all, another small network, a large one."""
    plan = Plan()
    for seed in range(seeds):
        _seed_to_seed(plan, share, seed)
        _more_data(plan, share, seed)
        if weights:
            _other_network(plan, "MobileNetV2 to Lite0", "mobilenet_v2", "lite0", share, seed, weights)
    if elodi:
        _elodi(plan, share, seeds)
    for seed in range(seeds if weights else 0):
        _other_network(plan, "Lite0 to ResNet-50", "lite0", "resnet50", share, seed, weights)
    return plan


def _update(plan: Plan, name: str) -> Update:
    known = [update for update in plan.updates if update.name == name]
    if not known:
        plan.updates.append(Update(name, []))
    return known[0] if known else plan.updates[-1]


def _base(plan: Plan, kind: str, seed: int, share: float, where: tuple[str, ...] = LITE0) -> str:
    return plan.add(f"{kind}_{seed}", (*where, *METHODS["none"], *ADAMW, f"data.subset_ratio={share}", f"seed={seed}"))


def _learn(plan: Plan, update: Update, old: str, kind: str, share: float, seed: int, where: tuple[str, ...]) -> None:
    update.old.append((old,))
    update.new.setdefault("none", []).append((_base(plan, kind, seed, share, where),))
    for method in ("fd_lm", "fd_kl", "fd_lm_strong", "fd_kl_strong", "distillation", "naive"):
        options = (*where, *METHODS[method], *ADAMW, f"data.subset_ratio={share}", f"seed={seed}")
        name = plan.add(f"{kind}_{method}_of_{old}_{seed}", options, (old,))
        update.new.setdefault(method, []).append((name,))


def _seed_to_seed(plan: Plan, share: float, seed: int) -> None:
    old = _base(plan, "lite0", seed, share)
    _learn(plan, _update(plan, "seed to seed"), old, "lite0", share, 10 + seed, LITE0)


def _more_data(plan: Plan, share: float, seed: int) -> None:
    old = _base(plan, "half", seed, share / 2)
    update = _update(plan, "half the data to all")
    _learn(plan, update, old, "lite0", share, 10 + seed, LITE0)
    options = (*LITE0, *METHODS["none"], *ADAMW, f"data.subset_ratio={share}", f"seed={10 + seed}")
    new = plan.add(f"tuned_from_{old}", (*options, f"backbone.weights={{{old}}}"))
    update.new.setdefault("none, from the old weights", []).append((new,))
    update.averaged.append((old, new))


def _other_network(plan: Plan, name: str, old: str, new: str, share: float, seed: int, weights: Path) -> None:
    before = _base(plan, old, seed, share, network(old, weights))
    _learn(plan, _update(plan, name), before, new, share, 10 + seed, network(new, weights))


def _elodi(plan: Plan, share: float, seeds: int) -> None:
    update = _update(plan, "seed to seed")
    sides = {}
    for side, first in (("old", 0), ("new", 10)):
        sides[side] = tuple(_base(plan, "lite0", first + number, share) for number in range(MEMBERS))
    update.old_of["elodi"] = [(_student(plan, "old", sides["old"], share, seed),) for seed in range(seeds)]
    update.new["elodi"] = [(_student(plan, "new", sides["new"], share, 10 + seed),) for seed in range(seeds)]
    update.old_of["ensembles of 4"], update.new["ensembles of 4"] = [sides["old"]], [sides["new"]]


def _student(plan: Plan, side: str, members: tuple[str, ...], share: float, seed: int) -> str:
    options = (*LITE0, *METHODS["elodi"], *ADAMW, f"data.subset_ratio={share}", f"seed={100 + seed}")
    return plan.add(f"elodi_{side}_{seed}", options, members)


def linear(share: float, seeds: int, epochs: int) -> Plan:
    """Updates of linearized networks: the same objective by stochastic steps and exactly."""
    plan = Plan()
    update = _update(plan, "half the data to all, linearized")
    exact = (*LITE0, "method=lqf_sgd", "method.solver=kernel")
    iterated = (*LITE0, "method=lqf_cg", "trainer.max_epochs=60")
    steps = (*LITE0, "method=lqf_sgd", f"trainer.max_epochs={epochs}")
    for seed in range(seeds):
        old = plan.add(f"linear_half_{seed}", (*exact, f"data.subset_ratio={share / 2}", f"seed={seed}"))
        update.old.append((old,))
        options = (f"data.subset_ratio={share}", f"seed={10 + seed}", "data/augmentation=none")
        for name, where, reference in (
            ("none, exact", exact, ()), ("fd_lm, exact", exact, (old,)), ("fd_lm, exact by CG", iterated, (old,)),
            ("none, SGD", steps, ()), ("fd_lm, SGD", steps, (old,)),
        ):  # fmt: skip
            new = plan.add(f"linear_{name.replace(', ', '_').replace(' ', '_')}_{seed}", (*where, *options), reference)
            update.new.setdefault(name, []).append((new,))
    return plan
