"""Words and their roles, by jieba and by a spaCy pipeline."""

from pathlib import Path

import pytest

from signal_store.errors import NotFoundError
from teacher_cache.corpus.document import Document
from teacher_cache.corpus.roles import make_tagger
from teacher_cache.recipe import TaggerSection

SENTENCES = [
    ("the teacher gives a cache to students", "DET NOUN VERB DET NOUN ADP NOUN", "det nsubj ROOT det dobj prep pobj", [1, 2, 2, 4, 2, 2, 5]),
    ("she reads the book in London", "PRON VERB DET NOUN ADP PROPN", "nsubj ROOT det dobj prep pobj", [1, 1, 3, 1, 1, 4]),
    ("students learn from the cache", "NOUN VERB ADP DET NOUN", "nsubj ROOT prep det pobj", [1, 1, 1, 4, 2]),
]  # fmt: skip


def test_chinese_words_have_their_parts_of_speech() -> None:
    tagger, identity = make_tagger(TaggerSection(parser="jieba"))
    assert identity.parser == "jieba"
    text = "小明在北京的大学学习了语言,因为他喜欢读书。"
    found = {text[word.start : word.stop]: word.pos for word in tagger(Document(text))}
    assert "".join(found) == "".join(dict.fromkeys(found))
    assert found["北京"] == "entity_noun"
    assert {found[word] for word in ("在", "的", "了")} == {"function"}
    assert found["学习"] == "verb"
    assert found["因为"] == "connective"
    assert found[","] == "punctuation"


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A spaCy pipeline trained on three sentences."""
    import spacy
    from spacy.training import Example

    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    nlp.add_pipe("parser", config={"min_action_freq": 1})
    examples = []
    for text, pos, deps, heads in SENTENCES:
        annotation = {"pos": pos.split(), "deps": deps.split(), "heads": heads}
        examples.append(Example.from_dict(nlp.make_doc(text), annotation))
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(40):
        nlp.update(examples, sgd=optimizer)
    folder = tmp_path_factory.mktemp("spacy")
    nlp.to_disk(folder)
    return folder


def test_english_words_have_parts_dependencies_and_semantic_roles(pipeline: Path) -> None:
    tagger, identity = make_tagger(TaggerSection(parser="spacy", model=pipeline))
    assert identity.digest is not None
    words = {w.start: w for w in tagger(Document("the teacher gives a cache to students"))}
    teacher, gives, cache = words[4], words[12], words[20]
    assert (teacher.pos, teacher.dependency, teacher.semantic) == ("noun", "subject", "arg0")
    assert (gives.pos, gives.dependency, gives.semantic) == ("verb", "root", "predicate")
    assert (cache.dependency, cache.semantic) == ("object", "arg1")
    with pytest.raises(NotFoundError, match="spaCy"):
        make_tagger(TaggerSection(parser="spacy", model=pipeline / "nothing"))
