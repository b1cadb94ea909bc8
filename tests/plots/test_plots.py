"""Figures say what they were given, and can be read: in print, in grey, by anyone, in Chinese."""

import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage, imread
from matplotlib.patches import Rectangle
from matplotlib.text import Text

from gptjax import plots
from gptjax.config import InputError
from gptjax.plots import legible
from gptjax.plots.colours import diverging, sequential
from gptjax.plots.comparisons import FittedLine, Points
from gptjax.plots.curves import line_style

LAW = "机器人必须服从人给予它的命令，除非这些命令与第一法则相冲突。"
TRADITIONAL = "機器人必須服從人給予它的命令，除非這些命令與第一法則相衝突。"
WORDS = ["A", "robot", "must", "obey", "the", "orders", "given", "it", "by", "human", "beings"]
ENGLISH = [WORDS[0], *(plots.token_label(f" {word}") for word in WORDS[1:]), ",↵"]
LINES = [
    {"step": 10, "cross_entropy": 4.0, "loss": 4.1},
    {"step": 20, "cross_entropy": 3.0, "loss": 3.1, "validation_loss": 3.25},
    {"step": 30, "cross_entropy": 2.0, "loss": 2.1, "validation_loss": 2.5},
]


def _random(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).random(shape)


def _weights(layers: int, heads: int, length: int) -> np.ndarray:
    weights = np.tril(_random(layers, heads, length, length))
    return weights / weights.sum(-1, keepdims=True)


def _tokens(length: int) -> list[str]:
    return list(itertools.islice(itertools.cycle(ENGLISH), length))


STEPS = np.arange(1, 21)
VARIANTS = [
    "gpt2",
    "alibi",
    "neox-style",
    "llama-style",
    "post-norm",
    "qk-norm",
    "lstm",
    "quickstart:width=64,position_embedding=none",
    "一个",
]
RATES, SIZES = np.array([1e-3, 3e-3, 1e-2]), np.array([3e5, 1e6, 3e6, 1e7])


def _falling() -> dict[str, Points]:
    steps = np.arange(100_000, 1_000_001, 100_000)
    return {name: Points(steps, 2 + 3e5 / steps[:, None] + _random(10, 5)) for name in VARIANTS}


FIGURES = {
    "loss": lambda: plots.loss_curve(LINES, "a run"),
    "heads": lambda: plots.attention_grid(_weights(2, 3, 12), ENGLISH, "a few heads"),
    "144 heads": lambda: plots.attention_grid(_weights(12, 12, 24), _tokens(24), "GPT-2"),
    "heads, Chinese": lambda: plots.attention_grid(_weights(1, 4, 30), list(LAW), LAW),
    "heads of 64 tokens": lambda: plots.attention_grid(_weights(1, 2, 64), _tokens(64)),
    "cross-attention": lambda: plots.attention_grid(
        _random(2, 2, 12, 30), ENGLISH, columns=list(LAW)
    ),
    "head": lambda: plots.attention_map(_weights(1, 1, 12)[0, 0], ENGLISH, "layer 1, head 2"),
    "head of 64 tokens": lambda: plots.attention_map(_weights(1, 1, 64)[0, 0], _tokens(64)),
    "head, 64 Chinese": lambda: plots.attention_map(
        _weights(1, 1, 64)[0, 0], list(f"{LAW}{TRADITIONAL}{LAW}")[:64], "两种汉字"
    ),
    "head, a long token": lambda: plots.attention_map(np.eye(2), ["a" * 300, "b"]),
    "lens": lambda: plots.logit_lens_table(ENGLISH, [ENGLISH[::-1]] * 13, _random(13, 12)),
    "lens of 40 tokens": lambda: plots.logit_lens_table(
        _tokens(40), [_tokens(40)] * 3, 3 * _random(3, 40), label="nats"
    ),
    "lens, Chinese": lambda: plots.logit_lens_table(
        list(LAW), [list(TRADITIONAL)] * 5, _random(5, 30), "它后面是什么？"
    ),
    "scores": lambda: plots.score_grid(_random(12, 12) - 0.5, label="nats"),
    "scores of 1,200 heads": lambda: plots.score_grid(30 * _random(48, 25) - 15, label="nats"),
    "one score": lambda: plots.score_grid(_random(1, 1), label="of a single head", title="alone"),
    "patching": lambda: plots.patching_map(_random(12, 12) - 0.5, ENGLISH, label="logits"),
    "patching of 64 tokens": lambda: plots.patching_map(
        _random(12, 64) - 0.5, _tokens(64), label="logits", title="a long title, " * 12
    ),
    "tokens": lambda: plots.token_values(_tokens(50), _random(50), label="nats", title="loss"),
    "tokens, Chinese": lambda: plots.token_values(list(LAW) * 4, _random(120) - 0.5, label="nats"),
    "curves": lambda: plots.curves(
        STEPS,
        {f"variant {i}, 变体": _random(20, 3) + i for i in range(8)},
        xlabel="step",
        ylabel="loss",
        log_x=True,
    ),
    "bars": lambda: plots.bars(
        [*ENGLISH, "一个"], _random(13), _random(13, 2), label="loss", title="compared"
    ),
    "differences": lambda: plots.differences(
        VARIANTS,
        np.sort(_random(9, 3) - 0.5)[:, [1, 0, 2]],
        runs=list(_random(9, 5) - 0.5),
        label="loss minus the baseline's",
        sides=("better", "worse"),
        title="compared",
    ),
    "curves by variant": lambda: plots.curves_by_variant(
        _falling(), xlabel="tokens", ylabel="loss", title="along training"
    ),
    "panels of differences": lambda: plots.difference_panels(
        _falling(), xlabel="tokens", ylabel="loss minus the baseline's"
    ),
    "frontier": lambda: plots.frontier(
        VARIANTS,
        {"FLOPs per token": 1e6 * (1 + _random(9)), "seconds per token": _random(9)},
        np.sort(_random(9, 3))[:, [1, 0, 2]],
        ylabel="loss",
        title="what it costs",
    ),
    "loss by rate": lambda: plots.loss_by_rate(
        {name: Points(RATES, _random(3, 2)) for name in VARIANTS},
        [3e-3] * 9,
        ylabel="loss",
        title="the search",
    ),
    "scaling": lambda: plots.scaling(
        {name: Points(SIZES, 2 + _random(4, 3)) for name in VARIANTS[:4]},
        {
            name: FittedLine(SIZES, 2 + np.zeros(4), 1.9 + np.zeros(4), 2.1 + np.zeros(4))
            for name in VARIANTS[:4]
        },
        xlabel="parameters",
        ylabel="loss",
        title="laws",
    ),
}


@functools.cache
def _figure(name: str) -> Figure:
    return FIGURES[name]()


@functools.cache
def _drawn(name: str) -> list[Text]:
    """The texts that drawing a figure really draws."""
    drawn = []
    draw = Text.draw

    def record(text: Text, renderer) -> None:
        drawn.append(text)
        draw(text, renderer)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Text, "draw", record)
        FigureCanvasAgg(_figure(name)).draw()
    return [text for text in drawn if text.get_visible() and text.get_text().strip()]


def _luminance(colour) -> float:
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def _contrast(one, other) -> float:
    """WCAG 2.2's contrast ratio, from 1 to 21."""
    dark, bright = sorted((_luminance(one), _luminance(other)))
    return (bright + 0.05) / (dark + 0.05)


def _colour_of(image: AxesImage, value: float) -> tuple[float, float, float]:
    """Red, green and blue that stand for a value."""
    red, green, blue, _ = image.to_rgba(np.array([value]))[0]
    return red, green, blue


def _texts(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def _ticks(axis) -> list[str]:
    return [label.get_text() for label in axis.get_ticklabels()]


# What can be read.


@pytest.mark.parametrize("name", FIGURES)
def test_no_text_lies_on_another_one_or_leaves_the_page_or_is_small(name):
    figure = _figure(name)
    texts = _drawn(name)
    assert texts
    assert min(float(text.get_fontsize()) for text in texts) >= 6
    assert figure.get_size_inches()[0] <= 7.2
    assert figure.get_size_inches()[1] <= 10.5
    low, high = np.array([text.get_window_extent().get_points() for text in texts]).swapaxes(0, 1)
    assert (low > -1).all()
    assert (high < np.add(figure.bbox.max, 1)).all()
    shared = np.minimum(high[:, None], high) - np.maximum(low[:, None], low)  # [texts, texts, xy]
    overlapping = np.argwhere(np.triu((shared > 0.5).all(-1), k=1))
    assert not [(texts[one].get_text(), texts[other].get_text()) for one, other in overlapping]


@pytest.mark.parametrize("name", FIGURES)
def test_text_on_colours_stands_out_and_stays_in_its_cell(name):
    for text in _drawn(name):
        axes = text.axes
        if axes is None or text not in axes.texts:
            continue
        box = text.get_window_extent().transformed(axes.transData.inverted())
        x, y = text.get_position()
        if axes.get_images():
            (image,) = axes.get_images()
            ground = image.to_rgba(np.ma.asarray(image.get_array()))[round(y), round(x)]
            assert (box.width, abs(box.height)) <= (1, 1.05)
        elif rectangles := [patch for patch in axes.patches if isinstance(patch, Rectangle)]:
            (ground,) = (
                cell.get_facecolor()
                for cell in rectangles
                if 0 < x - cell.get_x() < cell.get_width()
                and 0 < y - cell.get_y() < cell.get_height()
            )
        else:
            ground = "white"
        assert _contrast(text.get_color(), ground) >= 4.5


def test_values_stay_in_order_in_grey():
    grey = [_luminance(colour) for colour in legible.colour_map(legible.SEQUENTIAL)(np.arange(256))]
    assert (np.diff(grey) < 0).all()
    assert grey[0] > 0.9
    assert grey[-1] < 0.01
    diverging = [
        _luminance(colour) for colour in legible.colour_map(legible.DIVERGING)(np.arange(256))
    ]
    assert (np.diff(diverging[:127]) > 0).all()
    assert (np.diff(diverging[129:]) < 0).all()


LINEAR_RGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)
# Machado, Oliveira and Fernandes 2009, severity 1, in linear RGB.
EYES = {
    "deuteranopia": [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    "protanopia": [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
}


def _seen(colour, eye: str) -> np.ndarray:
    """A colour in CIE L*a*b*, as an eye sees it."""
    channels = np.array(to_rgb(colour))
    linear = np.where(channels <= 0.04045, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4)
    x, y, z = np.cbrt(
        LINEAR_RGB_TO_XYZ @ np.clip(EYES[eye] @ linear, 1e-3, 1) / LINEAR_RGB_TO_XYZ.sum(1)
    )
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("eye", EYES)
def test_the_colour_blind_tell_lines_and_signs_apart(eye):
    for one, other in itertools.combinations(legible.LINES, 2):
        assert np.linalg.norm(_seen(one, eye) - _seen(other, eye)) > 10, (one, other)
    diverging = legible.colour_map(legible.DIVERGING)
    for size in (0.1, 0.2, 0.3, 0.4, 0.5):
        ends = [_seen(diverging(0.5 + sign * size), eye) for sign in (-1, 1)]
        assert np.linalg.norm(ends[0] - ends[1]) > 10, size


def test_lines_are_told_apart_in_grey_by_their_dashes_and_marks():
    styles = [line_style(index, points=20) for index in range(49)]
    for key in ("linestyle", "marker"):
        assert len({str(style[key]) for style in styles[:7]}) == 7
    assert len({(style["color"], str(style["linestyle"])) for style in styles}) == 49


# Fonts.


def _codec(name: str, first: range, second: range) -> set[str]:
    pairs = (bytes(pair) for pair in itertools.product(first, second))
    return {
        text for pair in pairs if len(text := pair.decode(name, "ignore")) == 1 and text > "\x7f"
    }


def test_the_fonts_have_simplified_and_traditional_chinese():
    characters = _codec("gb2312", range(0xA1, 0xF8), range(0xA1, 0xFF))
    characters |= _codec("big5", range(0xA1, 0xFA), range(0x40, 0xFF))
    assert len(characters) > 15_000
    assert {text for text in characters if plots.token_label(text) != text} <= {"\u3000"}


def test_chinese_is_drawn_and_in_its_chinese_form(tmp_path):
    pictures = []
    for text in ("令", "骨", "令"):
        plots.save(plots.attention_map(np.ones((1, 1)), [text]), tmp_path / "one.png")
        pictures.append(imread(tmp_path / "one.png"))
    assert (pictures[0] != pictures[1]).any()  # Two boxes would be alike.
    np.testing.assert_array_equal(pictures[0], pictures[2])
    figure = plots.attention_map(np.ones((1, 1)), ["令"])
    assert all(text.get_fontfamily()[-1] == "Noto Sans CJK SC" for text in figure.findobj(Text))


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("The", "The"),
        (" cat", "·cat"),
        ("a\n\tb", "a↵→b"),
        ("\r\0", r"\r\x00"),
        ("\u00a0\u3000\u200b", r"\xa0\u3000\u200b"),
        ("中文", "中文"),
        ("한국어, 日本語, Ελληνικά", "한국어,·日本語,·Ελληνικά"),
        ("$x_1^2$", "$x_1^2$"),
        ("an 👍\U00012000", r"an·\U0001f44d\U00012000"),
        ("", ""),
    ],
)
def test_a_label_makes_visible_what_would_not_be(text, label):
    assert plots.token_label(text) == label
    assert plots.token_label(label) == label
    assert label.isprintable()


@pytest.mark.parametrize(
    "tokens",
    [
        ["$", "a$b$", r"\$", "$\\frac$"],
        ["_", "a_b", "__init__", "^{"],
        ["\\", "\\n", "{", "%"],
        ["中", "文", "👍", "\ufffd"],
        ["\r", "\0", "\x1b[31m", "\u200d"],
    ],
    ids=["dollars", "underscores", "backslashes", "no glyph in a font", "control characters"],
)
def test_any_token_can_be_a_label_and_stands_as_it_is(tokens, tmp_path):
    labels = [plots.token_label(token) for token in tokens]
    figure = plots.attention_grid(_weights(1, 1, 4), labels)
    plots.save(figure, tmp_path / "attention.png")
    assert _ticks(figure.axes[0].xaxis) == labels
    assert not any(text.get_parse_math() for text in figure.findobj(Text))


BARE = ["a", "the 👍", "c"]
REFUSAL = r"^No font covers '👍' \(U\+1F44D\) of the text 'the 👍': .*token_label.*\.$"


@pytest.mark.parametrize(
    "draw",
    [
        lambda: plots.attention_grid(_weights(1, 1, 3), BARE),
        lambda: plots.attention_map(_weights(1, 1, 3)[0, 0], BARE),
        lambda: plots.attention_map(_random(1, 3), ["b"], columns=BARE),
        lambda: plots.logit_lens_table(BARE, [["b"] * 3], _random(1, 3)),
        lambda: plots.logit_lens_table(["b"] * 3, [BARE], _random(1, 3)),
        lambda: plots.patching_map(_random(1, 3), BARE, label="nats"),
        lambda: plots.token_values(BARE, _random(3), label="nats"),
        lambda: plots.bars(BARE, _random(3), label="nats"),
        lambda: plots.curves(STEPS, {BARE[1]: _random(20)}, xlabel="step", ylabel="loss"),
        lambda: plots.score_grid(_random(1, 3), label="nats", title=BARE[1]),
    ],
)
def test_a_token_that_no_font_covers_is_refused_in_one_sentence(draw):
    with pytest.raises(InputError, match=REFUSAL):
        draw()


def test_nothing_is_written_of_a_figure_that_no_font_covers(tmp_path):
    figure = plots.loss_curve(LINES)
    figure.text(0, 0, BARE[1])
    with pytest.raises(InputError, match=REFUSAL):
        plots.save(figure, tmp_path / "loss.png")
    assert not list(tmp_path.iterdir())


def test_a_figure_of_the_users_own_is_saved_in_chinese_too(tmp_path):
    figure = Figure()
    figure.text(0.5, 0.5, f"{TRADITIONAL} $x^2$", family="DejaVu Serif")
    plots.save(figure, tmp_path / "own.png")  # A missing glyph would warn, which fails a test.
    (text,) = (text for text in figure.findobj(Text) if text.get_text())
    assert text.get_fontfamily()[0] == "DejaVu Serif"
    assert text.get_parse_math()


def test_a_saved_figure_is_a_picture_of_the_size_asked_for(tmp_path):
    figure = _figure("heads, Chinese")
    plots.save(figure, tmp_path / "heads.png")
    pixels = imread(tmp_path / "heads.png")
    assert pixels.shape[:2] == tuple(np.floor(300 * figure.get_size_inches() + 1e-6)[::-1])
    assert pixels.std() > 0.01
    plots.save(figure, tmp_path / "heads.png", most_pixels=500)
    assert 450 < max(imread(tmp_path / "heads.png").shape) <= 500
    for suffix, begins in {"pdf": b"%PDF", "svg": b"<?xml"}.items():
        plots.save(figure, tmp_path / f"heads.{suffix}")
        assert (tmp_path / f"heads.{suffix}").read_bytes().startswith(begins)


def test_figures_leave_pyplot_and_the_settings_alone():
    code = """
import sys
import matplotlib
before = matplotlib.rcParams.copy()
from gptjax import plots
import numpy as np
plots.attention_map(np.eye(2), list("中文"))
assert matplotlib.rcParams.copy() == before
assert "matplotlib.pyplot" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# What is said.


def test_the_loss_curve_shows_both_losses_over_steps():
    (axes,) = _figure("loss").axes
    trained, held_out = axes.get_lines()
    np.testing.assert_array_equal(trained.get_xydata(), [[10, 4], [20, 3], [30, 2]])
    np.testing.assert_array_equal(held_out.get_xydata(), [[20, 3.25], [30, 2.5]])
    assert axes.get_xlabel() == "step"
    assert axes.get_ylabel() == "cross-entropy, nats per token"
    assert axes.get_title() == "a run"
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["training batch", "validation"]
    assert _texts(axes) == ["2.500"]


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
    lefts = [round(panel.get_position().x0, 6) for panel in panels]
    tops = [round(panel.get_position().y1, 6) for panel in panels]
    assert lefts[:3] == sorted(set(lefts)) == lefts[3:]
    assert len(set(tops[:3])) == len(set(tops[3:])) == 1
    assert tops[0] > tops[3]
    for panel, shown in zip(panels, weights.reshape(6, 4, 4), strict=True):
        (image,) = panel.get_images()
        np.testing.assert_array_equal(np.ma.getdata(np.ma.asarray(image.get_array())), shown)
        assert image.get_clim() == (0, 1)  # One scale, so that panels can be compared.
    bottom_left = panels[3]  # The outer panels are labelled.
    assert _ticks(bottom_left.xaxis) == _ticks(bottom_left.yaxis) == tokens
    assert _ticks(panels[1].xaxis) == _ticks(panels[1].yaxis) == []
    assert colorbar.get_xlabel() == "attention weight; hatched: mask"
    assert figure.get_suptitle() == "heads"
    assert figure.get_supxlabel() == "key"
    assert figure.get_supylabel() == "query"


def test_chosen_heads_keep_their_numbers_and_small_panels_say_them_briefly():
    weights = _random(2, 2, 3, 3)
    figure = plots.attention_grid(weights, ["a", "b", "c"], layers=[3, 11], heads=[0, 5])
    titles = [panel.get_title() for panel in figure.axes[:4]]
    assert titles == [f"layer {layer}, head {head}" for layer in (3, 11) for head in (0, 5)]
    assert _figure("144 heads").axes[143].get_title() == "11.11"


def test_cross_attention_has_other_columns_than_rows():
    grid = _figure("cross-attention").axes[2]
    assert _ticks(grid.yaxis) == ENGLISH
    assert _ticks(grid.xaxis) == list(LAW)
    head, _ = plots.attention_map(_random(2, 3), ["a", "b"], columns=["x", "y", "z"]).axes
    assert _ticks(head.yaxis) == ["a", "b"]
    assert _ticks(head.xaxis) == ["x", "y", "z"]


def test_where_labels_are_left_out_it_is_said():
    figure = _figure("144 heads")
    panel = figure.axes[132]
    step = len(_tokens(24)) // len(_ticks(panel.yaxis))
    assert step > 1
    assert _ticks(panel.yaxis) == _tokens(24)[::step]
    assert figure.get_supylabel() == f"query (1 in {step} labelled)"
    assert "labelled" in figure.get_supxlabel()


def test_a_head_of_64_chinese_tokens_names_every_one_upright():
    axes = _figure("head, 64 Chinese").axes[0]
    assert len(_ticks(axes.xaxis)) == len(_ticks(axes.yaxis)) == 64
    assert {label.get_rotation() for label in axes.get_xticklabels()} == {0}
    assert _figure("head, 64 Chinese").get_supxlabel() == "key"


def test_the_first_key_is_left_and_the_first_query_on_top():
    for figure in (_figure("heads"), _figure("head")):
        assert figure.axes[0].get_xlim() == (-0.5, 11.5)
        assert figure.axes[0].get_ylim() == (11.5, -0.5)


def test_what_a_mask_hides_is_hatched_and_is_not_a_weight_of_0():
    weights = np.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.5, 0.0, 0.5]])
    later = np.triu(np.ones((3, 3), bool), 1)
    for figure in (
        plots.attention_map(weights, ["a", "b", "c"]),
        plots.attention_grid(weights[None, None], ["a", "b", "c"]),
        plots.attention_map(weights, ["a", "b", "c"], hidden=later),
    ):
        axes = figure.axes[0]
        (image,) = axes.get_images()
        np.testing.assert_array_equal(np.ma.getmaskarray(np.ma.asarray(image.get_array())), later)
        (hatched,) = axes.patches
        assert hatched.get_hatch()
        path = hatched.get_path()
        inside = [path.contains_point((column, row)) for row, column in np.ndindex(3, 3)]
        assert inside == later.ravel().tolist()
        assert "hatched" in figure.axes[-1].get_xlabel()
        background = np.array(hatched.get_facecolor())[:3]
        assert np.abs(np.subtract(background, _colour_of(image, 0.0))).max() > 0.02
    assert _texts(plots.attention_map(weights, ["a", "b", "c"]).axes[0]) == [
        "1.00", "0.00", "1.00", "0.50", "0.00", "0.50"
    ]  # fmt: skip


def test_nothing_is_hatched_where_nothing_is_hidden():
    for figure in (
        plots.attention_map(np.full((2, 2), 0.5), ["a", "b"]),
        plots.attention_map(np.tri(2, 3), ["a", "b"], columns=["x", "y", "z"]),
        plots.attention_map(np.tri(2), ["a", "b"], hidden=np.zeros((2, 2), bool)),
    ):
        assert not figure.axes[0].patches
        assert figure.axes[-1].get_xlabel() == "attention weight"


def test_a_mask_of_its_own_may_differ_by_layer():
    window = np.tri(3, dtype=bool) & ~np.tri(3, k=-2, dtype=bool)
    hidden = ~np.stack([np.tri(3, dtype=bool), window])[:, None]
    figure = plots.attention_grid(np.ones((2, 2, 3, 3)) / 3, ["a", "b", "c"], hidden=hidden)
    for panel, unseen in zip(figure.axes[:4], np.repeat(hidden[:, 0], 2, axis=0), strict=True):
        (image,) = panel.get_images()
        np.testing.assert_array_equal(np.ma.getmaskarray(np.ma.asarray(image.get_array())), unseen)


def test_values_that_hardly_differ_are_told_apart_by_their_colours():
    values = np.array([[0.17, 0.175], [0.18, 0.17]])
    for figure in (
        plots.score_grid(values, label="nats"),
        plots.patching_map(values, ["a", "b"], label="nats"),
    ):
        (image,) = figure.axes[0].get_images()
        assert image.get_clim() == (0.17, 0.18)
        darkness = 1 - np.array([_luminance(_colour_of(image, value)) for value in values.ravel()])
        assert darkness[0] == darkness[3] < 0.1 < darkness[1] < 0.9 < darkness[2]
    (alone,) = plots.score_grid(np.full((1, 2), 0.3), label="nats").axes[0].get_images()
    assert alone.get_clim() == (0, 0.3)


def test_a_patched_metric_can_be_relative_to_the_clean_and_the_corrupted_run():
    values = np.array([[2.0, 3.0], [6.0, 4.0]])
    np.testing.assert_array_equal(plots.restored(values, 6.0, 2.0), [[0, 0.25], [1, 0.5]])
    for figure in (
        plots.patching_map(values, ["a", "b"], label="logits", clean=6.0, corrupted=2.0),
        plots.score_grid(values, label="logits", clean=6.0, corrupted=2.0),
    ):
        axes, bar = figure.axes
        assert _texts(axes) == ["0.00", "0.25", "1.00", "0.50"]
        assert bar.get_xlabel() == "logits: 0 as corrupted, 1 as clean"
    with pytest.raises(InputError, match=r"clean and corrupted are both 2: there is nothing"):
        plots.restored(values, 2.0, 2.0)
    with pytest.raises(InputError, match=r"clean and corrupted must be given together\."):
        plots.score_grid(values, label="logits", clean=1.0)


def test_orange_is_below_0_and_blue_above_as_in_the_page():
    (image,) = plots.score_grid(np.array([[-1.0, 1.0]]), label="nats").axes[0].get_images()
    for value, place in ((-0.5, 64), (0.5, 192)):
        np.testing.assert_allclose(_colour_of(image, value), diverging()[place], atol=0.01)
    red, _, blue = _colour_of(image, -0.5)
    assert red > 2 * blue
    (weights,) = plots.attention_map(np.eye(2), ["a", "b"]).axes[0].get_images()
    np.testing.assert_allclose(_colour_of(weights, 0.5), sequential()[128], atol=0.01)


def test_a_heads_weights_are_printed_where_they_are_few_but_for_what_a_mask_leaves():
    weights = np.array([[1.0, 0.0], [0.996, 0.004]])
    axes, _ = plots.attention_map(weights, ["a", "b"]).axes
    assert _texts(axes) == ["1.00", "1.00", "0.00"]
    assert not _texts(_figure("head of 64 tokens").axes[0])


def test_scores_are_printed_with_as_many_digits_as_their_size_asks_for():
    def printed(*values: float) -> list[str]:
        return _texts(plots.score_grid(np.array([values]), label="nats").axes[0])

    assert printed(0.5, 0.0) == ["0.50", "0.00"]
    assert printed(0.0123, -0.0004) == ["0.012", "0.000"]
    assert printed(-23.46, 1) == ["\N{MINUS SIGN}23.5", "1.0"]
    assert printed(0.5, np.nan) == ["0.50"]
    assert printed(0.1712, 0.1789) == ["0.1712", "0.1789"]


@pytest.mark.parametrize("length", [24, 28, 32])
def test_numbers_are_printed_all_or_none(length):
    values = _random(2, length) - 0.1
    axes, _ = plots.patching_map(values, _tokens(length), label="nats").axes
    assert len(axes.texts) == 2 * length or set(_texts(axes)) <= {"\N{MINUS SIGN}"}


def test_negative_values_are_coloured_about_0_and_keep_a_sign_where_numbers_have_no_room():
    values = _random(12, 64) - 0.25
    axes, _ = plots.patching_map(values, _tokens(64), label="nats").axes
    (image,) = axes.get_images()
    assert image.get_clim() == (-np.abs(values).max(), np.abs(values).max())
    assert image.get_cmap().name == legible.DIVERGING
    marks = {(round(x), round(y)) for x, y in (text.get_position() for text in axes.texts)}
    clear = -0.1 * np.abs(values).max()
    assert marks == {(column, row) for row, column in np.argwhere(values < clear)}
    assert set(_texts(axes)) == {"\N{MINUS SIGN}"}


def test_the_first_layer_is_on_top_in_every_figure():
    for figure in (
        plots.patching_map(_random(3, 2), ["a", "b"], label="nats"),
        plots.score_grid(_random(3, 2), label="nats"),
        plots.logit_lens_table(["a", "b"], [["x", "y"]] * 3, _random(3, 2)),
    ):
        assert figure.axes[0].get_ylim() == (2.5, -0.5)
    panels = plots.attention_grid(_random(3, 1, 2, 2), ["a", "b"]).axes[:3]
    tops = [panel.get_position().y1 for panel in panels]
    assert tops == sorted(tops, reverse=True)
    axes, _ = plots.patching_map(_random(3, 2), ["a", "b"], label="nats", rows="block").axes
    assert _ticks(axes.yaxis) == ["0", "1", "2"]
    figure = _figure("patching")
    assert (figure.get_supxlabel(), figure.get_supylabel()) == ("position", "layer")


def test_the_logit_lens_has_a_guess_in_every_cell_the_embeddings_on_top():
    guesses = [["x", "y"], ["一", "representation" * 3]]
    values = np.array([[0.25, 0.5], [0.75, 0.875]])
    axes, bar = plots.logit_lens_table(["a", "b"], guesses, values).axes
    placed = {text.get_position(): text.get_text() for text in axes.texts}
    cut = placed.pop((1, 1))
    assert placed == {(0, 0): "x", (1, 0): "y", (0, 1): "一"}
    assert cut.endswith("…")
    assert (guesses[1][1]).startswith(cut[:-1])
    assert _ticks(axes.yaxis) == ["embedding", "0"]
    assert axes.get_ylim() == (1.5, -0.5)
    assert axes.get_images()[0].get_clim() == (0, 1)
    assert bar.get_xlabel() == "probability"
    assert _figure("lens of 40 tokens").axes[0].get_images()[0].get_clim()[1] > 1


def test_a_text_reads_as_it_was_and_breaks_after_its_line_ends():
    tokens = ["one", "·two↵", *["·more"] * 40]
    values = np.linspace(-1, 0.5, 42)
    axes, bar = plots.token_values(tokens, values, label="nats").axes
    assert _texts(axes) == tokens
    places = [text.get_position() for text in axes.texts]
    assert places[0][1] == places[1][1] < places[2][1] < places[-1][1]
    assert sorted(places, key=lambda place: (place[1], place[0])) == places
    colours = [patch.get_facecolor() for patch in axes.patches]
    expected = legible.colour_map(legible.DIVERGING)((values + 1) / 2)
    np.testing.assert_allclose([to_rgb(colour) for colour in colours], expected[:, :3])
    assert len(axes.collections) == (values < -0.1).sum()  # Underlined.
    assert bar.get_xlabel() == "nats"


def test_curves_of_several_seeds_are_their_mean_and_range():
    one, several = _random(20), _random(20, 3)
    figure = plots.curves(
        STEPS, {"one": one, "several": several}, xlabel="step", ylabel="nats", title="two"
    )
    (axes,) = figure.axes
    lines = axes.get_lines()
    np.testing.assert_allclose(np.asarray(lines[0].get_xydata())[:, 1], one)
    np.testing.assert_allclose(np.asarray(lines[1].get_xydata())[:, 1], several.mean(1))
    (band,) = axes.collections
    vertices = np.asarray(band.get_paths()[0].vertices)
    for step, low, high in zip(STEPS, several.min(1), several.max(1), strict=True):
        reached = vertices[vertices[:, 0] == step, 1]
        np.testing.assert_allclose([reached.min(), reached.max()], [low, high])
    (legend,) = figure.legends
    named = [text.get_text() for text in legend.get_texts()]
    assert named == ["one", "several (mean and range of 3 seeds)"]
    assert (axes.get_xlabel(), axes.get_ylabel(), axes.get_title()) == ("step", "nats", "two")
    assert axes.get_xscale() == "linear"
    assert _figure("curves").axes[0].get_xscale() == "log"


def test_points_to_compare_stand_in_their_order_with_their_intervals():
    intervals = np.array([[1.0, 3.0], [0.5, 0.75]])
    figure = plots.bars(["first", "second"], np.array([2.0, 0.625]), intervals, label="nats")
    (axes,) = figure.axes
    assert _ticks(axes.yaxis) == ["first", "second"]
    assert axes.get_ylim() == (1.5, -0.5)
    np.testing.assert_array_equal(axes.get_lines()[-1].get_xydata(), [[2, 0], [0.625, 1]])
    (ranges,) = axes.collections
    ends = [np.asarray(path.vertices)[:, 0].tolist() for path in ranges.get_paths()]
    assert ends == intervals.tolist()
    assert _ticks(axes.child_axes[0].yaxis) == ["2.000", "0.625"]


@pytest.mark.parametrize(
    ("draw", "sentence"),
    [
        (lambda: plots.attention_grid(_random(1, 1, 2, 2), ["a"]), r"\(1, 1, 2, 2\).*name"),
        (lambda: plots.attention_grid(_random(1, 1, 1, 1), ["a"], heads=[1, 2]), r"\(1, 2, 1, 1\)"),
        (lambda: plots.attention_map(_random(2, 2), ["a"]), r"\(2, 2\).* 1 rows and 1 columns\."),
        (lambda: plots.token_values(["a"], _random(2), label=""), r"\(2,\): there are 1 tokens\."),
        (
            lambda: plots.curves(STEPS, {"a": _random(3)}, xlabel="", ylabel=""),
            r"'a' have shape \(3,\): 20 steps ask for \(20,\) or \(20, seeds\)\.",
        ),
        (
            lambda: plots.curves(STEPS - 1, {"a": STEPS}, xlabel="", ylabel="", log_x=True),
            "begin at 0: with log_x they must be above 0.",
        ),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(draw, sentence):
    with pytest.raises(InputError, match=sentence):
        draw()


def test_a_logarithmic_axis_takes_what_has_a_logarithm():
    steps = np.array([1, 2, 3])
    figure = plots.curves(steps, {"a": 10.0**steps}, xlabel="x", ylabel="y", log_y=True)
    assert figure.axes[0].get_yscale() == "log"
    assert (
        plots.curves(steps, {"a": steps}, xlabel="x", ylabel="y").axes[0].get_yscale() == "linear"
    )
    with pytest.raises(InputError, match="'a' go down to 0: with log_y"):
        plots.curves(steps, {"a": steps - 1}, xlabel="x", ylabel="y", log_y=True)


def test_few_points_on_a_logarithmic_axis_are_its_ticks():
    steps = np.array([3, 30, 70])
    figure = plots.curves(steps, {"a": steps}, xlabel="x", ylabel="y", log_x=True)
    assert _ticks(figure.axes[0].xaxis) == ["3", "30", "70"]
