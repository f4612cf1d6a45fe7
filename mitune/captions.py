"""Captions of the rendered world: T2I-CompBench's grammar as near as the world allows, and the ways web captions are wrong.

A *caption* is what is said (some attributes, perhaps a relation); what is drawn is a scene (`mitune.scenes`).
"""

from __future__ import annotations

import functools
import itertools
import re
from dataclasses import dataclass, replace

import torch

SHAPES = ("circle", "square", "triangle", "cross", "star", "moon")
COLORS = ("red", "green", "blue", "yellow", "purple")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("big", "small")
DIRECTIONS = {"left": "on the left of", "right": "on the right of", "above": "above", "below": "below"}
CONTACTS = {"inside": "inside", "touching": "touching", "overlapping": "overlapping", "apart": "apart from"}
RELATIONS = DIRECTIONS | CONTACTS
CONVERSE = {"left": "right", "right": "left", "above": "below", "below": "above", "touching": "touching", "overlapping": "overlapping", "apart": "apart"}
CONTAINERS = ("circle", "square")  # the shapes whose inside holds a small object
CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex")
HELD_OUT = (("cross", "yellow"), ("star", "green"), ("triangle", "purple"), ("moon", "dotted"), ("square", "striped"))
"""Pairs of a shape and a colour or texture that no pretraining scene contains: the compositional test split."""


@dataclass(frozen=True)
class Phrase:
    """A noun phrase, such as "a big red striped circle"; an attribute that is None is not said."""

    shape: str
    color: str | None = None
    texture: str | None = None
    size: str | None = None

    def __str__(self) -> str:
        return " ".join(["a", *(word for word in (self.size, self.color, self.texture) if word), self.shape])


@dataclass(frozen=True)
class Caption:
    """One phrase, or two joined by "and" or by a relation of the first to the second."""

    phrases: tuple[Phrase, ...]
    relation: str | None = None

    def __str__(self) -> str:
        return f" {RELATIONS.get(self.relation, 'and')} ".join(map(str, self.phrases))


_WORDS = {"size": SIZES, "color": COLORS, "texture": TEXTURES}
_PHRASE = "a " + "".join(f"(?:(?P<{name}{{0}}>{'|'.join(words)}) )?" for name, words in _WORDS.items()) + f"(?P<shape{{0}}>{'|'.join(SHAPES)})"
_CAPTION = re.compile(f"{_PHRASE.format(0)}(?: (?P<join>and|{'|'.join(RELATIONS.values())}) {_PHRASE.format(1)})?")


def parse(text: str) -> Caption:
    """Read a caption back from its words. Raises ValueError for a text that the world's grammar does not make."""
    match = _CAPTION.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"not a caption of the shapes world: {text!r} (expected e.g. 'a red circle and a blue square')")
    words = match.groupdict()
    phrases = tuple(Phrase(*(words[f"{key}{n}"] for key in ("shape", "color", "texture", "size"))) for n in (0, 1) if words[f"shape{n}"])
    relation = next((name for name, text in RELATIONS.items() if text == words["join"]), None)
    return Caption(phrases, relation)


def scene_key(caption: Caption) -> str:
    """A name shared by all wordings of one scene, such as "A left of B" and "B right of A"."""
    if len(caption.phrases) == 1:
        return str(caption)
    turned = turn_around(caption)
    return min(str(caption), str(turned)) if turned else str(caption)


def turn_around(caption: Caption) -> Caption | None:
    """The same statement with the objects named in the other order; None where the grammar has no words for it."""
    if caption.relation is not None and caption.relation not in CONVERSE:
        return None
    return Caption(caption.phrases[::-1], CONVERSE.get(caption.relation))


def is_held_out(phrase: Phrase) -> bool:
    return any((phrase.shape, word) in HELD_OUT for word in (phrase.color, phrase.texture))


def pick(generator: torch.Generator, items):
    return items[int(torch.randint(len(items), (), generator=generator))]


def category_captions(category: str) -> list[Caption]:
    """Every caption of a category, both orders of each scene. `complex` has too many: see `sample_caption`."""
    pairs = list(itertools.permutations(SHAPES, 2))
    two = {
        "color": lambda a, b: [Caption((Phrase(a, color=x), Phrase(b, color=y))) for x, y in itertools.permutations(COLORS, 2)],
        "shape": lambda a, b: [Caption((Phrase(a, size=x), Phrase(b, size=y))) for x, y in itertools.product(SIZES, repeat=2)],
        "texture": lambda a, b: [Caption((Phrase(a, texture=x), Phrase(b, texture=y))) for x, y in itertools.permutations(TEXTURES, 2)],
        "spatial": lambda a, b: [Caption((Phrase(a), Phrase(b)), relation) for relation in DIRECTIONS],
        "non_spatial": lambda a, b: [Caption((Phrase(a), Phrase(b)), r) for r in CONTACTS if r != "inside" or b in CONTAINERS],
    }
    if category not in two:
        raise ValueError(f"no list of captions for category {category!r}; it must be one of {sorted(two)}")
    return [caption for a, b in pairs for caption in two[category](a, b)]


def sample_caption(category: str, generator: torch.Generator) -> Caption:
    """A true-to-grammar caption without held-out pairs; `category` is one of CATEGORIES or "single"."""
    while True:
        if category == "single":
            words = [pick(generator, (None, *options)) for options in (COLORS, TEXTURES, SIZES)]
            caption = Caption((Phrase(pick(generator, SHAPES), *words),))
        elif category == "complex":
            relation = pick(generator, tuple(RELATIONS))
            a, b = _sample_pair(relation, generator)
            x, y = (COLORS[i] for i in torch.randperm(len(COLORS), generator=generator)[:2].tolist())
            sizes = ("small", "big") if relation == "inside" else (pick(generator, SIZES), pick(generator, SIZES))
            caption = Caption((Phrase(a, x, pick(generator, TEXTURES), sizes[0]), Phrase(b, y, pick(generator, TEXTURES), sizes[1])), relation)
        else:
            caption = pick(generator, _category_captions_cached(category))
        if not any(map(is_held_out, caption.phrases)):
            return caption


_category_captions_cached = functools.cache(category_captions)


def _sample_pair(relation: str | None, generator: torch.Generator) -> tuple[str, str]:
    second = pick(generator, CONTAINERS if relation == "inside" else SHAPES)
    return pick(generator, tuple(s for s in SHAPES if s != second)), second


def corruptions(caption: Caption) -> dict[str, list[Caption]]:
    """Every caption that differs by one error: {"binding": attributes swapped or one replaced, "layout": relation turned, "object": a shape exchanged}.

    These are hard negatives: each is false of every scene of which `caption` is true.
    """
    errors: dict[str, list[Caption]] = {"swap": [], "replace": [], "layout": [], "object": []}
    options = {"color": COLORS, "texture": TEXTURES, "size": SIZES}
    phrases = caption.phrases
    for name, words in options.items():
        said = [getattr(phrase, name) for phrase in phrases]
        if len(said) == 2 and None not in said and said[0] != said[1]:
            errors["swap"].append(replace(caption, phrases=tuple(replace(p, **{name: w}) for p, w in zip(phrases, said[::-1], strict=True))))
        for n, word in enumerate(said):
            for other in () if word is None else words:
                if other not in said:
                    errors["replace"].append(replace(caption, phrases=_put(phrases, n, replace(phrases[n], **{name: other}))))
                elif name == "size" and other != word:
                    errors["replace"].append(replace(caption, phrases=_put(phrases, n, replace(phrases[n], size=other))))
    for relation in DIRECTIONS if caption.relation in DIRECTIONS else CONTACTS if caption.relation else ():
        if relation != caption.relation:
            errors["layout"].append(replace(caption, relation=relation))
    shapes = [phrase.shape for phrase in phrases]
    for n, shape in itertools.product(range(len(phrases)), SHAPES):
        if shape not in shapes:
            errors["object"].append(replace(caption, phrases=_put(phrases, n, replace(phrases[n], shape=shape))))
    return errors


def _put(phrases: tuple[Phrase, ...], n: int, phrase: Phrase) -> tuple[Phrase, ...]:
    return (*phrases[:n], phrase, *phrases[n + 1 :])


def mistake(caption: Caption, generator: torch.Generator, *, kinds: tuple[str, ...]) -> tuple[str, Caption] | None:
    """One wrong version of `caption` after its kind: a kind is drawn first, then an error of that kind; None if no kind applies."""
    errors = {kind: found for kind, found in corruptions(caption).items() if kind in kinds and found}
    if not errors:
        return None
    kind = pick(generator, tuple(errors))
    return kind, pick(generator, errors[kind])


def corrupt(caption: Caption, generator: torch.Generator, *, kinds: tuple[str, ...] = ("swap", "replace", "layout")) -> Caption | None:
    """The wrong version of `caption` that `mistake` draws; None if no kind applies."""
    found = mistake(caption, generator, kinds=kinds)
    return found and found[1]


def is_drawable(caption: Caption) -> bool:
    """Whether a scene can show it: inside another lies only an object that may be small, in a container that may be big."""
    if caption.relation != "inside":
        return True
    inner, outer = caption.phrases
    return outer.shape in CONTAINERS and inner.size != "big" and outer.size != "small"


def components(caption: Caption) -> tuple[Caption, ...]:
    """What a caption says, piece by piece: its noun phrases, and the relation of the bare shapes ("a circle above a star") if there is one."""
    relation = (Caption(tuple(Phrase(phrase.shape) for phrase in caption.phrases), caption.relation),) if caption.relation else ()
    return (*(Caption((phrase,)) for phrase in caption.phrases), *relation)
