"""What a judge takes from a prompt's words: its noun phrases, its two objects and their relation, as T2I-CompBench reads them (Huang et al. 2023).

Rules and lists are those of its public code (Karine-Huang/T2I-CompBench, commit 1b70949: BLIP_vqa.py, 2D_spatial_eval.py, CLIP_similarity.py).
"""

from __future__ import annotations

import functools
import itertools
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass

SPACY_MODEL = "en_core_web_sm"
NO_PHRASE = ("top", "the side", "the left", "the right")  # noun chunks that name a place
MOST_PHRASES = 8
RELATIONS = ("on side of", "next to", "near", "on the left of", "on the right of", "on the bottom of", "on the top of", "on top of")  # the first found counts
PREPOSITIONS = ("on top of", "on bottom of", "on the left", "on the right", "next to", "on side of", "near")  # of complex prompts


@dataclass(frozen=True)
class Sentence:
    """A prompt as a parser reads it: noun chunks, and every word with its universal part of speech."""

    text: str
    chunks: tuple[str, ...]
    words: tuple[tuple[str, str], ...]


Reader = Callable[[str], Sentence]


def spacy_reader(model: str = SPACY_MODEL) -> Reader:
    """spaCy as a reader that keeps what it has read. Raises ValueError where the package or its language model is not installed."""
    try:
        import spacy
    except ImportError:
        raise ValueError("a prompt's noun phrases are spaCy's, which is not installed: pip install -e '.[real]'") from None
    try:
        parse = spacy.load(model)
    except OSError:
        raise ValueError(f"spaCy has no model {model!r}: python -m spacy download {model}") from None

    one_at_a_time = threading.Lock()

    @functools.cache
    def read(prompt: str) -> Sentence:
        with one_at_a_time:
            parsed = parse(prompt)
        return Sentence(prompt, tuple(chunk.text for chunk in parsed.noun_chunks), tuple((token.text, token.pos_) for token in parsed))

    return read


def phrases(sentence: Sentence) -> tuple[str, ...]:
    """A prompt's noun phrases: its first eight noun chunks but those that name a place; of a prompt without any the whole."""
    return tuple(chunk for chunk in sentence.chunks if chunk not in NO_PHRASE)[:MOST_PHRASES] or (sentence.text,)


def questions(sentence: Sentence) -> tuple[str, ...]:
    """What BLIP is asked of a prompt, "{noun phrase}?", in small letters and without punctuation. Of a prompt without noun chunks the whole is asked
    (there the benchmark scores 1)."""
    return tuple(re.sub(r'[.!"()*#:;~]', "", f"{phrase}?".lower()).rstrip() for phrase in phrases(sentence))


def relation(prompt: str) -> str | None:
    """The spatial relation that a prompt states, one of `RELATIONS`, or None."""
    return next((words for words in RELATIONS if words in prompt), None)


def objects(sentence: Sentence) -> tuple[str, str] | None:
    """The two objects of a simple prompt: its first and its last noun."""
    nouns = [word for word, part in sentence.words if part == "NOUN"]
    return (nouns[0], nouns[-1]) if nouns else None


def related_objects(sentence: Sentence) -> tuple[str, str] | None:
    """The two objects of a complex prompt: the nouns nearest to its preposition, before and after; None unless there is one pair."""
    words, found = sentence.words, []
    for start in range(len(words)):
        lengths = (n for n in (3, 2, 1) if " ".join(word for word, _ in words[start : start + n]) in PREPOSITIONS)
        if length := next(lengths, 0):
            before = [word for word, part in words[:start] if part in ("NOUN", "PROPN")]
            rest = words[start + length :]
            names = [word for (word, part), (_, following) in itertools.pairwise(rest) if part == "PROPN" != following]
            found += before[-1:] + ([word for word, part in rest if part == "NOUN"] or names)[:1]
    return (found[0], found[1]) if len(found) == 2 else None


def without_adjectives(sentence: Sentence) -> str:
    """A prompt's words but its adjectives: what CLIP is told of a complex prompt."""
    return " ".join(word for word, part in sentence.words if part != "ADJ")
