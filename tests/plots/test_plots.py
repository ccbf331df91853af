"""Pictures: the right panels, right and wrong told apart, and no global state."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.colors import to_hex, to_rgb
from matplotlib.text import Text

from lightning_rkd import plots

LABELS = torch.arange(24) // 4
IMAGES = torch.arange(24).float().view(-1, 1, 1, 1).expand(-1, 1, 6, 6) / 24
LINE = torch.arange(24).float().view(-1, 1)  # neighbours of a row are the rows beside it


def test_every_query_stands_beside_k_neighbours_of_every_network() -> None:
    figure = plots.neighbours(IMAGES, LABELS, {"a": LINE, "b": -LINE}, queries=[0, 9, 23], k=4)
    assert len(figure.axes) == 3 * (1 + 2 * 4)
    titles = [ax.get_title() + ax.get_title(loc="left") for ax in figure.axes]
    assert [t for t in titles if t] == ["query", "a", "b"]


def test_neighbours_without_labels_have_no_marks() -> None:
    figure = plots.neighbours(IMAGES, None, {"a": LINE}, k=2)
    assert len(figure.axes) == 6 * 3
    assert not any(ax.texts or ax.patches for ax in figure.axes)


def test_the_nearest_rows_are_right_or_wrong_by_colour_and_by_sign() -> None:
    figure = plots.neighbours(IMAGES, LABELS, {"a": LINE}, queries=[3], k=5)
    found = [round(24 * float(ax.images[0].get_array()[0, 0])) for ax in figure.axes]  # type: ignore[index]
    assert (found[0], sorted(found[1:5])) == (3, [1, 2, 4, 5])

    def mark(ax: Axes) -> tuple[str, str]:
        return to_hex(ax.spines["left"].get_edgecolor()), ax.texts[0].get_text()

    marks = [mark(ax) for ax in figure.axes[1:]]
    right, wrong = (plots.RIGHT, "\N{CHECK MARK}"), (plots.WRONG, "\N{MULTIPLICATION SIGN}")
    assert sorted(marks[:2]) == sorted([right, wrong])  # rows 2 and 4 are equally near
    assert sorted(marks[2:4]) == sorted([right, wrong])  # rows 1 and 5
    assert not figure.axes[0].texts, "the query is neither right nor wrong"


def test_queries_are_drawn_from_classes_of_two_images_and_always_the_same() -> None:
    labels = torch.cat([LABELS, torch.tensor([100])])  # a class with one image cannot be asked for
    images, x = torch.rand(25, 3, 6, 6), torch.rand(25, 2)
    first, second = (plots.neighbours(images, labels, {"a": x}, k=1) for _ in range(2))
    found = [[np.asarray(ax.images[0].get_array()) for ax in f.axes[::2]] for f in (first, second)]
    assert len(found[0]) == 6
    assert all((a == b).all() for a, b in zip(*found, strict=True))


def test_relations_are_one_matrix_a_network_relative_to_its_mean_distance() -> None:
    x = torch.rand(24, 3)
    *panels, bar = plots.relations({"a": x, "b": 1000 * x + 5, "c": torch.rand(24, 1)}, LABELS).axes
    assert [ax.get_title(loc="left") for ax in panels] == ["a", "b", "c"]
    assert len({ax.images[0].get_clim() for ax in panels}) == 1
    assert "mean distance" in bar.get_ylabel()
    a, b, _ = (np.asarray(ax.images[0].get_array()) for ax in panels)
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
    long = plots.relations({"a": LINE}, LABELS, ["a rather long name of a class"] * 6)
    assert not long.axes[0].get_yticklabels(), "long names are left out rather than cut"


def test_what_cannot_be_drawn_is_refused() -> None:
    with pytest.raises(ValueError, match="different lengths"):
        plots.neighbours(IMAGES[:3], LABELS, {"a": LINE})
    with pytest.raises(ValueError, match="no embeddings"):
        plots.relations({}, LABELS)
    with pytest.raises(ValueError, match=r"\(N, 1, H, W\) or \(N, 3, H, W\)"):
        plots.neighbours(torch.rand(24, 2, 6, 6), LABELS, {"a": LINE})


@pytest.mark.slow
def test_pyplot_with_its_global_state_is_not_loaded() -> None:
    code = "import sys, lightning_rkd.plots; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_angles_are_those_of_the_same_triplets_in_degrees() -> None:
    right = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    figure = plots.angles({"teacher": right, "turned": 7 * right @ torch.tensor([[0.0, 1.0], [-1.0, 0.0]])})
    ax = figure.axes[0]
    texts = [text.get_text() for text in ax.get_legend().get_texts()]  # type: ignore[union-attr]
    assert texts == ["teacher", "turned, 0.0\N{DEGREE SIGN} from teacher on average"]
    values, edges, _ = ax.patches[0].get_data()  # type: ignore[attr-defined]
    seen = {round(float(edge)) for value, edge in zip(values, edges[:-1], strict=True) if value > 0}
    assert seen == {45, 90}, "a right triangle with two equal legs has angles of 45 and 90 degrees"


def test_two_samples_have_no_angle() -> None:
    with pytest.raises(ValueError, match="an angle takes three"):
        plots.angles({"a": torch.rand(2, 2)})


def test_a_map_that_is_turned_mirrored_and_scaled_is_the_same_map() -> None:
    torch.manual_seed(0)
    x = torch.randn(24, 5) * torch.tensor([9.0, 4.0, 1.0, 0.5, 0.1])
    turn = torch.linalg.qr(torch.randn(5, 5)).Q
    figure = plots.embedding_map(IMAGES, LABELS, {"a": x, "b": 3 * x @ turn + 8})
    places = [np.array([box.xybox for box in ax.artists]) for ax in figure.axes]
    assert places[0].shape == (24, 2)
    np.testing.assert_allclose(places[0], places[1], atol=1e-4)


def test_a_map_has_at_most_eight_classes_in_as_many_colours() -> None:
    labels = torch.arange(24) // 2
    figure = plots.embedding_map(IMAGES, labels, {"a": torch.rand(24, 3)})
    frames = [to_hex(box.patch.get_edgecolor()) for box in figure.axes[0].artists]
    assert len(frames) == 16
    assert len(set(frames)) == 8
    with pytest.raises(ValueError, match="between 1 and 8"):
        plots.embedding_map(IMAGES, LABELS, {"a": LINE}, max_classes=9)


def test_shares_of_the_gradient_sum_to_one() -> None:
    history = {
        "train/task": {5: 2.0, 10: 1.0},
        "distill/a": {5: 0.1, 10: 0.2},
        "distill/b": {5: 0.3, 10: 0.1},
        "gradient/a": {5: 1.0, 10: 3.0},
        "gradient/b": {5: 2.0, 10: 0.0},
    }
    terms, shares = plots.loss_terms(history).axes
    assert [line.get_label() for line in terms.lines] == ["task", "a", "b"]
    values = np.array([line.get_ydata() for line in shares.lines])
    np.testing.assert_allclose(values, [[0.25, 0.25], [0.25, 0.75], [0.5, 0.0]])
    assert len(plots.loss_terms({"train/task": {1: 1.0}}).axes) == 1
    apart = {
        name: {step: 1.0} for step, term in ((1, "a"), (2, "b")) for name in (f"distill/{term}", f"gradient/{term}")
    }
    assert len(plots.loss_terms({"train/task": {1: 1.0}} | apart).axes) == 1, "no step has all"
    with pytest.raises(ValueError, match="nothing to show"):
        plots.loss_terms({"val/recall": {1: 1.0}})


def test_a_term_has_one_colour_in_both_panels() -> None:
    one = {1: 1.0, 2: 0.5}
    history = {"gradient/b": one, "gradient/a": one, "distill/a": one, "distill/other": one, "distill/b": one}
    terms, shares = plots.loss_terms({**history, "train/task": one}).axes
    colours = {line.get_label(): (line.get_color(), line.get_linestyle()) for line in terms.lines}
    assert len(set(colours.values())) == 4
    assert {line.get_label(): (line.get_color(), line.get_linestyle()) for line in shares.lines} == {
        name: colours[name] for name in ("task", "a", "b")
    }


def test_runs_without_a_finite_score_are_left_out() -> None:
    nan = float("nan")
    figure = plots.comparison({"a": {"r": [0.1, nan], "s": [nan]}, "b": {"r": [nan]}}, "b")
    assert [ax.get_xlabel() for ax in figure.axes] == ["r"]
    with pytest.raises(ValueError, match="nothing to show"):
        plots.comparison({"a": {"r": [nan]}})


DRAWN = {
    "neighbours": lambda x: plots.neighbours(IMAGES, LABELS, x),
    "relations": lambda x: plots.relations(x, LABELS),
    "angles": plots.angles,
    "embedding_map": lambda x: plots.embedding_map(IMAGES, LABELS, x),
}


@pytest.mark.parametrize("name", DRAWN)
def test_half_precision_lines_and_collapsed_networks_are_drawn(name: str) -> None:
    x = torch.rand(24, 3, dtype=torch.bfloat16, requires_grad=True)
    state = torch.get_rng_state()
    DRAWN[name]({"a": x, "line": LINE, "collapsed": torch.zeros(24, 2)}).canvas.draw()
    assert torch.equal(state, torch.get_rng_state()), "no random number is drawn"


@pytest.mark.parametrize("name", DRAWN)
def test_what_has_no_place_in_a_picture_is_named(name: str) -> None:
    x = torch.rand(24, 3)
    x[[5, 9], 1] = torch.tensor([float("inf"), float("nan")])
    with pytest.raises(ValueError, match="the embeddings of 'student' hold NaN or infinity, first in row 5"):
        DRAWN[name]({"teacher": LINE, "student": x})
    with pytest.raises(ValueError, match=r"must be \(N, D\), got \(24,\) of 'student'"):
        DRAWN[name]({"teacher": LINE, "student": x[:, 0]})


def test_queries_may_be_a_tensor_and_must_be_rows() -> None:
    assert len(plots.neighbours(IMAGES, LABELS, {"a": LINE}, queries=torch.tensor([1, 2]), k=1).axes) == 4  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"between 0 and 23, got \[24\]"):
        plots.neighbours(IMAGES, LABELS, {"a": LINE}, queries=[0, 24])


def test_any_integer_may_number_a_class() -> None:
    assert len(plots.relations({"a": LINE}, LABELS - 6, list("abcdef")).axes[0].get_yticks()) == 6


@pytest.mark.parametrize("dark", [False, True])
def test_text_of_every_figure_is_legible_on_both_backgrounds(dark: bool) -> None:
    x = {"teacher": torch.rand(24, 3), "student": torch.rand(24, 2)}
    figures = [
        plots.neighbours(IMAGES, LABELS, x, title="t", dark=dark),
        plots.relations(x, LABELS, title="t", dark=dark),
        plots.angles(x, title="t", dark=dark),
        plots.embedding_map(IMAGES, LABELS, x, title="t", dark=dark),
        plots.curves({"a": {1: 0.5, 2: 0.6}}, "recall@1", title="t", dark=dark),
        plots.loss_terms({"train/task": {1: 0.5, 2: 0.6}}, title="t", dark=dark),
        plots.comparison({"a": {"r": [0.1, 0.2]}, "b": {"r": [0.3]}}, "a", title="t", dark=dark),
    ]
    for figure in figures:
        figure.canvas.draw()
        paper = luminance(figure.get_facecolor())
        texts = [text for text in figure.findobj(Text) if text.get_visible()]
        texts = [text for text in texts if text.get_text().strip("\N{CHECK MARK}\N{MULTIPLICATION SIGN}")]
        assert texts
        for text in texts:
            low, high = sorted([paper, luminance(to_rgb(text.get_color()))])
            assert (high + 0.05) / (low + 0.05) >= 4.5, f"{text.get_text()!r} is hard to read"  # WCAG 2, AA


def luminance(colour: tuple[float, ...]) -> float:
    """Relative luminance as WCAG 2 defines it."""
    parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in colour[:3]]
    return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]


def test_a_metrics_file_of_another_make_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.csv").write_text("a,b\n1,2\n")
    with pytest.raises(ValueError, match="no column 'step'"):
        plots.read_metrics(tmp_path / "x.csv")
