"""Thinning the training log, and the loss curve of the model card."""

import xml.etree.ElementTree as ElementTree

import pytest

from assets.training_log import MAX_LINES, joined, loss_curve_svg, thin

LOG = [{"step": 10.0 * n, "tokens": 4096.0 * n, "loss": 8.0 - n / 100} for n in range(1, 522)]


def test_thin_keeps_the_end_and_the_mean_loss() -> None:
    thinned = thin(LOG)
    assert len(thinned) <= MAX_LINES
    assert thinned[-1]["tokens"] == LOG[-1]["tokens"]
    assert thinned[0]["step"] == LOG[2]["step"]
    assert thinned[0]["loss"] == pytest.approx(sum(line["loss"] for line in LOG[:3]) / 3, abs=1e-4)


def test_a_short_log_stays_as_it_is() -> None:
    assert thin(LOG[:50]) == LOG[:50]


def test_an_empty_log_is_refused() -> None:
    with pytest.raises(ValueError, match="no lines"):
        thin([])


def test_the_curve_is_well_formed_and_falls() -> None:
    picture = ElementTree.fromstring(loss_curve_svg(LOG))  # noqa: S314 - we just wrote it
    line = picture.find("{http://www.w3.org/2000/svg}polyline")
    assert line is not None
    points = [tuple(map(float, point.split(","))) for point in line.attrib["points"].split()]
    assert len(points) == len(LOG)
    assert points[0][1] < points[-1][1]
    assert points[0][0] < points[-1][0]


def test_stages_go_on_counting() -> None:
    first = [{"step": 10, "tokens": 100, "elapsed_seconds": 1.0, "loss": 5.0}]
    second = [{"step": n * 10, "tokens": n * 50, "elapsed_seconds": n * 2.0, "loss": 4.0} for n in (1, 2)]
    lines = joined([first, second])
    assert [line["step"] for line in lines] == [10, 20, 30]
    assert [line["tokens"] for line in lines] == [100, 150, 200]
    assert [line["elapsed_seconds"] for line in lines] == [1.0, 3.0, 5.0]
    assert [line["loss"] for line in lines] == [5.0, 4.0, 4.0]
