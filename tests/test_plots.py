import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from gptjax import plots

LINES = [
    {"step": 10, "cross_entropy": 4.0, "loss": 4.1},
    {"step": 20, "cross_entropy": 3.0, "loss": 3.1, "validation_loss": 3.25},
    {"step": 30, "cross_entropy": 2.0, "loss": 2.1, "validation_loss": 2.5},
]


def _weights(layers: int, heads: int, length: int) -> np.ndarray:
    weights = np.tril(np.random.default_rng(0).random((layers, heads, length, length)))
    return weights / weights.sum(-1, keepdims=True)


def _labels(figure: Figure) -> list[str]:
    return [label.get_text() for label in figure.axes[0].get_xticklabels()]


def test_the_loss_curve_shows_both_losses_over_steps():
    figure = plots.loss_curve(LINES, title="a run")
    (axes,) = figure.axes
    trained, held_out = axes.get_lines()
    np.testing.assert_array_equal(trained.get_xydata(), [[10, 4], [20, 3], [30, 2]])
    np.testing.assert_array_equal(held_out.get_xydata(), [[20, 3.25], [30, 2.5]])
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "cross-entropy, nats a token"
    assert axes.get_title() == "a run"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training batch", "validation"]
    assert [text.get_text() for text in axes.texts] == ["2.500"]


def test_a_run_without_evaluation_has_one_line():
    (axes,) = plots.loss_curve(LINES[:1]).axes
    assert len(axes.get_lines()) == 1


def test_the_attention_grid_has_a_row_for_each_layer_and_a_column_for_each_head():
    weights, tokens = _weights(2, 3, 4), ["The", "·cat", "·sat", "↵"]
    figure = plots.attention_grid(weights, tokens, title="heads")
    *panels, colorbar = figure.axes
    assert [panel.get_title() for panel in panels] == [
        f"layer {layer}, head {head}" for layer in range(2) for head in range(3)
    ]
    places = [panel.get_subplotspec() for panel in panels]
    assert [(place.rowspan.start, place.colspan.start) for place in places if place] == [
        (layer, head) for layer in range(2) for head in range(3)
    ]
    for panel, shown in zip(panels, weights.reshape(6, 4, 4), strict=True):
        (image,) = panel.get_images()
        np.testing.assert_array_equal(image.get_array(), shown)
        assert image.get_clim() == (0, 1)  # One scale, so that panels can be compared.
    bottom_left = panels[3]  # Panels share their axes; the outer ones are labelled.
    assert [label.get_text() for label in bottom_left.get_xticklabels()] == tokens
    assert [label.get_text() for label in bottom_left.get_yticklabels()] == tokens
    assert colorbar.get_ylabel() == "attention weight"
    assert figure.get_suptitle() == "heads"
    assert figure.get_supxlabel() == "is looked at"
    assert figure.get_supylabel() == "looks"


def test_the_first_key_is_left_and_the_first_query_on_top():
    (panel, _) = plots.attention_grid(_weights(1, 1, 3), ["a", "b", "c"]).axes
    assert panel.get_xlim() == (-0.5, 2.5)
    assert panel.get_ylim() == (2.5, -0.5)


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The", "The"),
        (" cat", "·cat"),
        ("a\n\tb", "a↵→b"),
        ("\r\0", r"\r\x00"),
        ("\u00a0\u3000\u200b", r"\xa0\u3000\u200b"),
        ("中文", "中文"),
        ("$x_1^2$", "$x_1^2$"),
        ("", ""),
    ],
)
def test_a_label_makes_white_space_and_control_characters_visible(text, label):
    assert plots.token_label(text) == label
    assert plots.token_label(text).isprintable()


@pytest.mark.parametrize(
    "tokens",
    [
        ["$", "a$b$", r"\$", "$\\frac$"],
        ["_", "a_b", "__init__", "^{"],
        ["\\", "\\n", "{", "%"],
        ["中", "文", "👍", "\ufffd"],
        ["\r", "\0", "\x1b[31m", "\u200d"],
    ],
    ids=["dollars", "underscores", "backslashes", "no glyph in the font", "control characters"],
)
def test_any_token_can_be_a_label_and_stands_as_it_is(tokens, tmp_path):
    labels = [plots.token_label(token) for token in tokens]
    figure = plots.attention_grid(_weights(1, 1, 4), labels)
    plots.save(figure, tmp_path / "attention.png")
    assert _labels(figure) == labels
    assert not any(label.get_parse_math() for label in figure.axes[0].get_xticklabels())


def test_a_saved_figure_is_a_picture_of_the_size_asked_for(tmp_path):
    plots.save(plots.loss_curve(LINES), tmp_path / "loss.png")
    pixels = imread(tmp_path / "loss.png")
    assert pixels.shape[:2] == (4 * 160, 7 * 160)
    assert pixels.std() > 0.01
    plots.save(plots.attention_grid(_weights(1, 6, 2), ["a", "b"]), tmp_path / "attention.png")
    assert max(imread(tmp_path / "attention.png").shape) == 14 * 160
    wide = plots.attention_grid(_weights(1, 6, 2), ["a", "b"])
    plots.save(wide, tmp_path / "attention.png", most_pixels=500)
    assert 450 < max(imread(tmp_path / "attention.png").shape) <= 500
