"""The report: it stands alone, holds the record's numbers, and says nothing that was not measured."""

from __future__ import annotations

import copy
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
from typer.testing import CliRunner

from gptqmodel_eora_ext import cli
from gptqmodel_eora_ext.evaluate.outcome import comparisons, rows
from gptqmodel_eora_ext.evaluate.record import RecordError, read_record, write_record
from gptqmodel_eora_ext.evaluate.report.figures import plain_number
from gptqmodel_eora_ext.evaluate.report.page import make_report, render
from gptqmodel_eora_ext.evaluate.report.wording import headline
from tests.evaluate.records import FULL, MIX, PLAIN, record

runner = CliRunner()


class Page(HTMLParser):
    """Tags, ids and words of a page."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)


@pytest.fixture(scope="module")
def html() -> str:
    return render(record())


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


def test_stands_alone(page: Page, html: str) -> None:
    """Nothing is fetched: no script, no sheet, no picture, and the one link is to the record beside it."""
    assert not {"script", "link", "img", "iframe"} & {tag for tag, _ in page.tags}
    links = {attributes.get("href") for tag, attributes in page.tags if tag == "a"}
    assert links == {"report.json"}
    assert not re.findall(r"url\((?!#)", html) and "@import" not in html


def test_ids_are_told_apart_and_meant(page: Page, html: str) -> None:
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    meant = set(re.findall(r"url\(#([^)]+)\)", html)) | set(re.findall(r'href="#([^"]+)"', html))
    for _, attributes in page.tags:
        meant |= set((attributes.get("aria-labelledby") or "").split())
    assert meant and meant <= set(ids)


def test_figures_have_alternatives_and_plain_numbers(page: Page, html: str) -> None:
    drawn = [attributes for tag, attributes in page.tags if tag == "svg"]
    # Trade-off, errors, ranks, spectra, times; each wide and narrow.
    assert len(drawn) == 10 and all(one.get("role") == "img" and one.get("viewbox") for one in drawn)
    descriptions = re.findall(r"<desc [^>]*>([^<]+)</desc>", html)
    assert len(descriptions) == 10 and all(len(one) > 30 for one in descriptions)
    shown = "".join(page.words)
    assert "10^" not in shown and "mathdefault" not in html and "×10" not in shown
    assert not re.search(r"\de[-+]\d", re.sub(r"<style.*?</style>", "", shown, flags=re.DOTALL))


def test_words_of_files_are_no_markup(html: str) -> None:
    assert "<b>the</b>" not in html and "&lt;b&gt;the&lt;/b&gt;" in html
    assert "planned <mix>" not in html and "planned &lt;mix&gt; + EoRA" in html


def test_numbers_are_the_records(page: Page) -> None:
    shown = " ".join("".join(page.words).split())
    for row in rows(record()):
        assert f"{row['perplexity']:.2f}" in shown and row["model"] in shown
    for one in comparisons(record()):
        assert one.sentence in shown
    for expected in ("ab" * 32, "cd" * 32, "8192 tokens", "torch 2.14.1", "non-overlapping windows of 512 tokens",
                     "The capital of France is", "41.0 %"):  # fmt: skip
        assert expected in shown


def test_a_refined_adapter_shows_what_it_began_with() -> None:
    refined = record()
    adapter = next(one["adapter"] for one in refined["models"] if "adapter" in one)
    adapter["refined"] = {"loss": "kl", "tokens": 4096, "steps": 39, "before": 0.41, "after": 0.33}
    html = render(refined)
    assert "as it was before refinement" in html and "with it, as a share" not in html
    assert "by kl on 4096 tokens, 39 steps; validation loss 0.4100, then 0.3300" in html


def test_without_what_was_not_measured() -> None:
    """A model at full precision alone; and one without any text, prompts or speed."""
    alone = record()
    alone["models"] = alone["models"][:1]
    for kind in ("texts", "tasks", "samples"):
        for entry in alone[kind]:
            entry["results"] = entry["results"][:1]
    alone["speed"] = alone["speed"][:1]
    assert "Loss against bytes" not in render(alone)
    bare = {**record(), **{kind: [] for kind in ("texts", "tasks", "speed", "samples", "stages")}}
    assert "Memory" in render(bare)


def test_headline_says_who_is_better_and_no_more() -> None:
    told = " ".join(headline(record()))
    assert f"On heldout, {MIX} has a perplexity of" in told and f"{PLAIN}, of the same size" in told
    assert re.search(r"It loses 0\.\d\d nats a token where plain GPTQ, 3 bits loses 0\.\d\d: \d\d % less\.", told)
    swapped = copy.deepcopy(record())
    results = swapped["texts"][0]["results"]
    results[1]["nats"], results[2]["nats"] = results[2]["nats"], results[1]["nats"]
    assert "% less" not in " ".join(headline(swapped))


def test_command(tmp_path: Path) -> None:
    write_record(tmp_path / "data" / "results.json", record())
    out = tmp_path / "page" / "report.html"
    result = runner.invoke(cli.app, ["report", str(out), "--data", str(tmp_path / "data" / "results.json")])
    assert result.exit_code == 0, result.output
    assert json.loads((out.parent / "report.json").read_text()) == record()  # a copy lies beside the page
    again = runner.invoke(cli.app, ["report", str(out)])
    assert again.exit_code == 0 and out.read_text() == render(record())
    for arguments, message in (
        ([str(tmp_path / "x.txt")], "must end in .html"),
        ([str(tmp_path / "nowhere" / "x.html")], "cannot be read"),
    ):
        result = runner.invoke(cli.app, ["report", *arguments])
        assert result.exit_code == 2 and message in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("[]", "has the format 'list'"),
        ("{", "is no JSON"),
        ('{"format": "eora-report-0"}', "has the format 'eora-report-0', expected 'eora-report-1'"),
        ({"models": []}, "holds no models"),
        ({"texts": None}, "`texts` is NoneType, expected a list"),
        ({"tasks": [{"name": "a"}]}, r"`tasks\[0\]` has no metric, results"),
        ({"samples": [{"prompt": "a", "results": [{"model": "x", "text": ""}]}]}, "tells of `x`, which `models`"),
    ],
)
def test_what_is_no_record_is_named(change: str | dict[str, object], message: str, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text(change if isinstance(change, str) else json.dumps({**record(), **change}))
    with pytest.raises(RecordError, match=message) as caught:
        read_record(path)
    assert str(path) in str(caught.value)
    with pytest.raises(RecordError):
        make_report(tmp_path / "report.html")


def test_plain_numbers() -> None:
    found = [plain_number(value) for value in (0, 0.2, 0.05, 1500, 2.5, 1e-4, 12)]
    assert found == ["0", "0.2", "0.05", "1500", "2.5", "0.0001", "12"]


def test_rows_know_the_full_precision_model() -> None:
    found = {row["model"]: row for row in rows(record())}
    assert found[FULL]["texts"]["heldout"]["kl"] is None
    assert found[MIX]["texts"]["heldout"]["kl"] == pytest.approx(0.5)  # over the four windows that it is taken on
    assert found[MIX]["bytes"] == 100_400_000
