"""The texts of the pages: complete, the same in each language, and no number written by hand."""

from __future__ import annotations

import re
from functools import cache

import pytest
from rich.cells import cell_len

from tests.learn.measured_once import measured
from tui_trainer.findings.rules import RULES
from tui_trainer.learn.catalog import PAGE_OF_PHASE, PAGE_OF_RULE, PAGES, UnknownPage, find_page
from tui_trainer.learn.page import (
    LANGUAGES,
    NARROW_NO_BREAK,
    NO_BREAK,
    PLACEHOLDER,
    TEXTS,
    Page,
    language_of,
    load_page,
    placeholders,
    titles,
    words,
    written,
)
from tui_trainer.learn.page_layout import Numbers, escaped, laid_out, plain
from tui_trainer.protocol import PHASES
from tui_trainer.ui.screens import SCREENS

CODE = re.compile(r"`[^`]*`|^ {4}.*$", re.MULTILINE)
NAMES = re.compile(r"GPT-2|3\.\d")
"""Digits in them are no measurements."""
EACH_TEXT = [(name, language) for name in PAGES for language in LANGUAGES]
MAX_WIDTH = 76
"""What a terminal of 80 columns leaves."""

each_text = pytest.mark.parametrize(("name", "language"), EACH_TEXT)


@cache
def page_of(name: str, language: str) -> Page:
    return load_page(name, language)


def everything(page: Page) -> str:
    return f"{page.title}\n\n{page.text}\n\n{page.answer}"


def structure(text: str) -> list[str]:
    """What stands where: headings, paragraphs, rows of tables with the number of cells, code."""
    found = []
    for block in text.split("\n\n"):
        lines = block.split("\n")
        if lines[0].startswith("|"):
            found.append("table " + " ".join(str(line.count("|")) for line in lines))
        elif lines[0].startswith("    "):
            found.append("code " + " ".join(line.partition("  #")[0].strip() for line in lines))
        else:
            found.append("heading" if lines[0].startswith("#") else "text")
    return found


def test_the_folders_hold_the_pages_of_the_catalog() -> None:
    for language in LANGUAGES:
        files = {each.stem for each in (TEXTS / language).glob("*.md")}
        assert files == set(PAGES)


@each_text
def test_a_page_has_its_parts(name: str, language: str) -> None:
    page = page_of(name, language)
    assert page.title
    assert 3 <= len(page.title) <= 46, "the list is 52 columns wide"
    assert page.body
    for part in (page.to_try, page.question, page.answer):
        heading, _, text = part.partition("\n\n")
        assert heading.startswith("## ")
        assert text
    assert "?" in page.question
    assert "`" in page.to_try, "a command or a key"
    assert placeholders(page.answer), "the answer is measured"


@pytest.mark.parametrize("name", PAGES)
def test_the_languages_have_the_same_structure_and_values(name: str) -> None:
    first, *others = [page_of(name, language) for language in LANGUAGES]
    for other in others:
        for part in ("body", "to_try", "question", "answer"):
            one, two = getattr(first, part), getattr(other, part)
            assert structure(one) == structure(two)
            assert sorted(m[0] for m in PLACEHOLDER.finditer(one)) == sorted(
                m[0] for m in PLACEHOLDER.finditer(two)
            )


@pytest.mark.parametrize("name", PAGES)
def test_every_placeholder_is_measured_and_every_value_is_stated(name: str) -> None:
    values = measured(name).values
    for language in LANGUAGES:
        assert placeholders(everything(page_of(name, language))) == set(values)


@each_text
def test_no_number_is_written_by_hand(name: str, language: str) -> None:
    prose = NAMES.sub("", PLACEHOLDER.sub("", CODE.sub("", everything(page_of(name, language)))))
    assert not re.findall(r".*\d.*", prose)


CODE_WITH_NUMBERS = {
    "attention-scores": ("`2`",),
    "clipping": ("`1e-6`", "`tui-trainer gpt --max-norm 0.1`"),
    "gradient": ("`(L(w + h) - L(w - h)) / (2 * h)`",),
    "qkv": ("`2`",),
    "residual-stream": ("`2`",),
    "scalar-tensor": (
        "`W[0, 0]`",
        "`2 * (W @ x - t)[0] * x[0]`",
        '`tui-trainer graph "(a*b + c) * f" --at a=2 b=-3 c=10 f=-2`',
    ),
    "updates": ("`3`",),
    "vit-arithmetic": ("`tui-trainer vit --preset face-s14 --data photos/`",),
}
"""Code in running text that has digits: formulas, commands, keys of screens, and what
 `clip_grad_norm_` adds to the norm, which a test measures."""


@each_text
def test_numbers_in_code_are_known(name: str, language: str) -> None:
    text = " ".join(PLACEHOLDER.sub("", everything(page_of(name, language))).split())
    found = sorted({code for code in re.findall("`[^`]*`", text) if re.search(r"\d", code)})
    assert found == sorted(CODE_WITH_NUMBERS.get(name, ()))
    keys = {screen.mode: screen.key for screen in SCREENS}
    assert (keys["attention"], keys["parameters"]) == ("2", "3")


@each_text
def test_a_float_says_how_it_is_written(name: str, language: str) -> None:
    values = measured(name).values
    for match in PLACEHOLDER.finditer(everything(page_of(name, language))):
        value = values[match[1]]
        first = value[0] if isinstance(value, list) else value
        if isinstance(first, float):
            assert match[2], f"{match[0]} would have all digits"


@each_text
def test_every_line_fits_an_ordinary_terminal(name: str, language: str) -> None:
    numbers = Numbers(language, measured(name).values)
    for line in laid_out(everything(page_of(name, language)), numbers, MAX_WIDTH):
        assert sum(cell_len(text) for text, _ in line) <= MAX_WIDTH, plain([line])


@each_text
def test_nothing_of_markdown_is_left(name: str, language: str) -> None:
    numbers = Numbers(language, measured(name).values)
    text = plain(laid_out(everything(page_of(name, language)), numbers, MAX_WIDTH))
    assert not re.search(r"\{[a-z]|\||\*\*\w|^#", text, re.MULTILINE)


@pytest.mark.parametrize("name", PAGES)
def test_french_is_typeset_as_french(name: str) -> None:
    prose = PLACEHOLDER.sub("x", CODE.sub("`x`", everything(page_of(name, "fr"))))
    prose = re.sub(r"^\|[-:|]+\|$", "", prose, flags=re.MULTILINE)
    assert re.search("[éèêàùçôî]", prose)
    assert "'" not in prose, "an apostrophe is ’"
    assert '"' not in prose
    for sign in re.finditer(r"(.)([:;?!»])(?=[\s.,)]|$)", prose, re.MULTILINE):
        around = prose[max(0, sign.start() - 20) : sign.end()]
        assert sign[1] in (NO_BREAK, NARROW_NO_BREAK), around
    for sign in re.finditer("«(.)", prose):
        assert sign[1] == NO_BREAK


@pytest.mark.parametrize("name", PAGES)
def test_french_is_no_copy_of_the_english(name: str) -> None:
    lines = []
    for language in LANGUAGES:
        prose = PLACEHOLDER.sub("", CODE.sub("", everything(page_of(name, language))))
        lines.append({line for line in prose.split("\n") if len(line) > 25 and line[0] != "|"})
    assert not lines[0] & lines[1]


def test_the_words_of_the_screen_are_in_each_language() -> None:
    english, french = words("en"), words("fr")
    assert set(english) == set(french)
    for key, text in english.items():
        assert placeholders(text) == placeholders(french[key])
        if key not in ("page",):
            assert text != french[key]


def test_titles_differ() -> None:
    for language in LANGUAGES:
        assert len(set(titles(language).values())) == len(PAGES)


def test_text_from_elsewhere_is_shown_as_it_is() -> None:
    text = "*a* _b_ `c` [d](e) # f | g <h> {i} \\j &amp; 1. - + ~~k~~"
    assert plain(laid_out(escaped(text), Numbers("en"), 200)) == text.replace("{i}", "…")
    assert plain(laid_out(escaped("# no heading"), Numbers("en"), 200)) == "# no heading"


def test_rules_have_pages() -> None:
    assert set(PAGE_OF_RULE) <= {rule.name for rule in RULES}
    assert set(PAGE_OF_RULE.values()) <= set(PAGES)


def test_phases_have_pages() -> None:
    assert set(PAGE_OF_PHASE) <= set(PHASES)
    assert set(PAGE_OF_PHASE.values()) <= set(PAGES)


def test_a_page_is_found_by_its_name() -> None:
    assert find_page("Loss_Graph") == "loss-graph"
    with pytest.raises(UnknownPage, match="no page lossgraf") as caught:
        find_page("lossgraf")
    assert "loss-graph" in caught.value.hint


@pytest.mark.parametrize(
    ("environment", "language"),
    [
        ({"LANG": "fr_FR.UTF-8"}, "fr"),
        ({"LANG": "en_GB.UTF-8"}, "en"),
        ({"LANG": "de_DE.UTF-8"}, "en"),
        ({"LANG": "fr_CA"}, "fr"),
        ({"LANG": "C.UTF-8", "LANGUAGE": "fr"}, "en"),
        ({"LANG": "en_US.UTF-8", "LANGUAGE": "fr:en"}, "fr"),
        ({"LANG": "fr_FR.UTF-8", "LC_ALL": "C"}, "en"),
        ({"LANG": "en_US.UTF-8", "LC_MESSAGES": "fr_BE"}, "fr"),
        ({}, "en"),
    ],
)
def test_the_language_of_the_environment(environment: dict[str, str], language: str) -> None:
    assert language_of(environment) == language


@pytest.mark.parametrize(
    ("value", "form", "english", "french", "code"),
    [
        (0.0900306, ".3f", "0.090", "0,090", "0.090"),
        (494149, ",d", "494,149", f"494{NARROW_NO_BREAK}149", "494,149"),
        (-1.5, ".1f", "−1.5", "−1,5", "-1.5"),
        ([0.665, -0.245], ".2f", "[0.67, −0.24]", f"[0,67{NO_BREAK}; −0,24]", "[0.67, -0.24]"),
        (1e-7, ".0e", "1e-07", "1e-07", "1e-07"),
        (-1e-7, ".3f", "0.000", "0,000", "-0.000"),
        (-1e-7, ".1g", "-1e-07", "-1e-07", "-1e-07"),
        (True, "", "True", "True", "True"),
        ("a.b-c", "", "a.b-c", "a.b-c", "a.b-c"),
    ],
)
def test_a_value_is_written_as_the_language_does(
    value: object, form: str, english: str, french: str, code: str
) -> None:
    assert written(value, form, "en") == english  # type: ignore[arg-type]
    assert written(value, form, "fr") == french  # type: ignore[arg-type]
    assert written(value, form, "fr", code=True) == code  # type: ignore[arg-type]
