"""The demo's report as HTML: whole, true to the figures, and by itself."""

from html.parser import HTMLParser
from pathlib import Path

from lorafleet.demo.page import page, write_page
from lorafleet.demo.report import Agreement, Load, Report, TaskResult
from services.common.scoring import Score


def _load(name: str, tokens_per_second: float, first_token: float) -> Load:
    return Load(name, 16, 24, {"busy": 2}, 480, 4.0, tokens_per_second, first_token, 0.9, 0.01, 0.02)


def _report() -> Report:
    task = TaskResult(
        task="sums<b>",
        metric="exact_match",
        base=Score(0.02, 0.0, 0.06),
        adapter=Score(0.91, 0.85, 0.96),
        lift=Score(0.89, 0.82, 0.95),
        train_rows=240,
        train_rows_left_out=0,
        train_rows_too_long=0,
        test_rows=100,
        training_seconds=41.4,
        model="ft:tiny:default:sums:v1",
    )
    loads = (_load("1 adapter, cold", 120.0, 0.5), _load("1 adapter, warm", 240.0, 0.125))
    return Report("tiny", (task,), loads, Agreement(47, 48), {"training": 41.0})


class Reader(HTMLParser):
    """Collects what a page shows and what it would load, and checks that tags close."""

    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []
        self.loads: list[str] = []
        self.shapes: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta",):
            self.open.append(tag)
        self.loads += [f"{tag} {name}" for name, _ in attrs if name in ("src", "href")]
        self.shapes.append((tag, dict(attrs)))

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.shapes.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] == "td":
            self.cells.append(data)


def test_the_page_holds_the_figures_and_loads_nothing() -> None:
    text = page(_report())
    reader = Reader()
    reader.feed(text)
    assert reader.open == []
    assert reader.loads == []
    assert "url(" not in text
    assert reader.cells[:6] == ["sums<b>", "exact_match", "0.020", "0.910", "+0.890", "+0.82 to +0.95"]
    assert reader.cells[18:24] == ["1 adapter, warm", "16", "24", "2", "240", "125 ms"]
    assert "<b>47 of\n48</b>" in text


def test_shapes_are_in_proportion() -> None:
    reader = Reader()
    reader.feed(page(_report()))
    cold, warm = [float(shape["width"] or 0) for tag, shape in reader.shapes if tag == "rect"][:2]
    assert warm == 2 * cold
    base, adapter = [float(shape["cx"] or 0) for tag, shape in reader.shapes if tag == "circle"][:2]
    zero, one = [float(shape["x1"] or 0) for tag, shape in reader.shapes if shape.get("class") == "grid"][::4]
    assert abs((base - zero) / (one - zero) - 0.02) < 0.001
    assert abs((adapter - zero) / (one - zero) - 0.91) < 0.001


def test_the_folder_is_made(tmp_path: Path) -> None:
    write_page(_report(), tmp_path / "new" / "demo.html")
    assert (tmp_path / "new" / "demo.html").read_text(encoding="utf-8").startswith("<!doctype html>")
