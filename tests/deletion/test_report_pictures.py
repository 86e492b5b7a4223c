import pytest
from matplotlib.axes import Axes

from deletion.report_example import good_report
from lqf_lightning.deletion.report_pictures import draw_attacks, draw_curve, draw_distances, draw_errors, draw_queries

MODELS = good_report()["read_outs"]["models"]


def test_bars_are_percents_of_every_model_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = {}
    plain = Axes.bar

    def spy(self: Axes, x: object, height: object, *args: object, **options: object) -> object:
        drawn[options["label"]] = height
        return plain(self, x, height, *args, **options)  # type: ignore[arg-type]  # handed through

    monkeypatch.setattr(Axes, "bar", spy)
    draw_errors(dict(reversed(MODELS.items())))
    assert list(drawn) == ["original", "scrubbed", "retrained"]
    assert drawn["scrubbed"] == pytest.approx([3.0, 17.5, 17.0])
    drawn.clear()
    draw_distances(MODELS)
    assert drawn == {"original": [0.145, 0.29, 0.29 / 1.2], "scrubbed": [0.0045, 0.009, 0.0075]}


def test_the_score_of_the_retrained_model_is_marked_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    lines, bands = [], []
    monkeypatch.setattr(Axes, "axhline", lambda _, y, **__: lines.append(y))
    monkeypatch.setattr(Axes, "axhspan", lambda _, low, high, **__: bands.append((low, high)))
    draw_attacks(MODELS)
    assert lines == pytest.approx([50.0, 0.5, 0.5])
    assert bands == [pytest.approx((42.0, 58.0)), pytest.approx((0.45, 0.55))]


def test_the_bound_of_the_weights_lies_over_the_queries(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = []
    plain = Axes.axhline
    monkeypatch.setattr(Axes, "axhline", lambda self, y, **options: lines.append(y) or plain(self, y, **options))
    draw_queries([{"number": 1, "nats": 0.1}], 0.2)
    draw_queries([{"number": 1, "nats": 0.1}], None)
    assert lines == [0.2]


def test_nothing_to_draw_is_no_picture() -> None:
    assert draw_errors({"scrubbed": {}}) is None
    assert draw_attacks({"scrubbed": {"entropy_attack": None}}) is None
    assert draw_distances({"retrained": MODELS["retrained"]}) is None
    assert draw_curve([]) is None
    assert draw_queries([], 1.0) is None


def test_a_curve_of_losses_is_drawn() -> None:
    address = draw_curve([{"passes": 1, "loss": 0.5}, {"passes": 2, "loss": 0.4}])
    assert address is not None
    assert address.startswith("data:image/png;base64,")
