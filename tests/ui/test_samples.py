from __future__ import annotations

import numpy as np
import pytest

from tests.ui.fake import fake_empty, fake_gpt, fake_logging, fake_vit
from tests.ui.screens import app_on, frame, settle, text_of
from tui_trainer.protocol.events import ConfusionMatrix, ImageSample, TextSample
from tui_trainer.ui.panels.samples import (
    accuracy,
    fit_image,
    half_blocks,
    most_confused,
    pixels_of,
    resize,
    tiles_of,
)


def sample(count: int = 3) -> ImageSample:
    pixels = np.arange(count * 4 * 4 * 3, dtype=np.uint8).tobytes()
    names = tuple(str(n) for n in range(count))
    return ImageSample(0, 5, 4, 4, pixels, names, (0.9,) * count, ("0",) * count)


def test_a_cell_shows_two_pixels() -> None:
    image = np.zeros((2, 1, 3), np.uint8)
    image[0] = (1, 2, 3)
    image[1] = (4, 5, 6)
    ((segment,),) = half_blocks(image)
    assert segment.text == "▀"
    assert segment.style is not None
    assert segment.style.color is not None
    assert segment.style.bgcolor is not None
    assert segment.style.color.triplet == (1, 2, 3)
    assert segment.style.bgcolor.triplet == (4, 5, 6)


def test_an_odd_row_is_not_lost_and_equal_neighbours_share_a_segment() -> None:
    lines = half_blocks(np.full((3, 10, 3), 7, np.uint8))
    assert len(lines) == 2
    assert [segment.text for segment in lines[1]] == ["▀" * 10]


def test_without_half_blocks_light_is_written_as_characters() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[:, 1] = 255
    assert half_blocks(image, ascii=True)[0][0].text == " @"


@pytest.mark.parametrize("size", [(8, 8, 20, 10), (64, 64, 16, 8), (3, 300, 40, 10), (1, 1, 1, 1)])
def test_images_keep_their_shape_and_fit(size: tuple[int, int, int, int]) -> None:
    width, height, columns, rows = size
    drawn = fit_image(width, height, columns, rows)
    assert drawn[0] <= columns
    assert drawn[1] <= 2 * rows
    made = resize(np.full((height, width, 3), 9, np.uint8), *drawn)
    assert made.shape == (drawn[1], drawn[0], 3)
    assert (made == 9).all()


def test_smaller_images_are_averaged() -> None:
    image = np.zeros((2, 2, 3), np.uint8)
    image[0, 0] = 200
    assert resize(image, 1, 1).tolist() == [[[50, 50, 50]]]


def test_truncated_pixels_are_no_fault() -> None:
    short = ImageSample(0, 1, 4, 4, b"abc", ("1",), (0.5,), ("1",))
    assert len(pixels_of(short)) == 0


def test_wrong_ones_first() -> None:
    assert [tile.index for tile in tiles_of(sample(), wrong_first=True)] == [1, 2, 0]
    assert [tile.index for tile in tiles_of(sample(), wrong_first=False)] == [0, 1, 2]


def test_the_commonest_mistakes() -> None:
    matrix = ConfusionMatrix(0, 1, ("a", "b"), ((8, 2), (3, 7)))
    assert most_confused(matrix) == [(3, "b", "a"), (2, "a", "b")]
    assert accuracy(matrix) == 0.75
    assert accuracy(ConfusionMatrix(0, 1, ("a",), ((0,),))) is None


async def test_newest_text_first_with_its_prompt() -> None:
    session = fake_gpt()
    app = app_on("samples", session)
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        text = text_of(app)
        assert text.index("step 300") < text.index("step 200")
        assert "The def forward" in text
        session.artifacts.append(TextSample(99, 350, "To be", "To be, or\x1b[2J not"))
        session._changed()
        await frame(pilot)
        assert "To be, or not" in text_of(app)


async def test_images_with_verdicts_and_matrix_beside() -> None:
    app = app_on("samples", fake_vit())
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        text = text_of(app)
        assert "9 of 12 right" in text
        assert "✗ 2 is 9" in text
        assert "recall" in text
        assert "accuracy 76.0%" in text


async def test_narrow_screens_switch_between_images_and_matrix() -> None:
    app = app_on("samples", fake_vit())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "recall" not in text_of(app)
        await pilot.press("m")
        await settle(pilot)
        assert "recall" in text_of(app)
        assert "✗" not in text_of(app)


async def test_older_samples_are_kept() -> None:
    app = app_on("samples", fake_vit())
    async with app.run_test(size=(120, 40)) as pilot:
        await settle(pilot)
        await pilot.press("left_square_bracket")
        await settle(pilot)
        assert "step 200" in text_of(app)
        assert "1 before the newest" in text_of(app)
        await pilot.press("right_square_bracket", "right_square_bracket")
        await settle(pilot)
        assert "step 300" in text_of(app)


async def test_wrong_first_by_key() -> None:
    app = app_on("samples", fake_vit())
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        await pilot.press("w")
        await settle(pilot)
        verdicts = next(line for line in text_of(app).split("\n") if "✗" in line)
        assert verdicts.count("✗") == 3


async def test_under_ascii_nothing_else_is_drawn() -> None:
    for make in (fake_gpt, fake_vit):
        app = app_on("samples", make(), ascii=True)
        async with app.run_test(size=(120, 40)) as pilot:
            await settle(pilot)
            assert "step 300" in text_of(app)
            from tui_trainer.ui.panels.samples import ImageGrid

            grid = app.screen.query_one(ImageGrid)
            if grid.line_count():
                assert "▀" not in grid.render_line(0).text


@pytest.mark.parametrize("size", [(80, 24), (20, 5)])
async def test_before_the_first_sample(size: tuple[int, int]) -> None:
    app = app_on("samples", fake_empty())
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        await pilot.press("left_square_bracket", "w", "m")
        await settle(pilot)
        if size[0] > 40:
            assert "importing torch" in text_of(app)


async def test_a_run_without_a_sample_yet_says_when_one_comes() -> None:
    app = app_on("samples", fake_gpt(steps=5))
    async with app.run_test(size=(80, 24)) as pilot:
        await settle(pilot)
        assert "the first comes with the next evaluation" in text_of(app)


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
async def test_values_that_the_script_logs(size: tuple[int, int]) -> None:
    app = app_on("samples", fake_logging())
    async with app.run_test(size=size) as pilot:
        await settle(pilot)
        text = text_of(app)
        line = next(line for line in text.split("\n") if "val/accuracy" in line)
        assert "0.777" in line  # 1 − exp(−300/200)
        assert size[0] < 100 or "300" in line
        await pilot.press("down")
        await settle(pilot)
        chart = app.screen.query_one("#logged-chart")
        assert "temperature" in chart.render_line(0).text
