"""Pieces of HTML that the sections of a deletion report are made of."""

from collections.abc import Iterable, Mapping
from html import escape


def fact_list(facts: Mapping[str, object]) -> str:
    """Names and what there is to say about them.

    Args:
        facts: Text by name.

    Returns:
        HTML.

    Example:
        >>> fact_list({"a": "<b>"})
        '<dl><dt>a</dt><dd>&lt;b&gt;</dd></dl>'
    """
    items = "".join(f"<dt>{escape(str(name))}</dt><dd>{escape(str(value))}</dd>" for name, value in facts.items())
    return f"<dl>{items}</dl>"


def bullets(points: Iterable[object]) -> str:
    """A list of points.

    Args:
        points: Texts.

    Returns:
        HTML.
    """
    return f"<ul>{''.join(f'<li>{escape(str(point))}</li>' for point in points)}</ul>"


def paragraphs(words: Iterable[str]) -> str:
    """Some paragraphs.

    Args:
        words: Their texts.

    Returns:
        HTML.
    """
    return "".join(f"<p>{escape(sentence)}</p>" for sentence in words)


def picture(address: str | None, caption: str) -> str:
    """A picture with its caption.

    Args:
        address: What holds it; None for no picture.
        caption: What it shows.

    Returns:
        HTML, empty without a picture.
    """
    if address is None:
        return ""
    text = escape(caption)
    return f'<figure class="curve"><img alt="{text}" src="{address}"><figcaption>{text}.</figcaption></figure>'
