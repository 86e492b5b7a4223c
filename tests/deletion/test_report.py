import base64
import io
import math
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from deletion.report_example import good_report
from lqf_lightning.deletion.judgement import judge
from lqf_lightning.deletion.report import write_report

VOID = {"meta", "img", "br"}


class Page(HTMLParser):
    """Text, pictures and tags of a page; refuses what is not closed."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.sources: list[str] = []
        self.classes: set[str] = set()
        self.words: list[str] = []
        self.raw = path.read_text()
        self.feed(self.raw)
        assert not self.open
        self.text = " ".join(self.words)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.add(tag)
        self.classes.update((given.get("class") or "").split())
        self.sources += [value for name, value in attrs if name in {"src", "href"} and value]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "style" not in self.open:
            self.words.append(data)


def draw(folder: Path, report: dict[str, Any]) -> Page:
    return Page(write_report(folder, report))


def test_the_page_stands_alone_and_holds_everything(tmp_path: Path) -> None:
    page = draw(tmp_path, good_report())
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]
    assert "script" not in page.tags
    assert "link" not in page.tags
    assert "http" not in page.raw
    assert len(page.sources) == 5
    for source in page.sources:
        kind, content = source.split(",")
        assert kind == "data:image/png;base64"
        assert min(Image.open(io.BytesIO(base64.b64decode(content))).size) > 300
    expected = [
        "40 (fraction 0.01, seed 0)", "bus: 22", "c<a>t: 18", "4,000 before, 3,960 after", "number 2 on this model",
        "run & co", "3,400,000 trained parameters", "2.5 passes", "20 times as many", "at most 0.0002",
        "isotropic, sigma 0.001", "At most 0.021 nats", "0.001 nats are those of the intercept",
        "answers to 100 queries tell 0.003 nats", "the same objective", "17.5 %", "± 8 %", "± 0.05", "64 shadow models",
        "L1 of softmax outputs",
        "learning rate 0.01", "the head's initialization", "kernel.bin", "manifest.parquet", "ab12", "up to 0.021 nats",
    ]  # fmt: skip
    for words in expected:
        assert words in page.text, words
    assert "passed" in page.classes
    assert not {"failed", "caution"} & page.classes


def test_a_failed_check_stands_in_red_above_everything(tmp_path: Path) -> None:
    report = good_report()
    report["scrub"]["verified_relative_gradient"] = 0.9
    report["request"]["files_gone"] = 0
    report["judgement"] = judge(report)
    page = draw(tmp_path, report)
    assert {"failed", "caution"} <= page.classes
    assert "passed" not in page.classes
    order = [
        page.text.index(words) for words in ("Do not release", "wrong normalization", "still exist", "What was req")
    ]
    assert order == sorted(order)


def test_a_judgement_of_others_is_shown_as_it_is(tmp_path: Path) -> None:
    failed = {"passed": False, "verdict": "No.", "flags": ["reason <1>"]}
    page = draw(tmp_path, good_report() | {"judgement": failed})
    assert "failed" in page.classes
    assert "reason <1>" in page.text
    passed = {"passed": True, "verdict": "Yes.", "flags": ["look out"]}
    page = draw(tmp_path, good_report() | {"judgement": passed})
    assert {"passed", "caution"} <= page.classes


def missing_everything() -> dict[str, Any]:
    report = good_report()
    del report["read_outs"]["models"]["retrained"], report["read_outs"]["models"]["original"]
    scrubbed = report["read_outs"]["models"]["scrubbed"]
    scrubbed |= dict.fromkeys(set(scrubbed) - {"retain_error"})
    report["read_outs"] |= {"against": None, "relearn": None}
    report["read_outs"] |= {"likelihood_ratio": {"shadows": 0, "why": "too few"}}
    report["scrub"] |= {
        "name": "a new one", "noise": None, "curve": [], "relative_gradient": None, "distance_bound": None,
        "verified_relative_gradient": None, "tolerance": None, "relative_gradient_before": None, "recipe_passes": None,
    }  # fmt: skip
    report["bound"] = {"nats": None, "intercept_nats": None, "queries": [], "assumes": []}
    report["model"]["linear"] = False
    return report | {"removed": None, "hashes": {}, "not_covered": []}


def test_what_is_missing_is_said_in_words(tmp_path: Path) -> None:
    page = draw(tmp_path, missing_everything())
    expected = [
        "no retrained model to compare with",
        "No likelihood ratio attack: too few.", "retrained=", "the bound is infinite", "nothing is certified",
        "Heuristic, not a proof", "What answers to queries tell was not computed", "Nothing: caches, tables",
        "None were taken", "Nothing was recorded here", "a new one", "information left, at most infinite",
    ]  # fmt: skip
    for words in expected:
        assert words in " ".join(page.text.split()), words
    assert len(page.sources) == 1


def test_nothing_measured_is_no_crash(tmp_path: Path) -> None:
    page = draw(tmp_path, missing_everything() | {"read_outs": None})
    assert "The behavior of the models was not measured." in page.text
    assert page.sources == []


@pytest.mark.parametrize("odd", [math.nan, math.inf, 0.0])
def test_odd_numbers_are_drawn_or_left_out(tmp_path: Path, odd: float) -> None:
    report = good_report()
    report["scrub"]["curve"][1] |= {"distance_bound": odd}
    report["bound"] |= {"nats": odd, "queries": [{"number": 1, "nats": odd}, {"number": 2, "nats": odd}]}
    report["read_outs"]["models"]["scrubbed"] |= {"forget_error": odd, "entropy_attack": odd, "anamnesis_index": odd}
    report["read_outs"]["models"]["original"]["activation_distance"]["forget"] = odd
    assert "report" not in draw(tmp_path, report).classes


def test_an_interrupted_writing_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_report(tmp_path, good_report())
    before = path.read_text()

    def stop(*_: object, **__: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", stop)
    with pytest.raises(KeyboardInterrupt):
        write_report(tmp_path, missing_everything())
    assert path.read_text() == before


def test_what_was_measured_is_told_apart_from_the_bound(tmp_path: Path) -> None:
    report = good_report()
    report["bound"] |= {"measured_nats": 0.5, "queries": [{"number": 4, "nats": 0.4}]}  # above the bound of 0.021 nats
    page = draw(tmp_path, report)
    assert "both may be above the bound: the weights tell 0.5 nats, answers to 4 queries tell 0.4 nats" in page.text
