import pytest

from lqf_lightning.comparison.option_errors import errors_of


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("no file matches a. Set reference=RUN/a.ckpt", "old=x: no file matches a. Set old=RUN/a.ckpt"),
        ("Set reference to a file, or 'reference={name: a}'", "old=x: Set old to a file, or 'old={name: a}'"),
        ("got reference={}. Set reference.name=resnet50", "old=x: got old={}. Set old.name=resnet50"),
        ("`reference` must be a name", "old=x: `old` must be a name"),
        ("reference=x: unknown. For yours, set reference=RUN", "old=x: unknown. For yours, set old=RUN"),
        ("run/reference=a/b.parquet is my reference", "old=x: run/reference=a/b.parquet is my reference"),
    ],
)  # fmt: skip
def test_only_the_option_is_renamed(text, told):
    for kind in (ValueError, TypeError, FileNotFoundError):
        with pytest.raises(kind) as caught, errors_of("old", "x"):
            raise kind(text)
        assert (type(caught.value), str(caught.value)) == (kind, told)
        assert str(caught.value.__cause__) == text


def test_an_option_is_named_once_however_deep_errors_pass():
    with pytest.raises(ValueError, match=r"^new=a: odd$"), errors_of("new", "[a, b]"), errors_of("new", "a"):
        raise ValueError("odd")
