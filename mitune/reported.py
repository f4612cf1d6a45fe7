"""The paper's reported numbers, read from `paper/reported.yaml`; a cell that is uncertain in the text is refused, never guessed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Table:
    """One table, figure or passage of the paper; `rows` nests one or two levels of columns under each row."""

    name: str
    title: str
    unit: str
    where: str
    rows: Mapping[str, Mapping[str, Any]]
    n: str | int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    uncertain: tuple[Mapping[str, Any], ...] = ()
    notes: tuple[str, ...] = ()

    def value(self, row: str, *columns: str) -> Any:
        """The printed value, as in `value("MI-TUNE", "blip_vqa", "color")`; None for a printed "n.a.".

        Raises:
            ValueError: no such cell, or one that the text at hand does not show for certain (its readings are told).
        """
        for cell in self.uncertain:
            if (cell["row"], cell["column"]) == (row, " ".join(columns)):
                told = f"readings {dict(cell['readings'])}, likely {cell.get('likely')} ({cell['note']})"
                raise ValueError(f"{self.name}, {row!r}, {cell['column']!r} is uncertain: {told}")
        found: Any = self.rows
        for key in (row, *columns):
            if not isinstance(found, Mapping) or key not in found:
                known = ", ".join(map(str, found)) if isinstance(found, Mapping) else "nothing below"
                raise ValueError(f"{self.name} has no {key!r} in ({', '.join((row, *columns))}); it has {known}")
            found = found[key]
        return found

    def cells(self) -> Iterator[tuple[str, str, Any]]:
        """Every (row, column, value), the levels of a column joined by a space as in `uncertain`."""
        for row, columns in self.rows.items():
            for column, value in columns.items():
                if isinstance(value, Mapping):
                    yield from ((row, f"{column} {inner}", leaf) for inner, leaf in value.items())
                else:
                    yield row, column, value


@dataclass(frozen=True)
class Claim:
    """What the paper says, on which evidence, with which number, and the comparison that would test it."""

    id: str
    claim: str
    evidence: str
    reported: str | float
    comparison: str


@dataclass(frozen=True)
class Reported:
    tables: Mapping[str, Table]
    claims: Mapping[str, Claim]

    def __getitem__(self, name: str) -> Table:
        if name not in self.tables:
            raise ValueError(f"the paper's numbers have no {name!r}; they have {', '.join(self.tables)}")
        return self.tables[name]


def load(path: Path) -> Reported:
    """Read `paper/reported.yaml`.

    Raises:
        ValueError: a missing file, an unknown or missing key, a claim listed twice.
    """
    from ruamel.yaml import YAML

    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path} is missing; restore it with `git checkout -- {path.name}`")
    data = YAML(typ="safe").load(path.read_text(encoding="utf-8"))
    try:
        claims = [Claim(**entry) for entry in data.pop("claims")]
        tables = {name: _table(name, entry) for name, entry in data.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a file of reported numbers: {error}") from None
    if len({claim.id for claim in claims}) < len(claims):
        raise ValueError(f"{path} lists a claim twice; give each its own id")
    return Reported(tables, {claim.id: claim for claim in claims})


def _table(name: str, entry: Mapping[str, Any]) -> Table:
    return Table(name=name, **{key: tuple(value) if isinstance(value, list) else value for key, value in entry.items()})
