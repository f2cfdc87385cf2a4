"""Reading the report's page: its elements, its texts, and what a page may hold at all."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from html.parser import HTMLParser

# All that the template and the charts make.
_TAGS = """
html head meta title style body header div fieldset legend label input h1 h2 h3 h4 p nav ul li a main section span i b
small br code pre details summary table thead tbody tr th td figure figcaption svg g path text article img footer
"""
_ATTRIBUTES = """
lang charset http-equiv content name class type id checked href rel aria-label aria-labelledby aria-hidden tabindex role
scope colspan style d x y viewbox src width height loading alt
"""
TAGS, ATTRIBUTES = frozenset(_TAGS.split()), frozenset(_ATTRIBUTES.split())
VOID = {"meta", "input", "br", "img"}


@dataclass
class Page:
    """tags: every start tag with its attributes, in order. texts: of the elements, style sheets left out."""

    tags: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    unclosed: list[str] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(self.texts)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.page.tags.append((tag, dict(attrs)))
        assert len(attrs) == len(dict(attrs)), f"<{tag}> has an attribute twice"
        if tag not in VOID:
            self.page.unclosed.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.page.unclosed, f"</{tag}> closes nothing"
        assert self.page.unclosed.pop() == tag, f"</{tag}> closes something else"

    def handle_data(self, data: str) -> None:
        if self.page.unclosed and self.page.unclosed[-1] != "style":
            self.page.texts.append(data)

    def handle_comment(self, data: str) -> None:
        raise AssertionError(f"a comment: {data}")

    def handle_pi(self, data: str) -> None:
        raise AssertionError(f"a processing instruction: {data}")

    def unknown_decl(self, data: str) -> None:
        raise AssertionError(f"a declaration: {data}")


def read_page(text: str) -> Page:
    """The page's elements; every one of them is closed, and in order."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.page.unclosed == []
    return reader.page


def check_harmless(text: str) -> Page:
    """That a page holds only what the template makes: no script, no handler, no link or picture from elsewhere."""
    page = read_page(text)
    assert {name for name, _ in page.tags} <= TAGS
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    for _, attributes in page.tags:
        assert set(attributes) <= ATTRIBUTES, attributes
        href = attributes.get("href")
        assert href is None or re.fullmatch(r"#[\w-]+|https?://[^\s\"'<>]+|(\.\./)*[\w./-]+", href), href
        assert re.match(r"data:image/webp;base64,", attributes.get("src") or "data:image/webp;base64,")
        assert re.fullmatch(r"(color:var\(--[\w-]+\)|[a-z]+:[\w.%]+;?)+|", attributes.get("style") or ""), attributes
    assert not re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]", text)
    return page
