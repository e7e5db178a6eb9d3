"""The documentation as a site: built strictly, complete, and readable from a disk without the network."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from lorafleet.cli.app import app
from tests.support.documents import ROOT

ABSOLUTE = re.compile(r"([a-z]+:)?//")
LOADED = {"script": "src", "img": "src", "link": "href", "iframe": "src"}
# `link` elements that a browser does not load by itself.
NAMED_ONLY = {"canonical", "next", "prev", "edit"}


class References(HTMLParser):
    """What a page loads, and where its links lead."""

    def __init__(self, page: Path) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.links: list[str] = []
        self.feed(page.read_text("utf-8"))

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        target = found.get(LOADED.get(tag, ""))
        if target and found.get("rel") not in NAMED_ONLY:
            self.loaded.append(target)
        if tag == "a" and found.get("href"):
            self.links.append(str(found["href"]))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert built.returncode == 0, built.stdout + built.stderr
    return folder


@pytest.mark.timeout(300)
def test_nothing_is_loaded_from_elsewhere_and_links_hold(site: Path) -> None:
    pages = list(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        if page.name == "404.html":
            continue
        references = References(page)
        for target in references.loaded:
            assert not ABSOLUTE.match(target), f"{page.name} loads {target}"
        for target in (*references.loaded, *references.links):
            path = target.partition("#")[0].partition("?")[0]
            if path and "://" not in path and not path.startswith("mailto:"):
                assert (page.parent / path).exists(), f"{page.name} leads to {target}"


@pytest.mark.timeout(300)
def test_the_reference_has_every_call_command_and_setting(site: Path) -> None:
    def text(name: str) -> str:
        return re.sub(r"<[^>]+>", "", (site / "reference" / name).read_text("utf-8"))

    commands = text("commands.html")
    assert all(f"lorafleet {command.name}" in commands for command in app.registered_commands)
    assert "InferenceService.Generate" in text("inference.html")
    assert "bad_hyperparameter" in text("trainer.html")
    assert "AdapterService.PublishVersion" in text("registry.html")
    http = text("http.html")
    assert all(
        path in http for path in ("POST /v1/completions", "GET /v1/models", "POST /v1/fine_tuning/jobs")
    )
    settings = text("settings.html")
    assert "LORAFLEET_INFERENCE_KV_BYTES" in settings
    assert "device memory of the KV cache" in settings
    assert "LORAFLEET_GATEWAY_KEY_PEPPER" in settings
