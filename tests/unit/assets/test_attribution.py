"""The attribution list names every text under a licence that asks for it, once, and no other."""

from assets.attribution import attribution_list


def _document(title: str, author: str, licence: str, source: str = "a/b") -> dict[str, str]:
    return {"title": title, "author": author, "licence": licence, "source": source, "text": "x"}


def test_lists_licensed_works_by_source_without_repeats() -> None:
    text = attribution_list(
        [
            _document("Smile", "Ana Lee", "CC-BY-4.0"),
            _document("Smile", "Ana Lee", "CC-BY-4.0"),
            _document("News", "", "CC-BY-SA-4.0", source="c/d"),
            _document("Emma", "Jane Austen", "public domain"),
        ]
    )
    assert text.count("- Smile, by Ana Lee") == 1
    assert "## https://github.com/a/b (CC-BY-4.0)" in text
    assert "- News, by author not named" in text
    assert "Emma" not in text
