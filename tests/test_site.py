"""Oracle: the pages read by an HTML parser: what they load, whether formulas are MathML, where they lead, what they say of their making."""

import base64
import html.parser
import io

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output

from mitune import markup, provenance, site

TEXT = r"""# 01 · One

**Question.** Is $\epsilon_c$ near $\lVert n-\epsilon_u\rVert^2$? See [the other](02_two.ipynb#here) and `$ make`.

$$E = \tfrac12 \sum_t \mathcal N(z; \mu_c, \sigma^2)$$
"""
FORMULAS = 3
LOCK = """schema: '2.0'
stages:
  pool@color:
    cmd: python -m mitune.runner pool.ipynb
    params: {params.yaml: {seed: 7, device: cpu, dtype: float32, pool: {M: 16}}}
    outs: [{path: results/shapes/pools/color, md5: a}, {path: results/shapes/notebooks/pool-color.ipynb, md5: POOL}]
  01_one:
    cmd: python -m mitune.runner 01_one.ipynb
    deps: [{path: results/shapes/pools, md5: a}]
    params: {params.yaml: {model: shapes, finetune: {seed: 3, steps: 60}}}
    outs: [{path: reports/01_one.ipynb, md5: b}]
"""


class Reader(html.parser.HTMLParser):
    """Every tag with its attributes, and the text outside of MathML."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.inside = [], "", 0
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.inside += tag == "math"

    def handle_endtag(self, tag):
        self.inside -= tag == "math"

    def handle_data(self, text):
        self.text += "" if self.inside else text

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


def picture():
    from PIL import Image

    file = io.BytesIO()
    Image.new("RGB", (40, 20)).save(file, "PNG")
    return base64.b64encode(file.getvalue()).decode()


def outputs():
    frame = '<div><style scoped>td {}</style><table class="dataframe"><tr><td>not reproduced</td></tr></table></div>'
    data = [{"text/html": frame}, {"image/png": picture()}, {"text/markdown": r"| $\mu$ |"}, {"text/plain": "<plain>"}]
    return [*(new_output("display_data", data=entry) for entry in data), new_output("stream", name="stdout", text="\x1b[1msaid\x1b[0m")]


@pytest.fixture
def root(tmp_path):
    """Reports of two articles, one of them noted by `make repro`, whose pool was too."""
    root = tmp_path / "project"
    (root / "reports" / "figures").mkdir(parents=True)
    one = new_notebook(cells=[new_markdown_cell(TEXT), new_code_cell("a = 1"), new_code_cell("b = '<&'", outputs=outputs())])
    nbformat.write(one, root / "reports" / "01_one.ipynb")
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 02 · Two")]), root / "reports" / "02_two.ipynb")
    (root / "reports" / "figures" / "gain.png").write_bytes(base64.b64decode(picture()))
    table = "| claim | verdict |\n|---|---|\n| It holds. | **reproduced** |\n"
    (root / "reports" / "README.md").write_text(f"# Reports\n\n## [Claims](01_one.ipynb)\n\n{table}\n![a figure](figures/gain.png)\n")
    pool = root / "results" / "shapes" / "notebooks" / "pool-color.ipynb"
    pool.parent.mkdir(parents=True)
    pool.write_text("pool")
    (root / "dvc.lock").write_text(LOCK.replace("POOL", provenance.digest(pool)))
    run = {"started": "2026-01-02T03:04:05+00:00", "commit": "c0ffee", "clean": True, "machine": "a <GPU>", "packages": {"torch": "2.13.0"}}
    file = root / "reports" / provenance.FILE
    provenance.record(file, run, "01_one", root / "reports" / "01_one.ipynb", 12.0)
    provenance.record(file, run, "pool@color", pool, 600.0)
    pool.unlink()  # results are not committed: the lock knows them
    return root


@pytest.fixture
def pages(root, tmp_path):
    names = site.build(root, "reports", tmp_path / "site")
    assert names == ["index", "01_one", "02_two", "stages"]
    return {name: (tmp_path / "site" / f"{name}.html").read_text(encoding="utf-8") for name in names}


def test_pages_load_nothing_from_the_network_and_no_link_is_broken(pages, tmp_path):
    for name, text in pages.items():
        page = Reader(text)
        loaded = [a["href"] for a in page.all("link")] + [a["src"] for tag in ("img", "script", "iframe") for a in page.all(tag) if "src" in a]
        assert loaded
        assert not page.all("script")
        for link in loaded + [a["href"] for a in page.all("a")]:
            assert not link.startswith(("http:", "https:", "//")), f"{name}: {link}"
            assert (tmp_path / "site" / link.partition("#")[0]).is_file(), f"{name}: {link}"
    style = (tmp_path / "site" / "site.css").read_text()
    assert "http" not in style
    assert "@import" not in style


def test_every_formula_is_mathml(pages):
    page = Reader(pages["01_one"])
    shown = [attributes["display"] for attributes in page.all("math")]
    assert len(shown) == FORMULAS + 1  # and the one of the output
    assert shown.count("block") == 1
    assert "\\" not in page.text
    assert page.text.count("$") == 1  # of the command in the text


def test_every_page_leads_back_to_the_claims_which_come_first(pages):
    assert all('<a href="index.html"' in text for text in pages.values())
    assert pages["index"].index("It holds.") < pages["index"].index("figures/gain.png")
    assert '<td class="verdict reproduced">reproduced</td>' in pages["index"]
    assert 'href="01_one.html"' in pages["index"]
    assert '<div class="figure"><a href="figures/gain.png">' in pages["index"]


def test_an_article_shows_its_outputs_and_folds_its_code(pages, tmp_path):
    text = pages["01_one"]
    assert text.count("<details><summary>code</summary>") == 1  # adjoining cells fold as one
    assert '<div class="scroll"><table class="dataframe">' in text
    assert "<style" not in text
    assert '<td class="verdict not-reproduced">' in text
    assert "&lt;plain&gt;" in text
    assert "<pre>said</pre>" in text
    assert (tmp_path / "site" / "figures" / "01_one-01.png").read_bytes() == base64.b64decode(picture())
    assert 'href="02_two.html#here"' in text


def test_provenance_is_told_where_it_is_known_and_only_there(pages, root, tmp_path):
    own = ("c0ffee", "clean", "2026-01-02", "a &lt;GPU&gt;", "torch 2.13.0", "12 s", "10 min, of 2 of 2 stages", "steps: 60")
    for said in (*own, "finetune.seed: 3", "seed: 7", "cpu, float32"):
        assert said in pages["01_one"], said
    assert 'href="notebooks/01_one.ipynb"' in pages["01_one"]
    assert 'href="stages.html#01_one"' in pages["01_one"]
    assert "c0ffee" in pages["index"]
    assert "not noted" in pages["02_two"]
    nbformat.write(new_notebook(cells=[new_markdown_cell("# 01 · Another")]), root / "reports" / "01_one.ipynb")
    site.build(root, "reports", tmp_path / "site")
    assert "c0ffee" not in (tmp_path / "site" / "01_one.html").read_text(encoding="utf-8")


def test_an_earlier_site_is_replaced_and_nothing_else(root, tmp_path):
    to = tmp_path / "site"
    site.build(root, "reports", to)
    (to / "old.html").write_text("old")
    site.build(root, "reports", to)
    assert not (to / "old.html").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    with pytest.raises(ValueError, match="not a site that was built here"):
        site.build(root, "reports", tmp_path / "mine")
    assert (tmp_path / "mine" / "letter.txt").is_file()


def test_a_formula_that_cannot_be_written_is_named():
    with pytest.raises(ValueError, match=r"\\nosuch, which latex2mathml does not know"):
        markup.mathml(r"\nosuch{a}")
    with pytest.raises(ValueError, match="cannot be written as MathML"):
        markup.mathml(r"\left( a")


def test_without_reports_the_way_to_make_them_is_told(tmp_path):
    with pytest.raises(ValueError, match="make repro"):
        site.build(tmp_path, "reports", tmp_path / "site")


def test_cells_of_a_table_of_words_name_their_column():
    head = "<thead><tr><th></th><th>paper</th><th>verdict</th></tr><tr><th>claim</th><th></th><th></th></tr></thead>"
    frame = '<table border="1" class="dataframe">{}<tbody><tr><th>It is so.</th><td>0.4</td><td>{}</td></tr></tbody></table>'
    words, numbers = (Reader(markup.tables(frame.format(head, last))) for last in ("holds", "7"))
    assert [cell.get("data-label") for cell in words.all("td")] == ["paper", None]  # a verdict speaks for itself
    assert [cell.get("data-label") for cell in numbers.all("td")] == [None, None]
