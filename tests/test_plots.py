"""Pictures: the right panels, right and wrong told apart, and no global state."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex

from lightning_rkd import plots

LABELS = torch.arange(24) // 4
IMAGES = torch.arange(24).float().view(-1, 1, 1, 1).expand(-1, 1, 6, 6) / 24
LINE = torch.arange(24).float().view(-1, 1)  # neighbours of a row are the rows beside it


def test_every_query_shows_itself_and_k_neighbours_of_every_network() -> None:
    figure = plots.neighbours(IMAGES, LABELS, {"a": LINE, "b": -LINE}, queries=[0, 9, 23], k=4)
    assert len(figure.axes) == 3 * (1 + 2 * 4)
    titles = [ax.get_title() + ax.get_title(loc="left") for ax in figure.axes]
    assert [t for t in titles if t] == ["query", "a", "b"]


def test_the_neighbours_are_the_nearest_rows_and_never_the_query() -> None:
    figure = plots.neighbours(IMAGES, LABELS, {"a": LINE}, queries=[0], k=3)
    shown = [round(24 * float(ax.images[0].get_array()[0, 0])) for ax in figure.axes]  # type: ignore[index]
    assert shown == [0, 1, 2, 3]


def test_right_and_wrong_differ_by_colour_and_by_sign() -> None:
    figure = plots.neighbours(IMAGES, LABELS, {"a": LINE}, queries=[3], k=5)

    def mark(ax: Axes) -> tuple[str, str]:
        return to_hex(ax.spines["left"].get_edgecolor()), ax.texts[0].get_text()

    marks = [mark(ax) for ax in figure.axes[1:]]
    right, wrong = (plots.RIGHT, "\N{CHECK MARK}"), (plots.WRONG, "\N{MULTIPLICATION SIGN}")
    assert sorted(marks[:2]) == sorted([right, wrong])  # rows 2 and 4 are equally near
    assert sorted(marks[2:4]) == sorted([right, wrong])  # rows 1 and 5
    assert not figure.axes[0].texts, "the query is neither right nor wrong"


def test_queries_are_drawn_from_different_classes_that_have_an_answer_and_always_the_same() -> None:
    labels = torch.cat([LABELS, torch.tensor([100])])  # a class with one image cannot be asked for
    images, x = torch.rand(25, 3, 6, 6), torch.rand(25, 2)
    first, second = (plots.neighbours(images, labels, {"a": x}, k=1) for _ in range(2))
    shown = [[np.asarray(ax.images[0].get_array()) for ax in f.axes[::2]] for f in (first, second)]
    assert len(shown[0]) == 6
    assert all((a == b).all() for a, b in zip(*shown, strict=True))


def test_relations_show_one_matrix_a_network_on_one_scale() -> None:
    figure = plots.relations({"a": torch.rand(24, 3), "b": torch.rand(24, 9), "c": torch.rand(24, 1)}, LABELS)
    *panels, bar = figure.axes
    assert [ax.get_title(loc="left") for ax in panels] == ["a", "b", "c"]
    assert len({ax.images[0].get_clim() for ax in panels}) == 1
    assert "mean distance" in bar.get_ylabel()


def test_distances_are_relative_so_scale_does_not_show() -> None:
    x = torch.rand(24, 3)
    figure = plots.relations({"a": x, "b": 1000 * x + 5}, LABELS)
    a, b = (np.asarray(ax.images[0].get_array()) for ax in figure.axes[:2])
    np.testing.assert_allclose(a, b, atol=1e-5)
    assert a.sum() / (24 * 23) == pytest.approx(1)


def test_samples_of_a_class_stand_together_and_are_named() -> None:
    names = [f"class {i}" for i in range(6)]
    figure = plots.relations({"a": 10 * LABELS.float().view(-1, 1)}, LABELS, names, max_classes=4, samples_per_class=3)
    matrix = np.asarray(figure.axes[0].images[0].get_array())
    assert matrix.shape == (12, 12)
    blocks = np.kron(np.eye(4), np.ones((3, 3)))
    assert ((matrix == 0) == (blocks == 1)).all()
    written = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert len(set(written)) == 4
    assert set(written) <= set(names)


def test_long_class_names_are_left_out_rather_than_cut() -> None:
    names = ["a rather long name of a class"] * 6
    figure = plots.relations({"a": LINE}, LABELS, names)
    assert not figure.axes[0].get_yticklabels()


def test_a_collapsed_network_can_be_drawn() -> None:
    x = torch.zeros(24, 2)
    plots.neighbours(IMAGES, LABELS, {"a": x}).canvas.draw()
    plots.relations({"a": x}, LABELS).canvas.draw()


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        plots.relations({"a": LINE[:5]}, LABELS)
    with pytest.raises(ValueError, match="different lengths"):
        plots.neighbours(IMAGES[:3], LABELS, {"a": LINE})
    with pytest.raises(ValueError, match="no embeddings"):
        plots.relations({}, LABELS)
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\) or \(N, 3, H, W\)"):
        plots.neighbours(torch.rand(24, 2, 6, 6), LABELS, {"a": LINE})


def test_drawing_draws_no_random_number() -> None:
    state = torch.get_rng_state()
    plots.neighbours(IMAGES, LABELS, {"a": LINE})
    plots.relations({"a": LINE}, LABELS)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.slow
def test_pyplot_with_its_global_state_is_not_loaded() -> None:
    code = "import sys, lightning_rkd.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
