"""Oracle: prompts of T2I-CompBench's kinds, parsed by hand."""

import sys
import types

import pytest

from mitune import language
from mitune.language import Sentence


def sentence(text: str, *chunks: str, parts: str = "") -> Sentence:
    """Parts of speech by their first letters, word by word: N noun, P proper noun, A adjective, anything else another."""
    names = {"N": "NOUN", "P": "PROPN", "A": "ADJ"}
    return Sentence(text, chunks, tuple((word, names.get(part, "X")) for word, part in zip(text.split(), parts, strict=True)) if parts else ())


def test_questions_are_the_noun_chunks():
    read = sentence("A red Bench, on the left of a blue car!", "A red Bench", "the left", "a blue car!")
    assert language.phrases(read) == ("A red Bench", "a blue car!")
    assert language.questions(read) == ("a red bench?", "a blue car?")
    assert len(language.questions(sentence("many", *[f"thing {n}" for n in range(12)]))) == 8


def test_a_prompt_without_noun_chunks_is_asked_as_a_whole():
    assert language.questions(sentence("Run (fast)!")) == ("run fast?",)


@pytest.mark.parametrize(
    ("prompt", "relation"),
    [
        ("a dog on the left of a cat", "on the left of"),
        ("a dog next to a cat on the right of a car", "next to"),  # the list's order, not the prompt's
        ("a book on top of a table", "on top of"),
        ("a dog and a cat", None),
    ],
)
def test_the_first_relation_of_the_list_counts(prompt, relation):
    assert language.relation(prompt) == relation


def test_objects_are_the_first_and_the_last_noun():
    assert language.objects(sentence("a dog on the left of a cat", parts="xNxxxxxN")) == ("dog", "cat")
    assert language.objects(sentence("run", parts="x")) is None


def test_objects_of_a_complex_prompt_stand_next_to_its_preposition():
    assert language.related_objects(sentence("the red ball lies on the left of a wooden Acme table", parts="xANxxxxxxAPN")) == ("ball", "table")
    assert language.related_objects(sentence("a cup near Mount Fuji today", parts="xNxPPx")) == ("cup", "Fuji")
    assert language.related_objects(sentence("a cup and a plate", parts="xNxxN")) is None
    assert language.related_objects(sentence("a cup near a plate next to a fork", parts="xNxxNxxxN")) is None


def test_adjectives_are_left_out():
    assert language.without_adjectives(sentence("the big dog chases a red ball", parts="xANxxAN")) == "the dog chases a ball"


def test_spacy_is_asked_once_a_prompt(monkeypatch):
    asked = []

    def parse(text):
        asked.append(text)
        return type("Doc", (list,), {"noun_chunks": [types.SimpleNamespace(text="a dog")]})([types.SimpleNamespace(text="dog", pos_="NOUN")])

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=lambda name: parse))
    read = language.spacy_reader()
    assert read("a dog") == read("a dog") == Sentence("a dog", ("a dog",), (("dog", "NOUN"),))
    assert asked == ["a dog"]


def test_what_is_missing_is_named_with_its_remedy(monkeypatch):
    monkeypatch.setitem(sys.modules, "spacy", None)
    with pytest.raises(ValueError, match=r"pip install -e '\.\[real\]'") as error:
        language.spacy_reader()
    assert "\n" not in str(error.value)

    def load(name):
        raise OSError(f"[E050] Can't find model '{name}'")

    monkeypatch.setitem(sys.modules, "spacy", types.SimpleNamespace(load=load))
    with pytest.raises(ValueError, match="python -m spacy download en_core_web_sm"):
        language.spacy_reader()
