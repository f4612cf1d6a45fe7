"""The reports as static pages that need no network (`make site`): the paper's claims first, then every article, each with its provenance.

Reads the reports, `dvc.lock` and the reports' `provenance.json`; runs nothing.
"""

from __future__ import annotations

import argparse
import base64
import html
import re
import shutil
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import nbformat
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

from mitune import config, provenance
from mitune.markup import boxed, definitions, folded, markdown, preformatted, tables

STYLE = Path(__file__).with_name("site.css")
MARK = ".mitune-site"  # in a folder that this module made, and may replace


# ---------------------------------------------------------------- a notebook


@dataclass
class Page:
    """A page: its name without ending, title, body in HTML, and the files beside it."""

    name: str
    title: str
    body: str
    files: dict[str, bytes] = field(default_factory=dict)


def article(path: Path) -> Page:
    """An executed notebook: its text, its outputs, and its code, folded."""
    cells = nbformat.read(path, as_version=4).cells
    page = Page(path.stem, cells[0].source.splitlines()[0].lstrip("# ") if cells else path.stem, "")
    heading, parts, code = page.title, [], []
    for cell in cells:
        if cell.cell_type == "code":
            code.append(highlight(cell.source, PythonLexer(), HtmlFormatter()))
        if code and (cell.cell_type != "code" or cell.outputs or cell is cells[-1]):
            parts.append(folded("code", "".join(code)))
            code = []
        if cell.cell_type == "markdown":
            heading = [heading, *re.findall(r"^#+ (.*)$", cell.source, re.MULTILINE)][-1]
            parts.append(markdown(cell.source))
        parts += [_output(page, output, heading) for output in cell.get("outputs", ())]
    page.body = "\n".join(parts)
    return page


def _output(page: Page, output: Mapping[str, Any], heading: str) -> str:
    """An output as HTML; a picture becomes a file of the page."""
    if output.output_type == "stream":
        return preformatted(output.text)
    if output.output_type == "error":
        return preformatted("\n".join(output.traceback))
    data = output.data
    if "text/html" in data:
        return tables(data["text/html"])
    if "image/png" in data:
        return _figure(page, base64.b64decode(data["image/png"]), heading)
    return markdown(data["text/markdown"]) if "text/markdown" in data else preformatted(data.get("text/plain", ""))


def _figure(page: Page, png: bytes, heading: str) -> str:
    name = f"figures/{page.name}-{len(page.files) + 1:02d}.png"
    page.files[name] = png
    return boxed(name, png, heading)


# ---------------------------------------------------------------- provenance


def upstream(stages: Mapping[str, Mapping[str, Any]], name: str) -> list[str]:
    """The stages on whose outputs a stage rests, itself last, in the order of `stages`."""
    reached, new = set(), {name}
    while new:
        reached |= new
        paths = [dep["path"] for stage in new for dep in stages[stage].get("deps", ())]
        new = {stage for stage, entry in stages.items() if any(_touch(out["path"], path) for out in entry.get("outs", ()) for path in paths)} - reached
    return [stage for stage in stages if stage in reached and stage != name] + [name]


def _touch(one: str, other: str) -> bool:
    """Whether two paths are the same, or one lies in the other."""
    return one == other or one.startswith(f"{other}/") or other.startswith(f"{one}/")


def parameters(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a stage of dvc.lock."""
    return entry.get("params", {}).get("params.yaml", {})


def seeds(values: Mapping[str, Any], where: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of every seed among parameters."""
    for key, value in values.items():
        name = f"{where}.{key}".lstrip(".")
        if isinstance(value, Mapping):
            yield from seeds(value, name)
        elif key in ("seed", "seeds"):
            yield name, value


@dataclass(frozen=True)
class Source:
    """What a run left: the stages of dvc.lock, and by stage what made it, where that was noted."""

    root: Path
    reports: str
    stages: Mapping[str, Mapping[str, Any]]
    made: Mapping[str, Mapping[str, Any]]

    def run(self, stage: str) -> Mapping[str, Any] | None:
        """What made a stage's notebook; None if nothing was noted of its bytes."""
        own = self.made.get(stage)
        names = {f"{self.reports}/{stage}.ipynb", *(out["path"] for out in self.stages.get(stage, {}).get("outs", ()) if out["path"].endswith(".ipynb"))}
        there = {provenance.digest(self.root / name) for name in names if (self.root / name).is_file()}
        locked = {out.get("md5") for out in self.stages.get(stage, {}).get("outs", ())}
        return own if own and own["md5"] in (there or locked) else None


def about(source: Source, stage: str) -> str:
    """The provenance of an article: the run, the device, seeds, versions and parameters, and where its notebook and its stage are."""
    entry, made = source.stages.get(stage, {}), source.run(stage)
    before = upstream(source.stages, stage) if entry else [stage]
    spent = [run["seconds"] for name in before if (run := source.run(name)) and run["seconds"] is not None]
    used: dict[str, Any] = {}
    for name in before:
        used |= dict(seeds(parameters(source.stages.get(name, {}))))
    devices = {(values["device"], values["dtype"]) for name in before if {"device", "dtype"} <= set(values := parameters(source.stages.get(name, {})))}
    rows = {
        "notebook": f'<a href="notebooks/{stage}.ipynb">{stage}.ipynb</a>, executed, of <code>notebooks/{stage}.ipynb</code>',
        "stage": f'<a href="stages.html#{stage}">{stage}</a>, rests on {len(before) - 1} others' if entry else "not in dvc.lock",
    }
    rows |= _of_run(made)
    if made:
        rows["run time"] = f"{_time(made['seconds'])}; with what it rests on {_time(sum(spent))}, of {len(spent)} of {len(before)} stages"
    rows["device"] = ", ".join(f"{device}, {dtype}" for device, dtype in sorted(devices)) or "cpu: it reads tables"
    rows["seeds"] = ", ".join(f"<code>{html.escape(f'{key}: {value}')}</code>" for key, value in sorted(used.items())) or "none"
    return f'<section id="provenance"><h2>Provenance</h2>{definitions(rows)}{folded("parameters", preformatted(_yaml(parameters(entry))))}</section>'


def _of_run(made: Mapping[str, Any] | None) -> dict[str, str]:
    if not made:
        return {"commit": "not noted: this page was not made by <code>make repro</code>"}
    state = {True: "clean", False: "with changes that were not committed", None: ""}[made["clean"]]
    versions = ", ".join(f"{name} {version}" for name, version in made["packages"].items())
    return {
        "commit": f"<code>{made['commit'] or 'no git'}</code> {state}".strip(),
        "run": f"started {made['started']}",
        "machine": html.escape(made["machine"]),
        "versions": html.escape(versions),
    }


def _time(seconds: float | None) -> str:
    return "not noted" if seconds is None else f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min"


def _yaml(values: Mapping[str, Any], indent: int = 0) -> str:
    """Nested mappings, to be read."""
    lines = []
    for key, value in values.items():
        nested = isinstance(value, Mapping) and value
        lines.append(f"{' ' * indent}{key}:" + (f"\n{_yaml(value, indent + 2)}" if nested else f" {value}"))
    return "\n".join(lines)


def stages_page(source: Source) -> Page:
    """Every stage of dvc.lock with its command, run time, inputs and outputs."""
    parts = ["<h1>Stages of the pipeline</h1>", "<p>As <code>dvc.lock</code> has them; each is one notebook.</p>"]
    for name, entry in source.stages.items():
        made = source.run(name)
        note = f"{_time(made['seconds'])}, at commit <code>{(made['commit'] or 'no git')[:10]}</code>" if made else "run time not noted"
        paths = {key: "\n".join(part["path"] for part in entry.get(key, ())) for key in ("deps", "outs")}
        inner = preformatted(entry["cmd"]) + f"<p>Reads</p>{preformatted(paths['deps'])}<p>Writes</p>{preformatted(paths['outs'])}"
        inner += f"<p>Parameters</p>{preformatted(_yaml(parameters(entry)))}"
        parts.append(
            f'<section class="stage" id="{html.escape(name)}"><h2>{html.escape(name)}</h2><p>{note}</p>{folded("command, inputs, outputs", inner)}</section>'
        )
    return Page("stages", "Stages of the pipeline", "\n".join(parts))


# ---------------------------------------------------------------- the site


def index_page(source: Source) -> Page:
    """The reports' README: claims first. Its figures are files of the page."""
    folder = source.root / source.reports
    readme = folder / "README.md"
    if not readme.is_file():
        raise ValueError(f"{readme} is missing: run `make repro` first")
    text = readme.read_text(encoding="utf-8")
    page = Page("index", text.splitlines()[0].lstrip("# "), markdown(text))

    def placed(found: re.Match) -> str:
        name, words = found.groups()
        page.files[name] = (folder / name).read_bytes()
        return boxed(name, page.files[name], html.unescape(words))

    page.body = re.sub(r'<p><img src="([^":]+)" alt="([^"]*)"[^>]*></p>', placed, page.body)
    runs = {run["started"]: run for stage in source.stages if (run := source.run(stage))}
    noted = "".join(definitions(_of_run(run)) for _, run in sorted(runs.items())) or definitions(_of_run(None))
    page.body += f'<section id="provenance"><h2>Provenance</h2>{noted}<p><a href="stages.html">All stages of the pipeline</a></p></section>'
    return page


def build(root: Path, reports: str, to: Path) -> list[str]:
    """Write the site of `root/reports` to the folder `to`, in the place of an earlier one; the pages' names.

    Raises:
        ValueError: no reports, a formula that cannot be converted, or a folder with something else in it.
    """
    lock = root / "dvc.lock"
    stages = config.read_yaml(lock)["stages"] if lock.is_file() else {}
    source = Source(root, reports, stages, provenance.read(root / reports / provenance.FILE))
    index = index_page(source)
    notebooks = sorted((root / reports).glob("[0-9]*.ipynb"))
    articles = [article(path) for path in notebooks]
    for page in articles:
        page.body += about(source, page.name)
        page.files[f"notebooks/{page.name}.ipynb"] = (root / reports / f"{page.name}.ipynb").read_bytes()
    _clear(to)
    pages = [index, *articles, stages_page(source)]
    for page in pages:
        (to / f"{page.name}.html").write_text(_whole(page, articles), encoding="utf-8")
        for name, content in page.files.items():
            (to / name).parent.mkdir(parents=True, exist_ok=True)
            (to / name).write_bytes(content)
    (to / STYLE.name).write_text(STYLE.read_text(encoding="utf-8") + HtmlFormatter().get_style_defs(".highlight"), encoding="utf-8")
    return [page.name for page in pages]


def _clear(to: Path) -> None:
    """An empty folder, marked as ours."""
    if to.exists() and not (to / MARK).is_file() and (not to.is_dir() or any(to.iterdir())):
        raise ValueError(f"{to} is not a site that was built here: name a folder that is empty or not there with --to")
    shutil.rmtree(to, ignore_errors=True)
    to.mkdir(parents=True)
    (to / MARK).touch()


def _whole(page: Page, articles: list[Page]) -> str:
    links = [("index", "Claims", "Claims"), *((other.name, other.name.partition("_")[0], other.title) for other in articles), ("stages", "Stages", "Stages")]
    here = ' aria-current="page"'
    items = "".join(
        f'<a href="{name}.html" title="{html.escape(title)}"{here if name == page.name else ""}>{html.escape(label)}</a>' for name, label, title in links
    )
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{html.escape(page.title)}</title>
<link rel="stylesheet" href="{STYLE.name}">
</head>
<body class="{page.name}">
<nav>{items}</nav>
<main>
{page.body}
</main>
</body>
</html>
"""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="mitune.site", description="Write the reports as static pages that need no network.")
    parser.add_argument("--to", type=Path, default=Path("site"), help="the folder to write, in the place of an earlier site (default: site/)")
    chosen = parser.parse_args(arguments)
    try:
        pages = build(config.root().resolve(), config.load().reports, chosen.to)
    except ValueError as error:
        print(f"mitune: {error}", file=sys.stderr)
        return 1
    print(f"{len(pages)} pages: open {chosen.to / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
