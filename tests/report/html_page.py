"""A page of the report as its reader sees it: tables by their captions, notes, charts, and every link."""

import html.parser

_VOID = {"meta", "link", "img", "br", "hr", "input", "path", "rect"}  # the last two close themselves in SVG


class Page(html.parser.HTMLParser):
    """Parses a page; tags that are not closed in order raise AssertionError."""

    def __init__(self, content: bytes):
        super().__init__(convert_charrefs=True)
        self.tags: set[str] = set()
        self.attributes: list[tuple[str, str, str]] = []  # tag, name, value
        self.tables: dict[str, list[list[str]]] = {}  # caption -> rows of texts, heads first
        self.strong: list[str] = []
        self.notes: list[str] = []
        self.headings: list[str] = []
        self.charts: dict[str, str] = {}  # title -> description
        self.chart_texts: dict[str, list[str]] = {}  # title -> labels
        self._open: list[str] = []
        self._texts: list[str] = []
        self._classes: list[str] = []
        self._caption = ""
        self._title = ""
        self.feed(content.decode())
        self.close()
        assert self._open == []

    def handle_starttag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag in _VOID:
            return
        self._open.append(tag)
        self._classes.append(dict(attributes).get("class") or "")
        self._texts.append("")
        if tag == "table":
            self.tables[self._caption] = []
        elif tag == "tr":
            self.tables[self._caption].append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.add(tag)
        self.attributes += [(tag, name, value or "") for name, value in attributes]

    def handle_data(self, data):
        for place in range(len(self._texts)):
            self._texts[place] += data

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"
        text, kind = " ".join(self._texts.pop().split()), self._classes.pop()
        match tag:
            case "figcaption":
                self._caption = text
            case "th" | "td":
                self.tables[self._caption][-1].append(text)
            case "strong":
                self.strong.append(text)
            case "p" if kind == "note":
                self.notes.append(text)
            case "h1" | "h2":
                self.headings.append(text)
            case "title" if "svg" in self._open:
                self._title = text
                assert text not in self.charts, "two charts have one title"
                self.chart_texts[text] = []
            case "desc":
                self.charts[self._title] = text
            case "text":
                self.chart_texts[self._title].append(text)

    def cells(self, caption: str) -> dict[str, dict[str, str]]:
        """Texts of a table by the heads of rows and columns."""
        heads, *rows = self.tables[caption]
        assert all(len(row) == len(heads) for row in rows)
        return {row[0]: dict(zip(heads[1:], row[1:], strict=True)) for row in rows}
