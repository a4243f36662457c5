"""What the tests of the report share: a page as its reader's browser would take it apart."""

import html.parser


class Page(html.parser.HTMLParser):
    """Tags, the text of tables, headings; and that every tag is closed."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.tables, self.headings, self.open = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag == "table":
            self.tables.append([])
        elif tag == "tr":
            self.tables[-1].append([])
        elif tag in ("td", "th"):
            self.tables[-1][-1].append("")
        elif tag in ("h1", "h2", "h3"):
            self.headings.append("")
        if tag not in ("img", "meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2", "h3"):
            self.headings[-1] += data

    def table(self, *columns):
        """The first table whose header has these columns, a dictionary a row."""
        for header, *rows in self.tables:
            if set(columns) <= set(header):
                return [dict(zip(header, row, strict=True)) for row in rows]
        raise AssertionError(f"no table with {columns}")
