"""A spaCy pipeline from a handful of annotated sentences, for the English example: parts of speech and dependencies. For real text take
a trained pipeline, such as the folder of `en_core_web_sm`.
"""

import argparse
import json
from pathlib import Path

import spacy
from spacy.training import Example
from thinc.api import fix_random_seed

ROUNDS = 60


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sentences", type=Path, help="JSON lines: text, pos, deps (space-separated) and heads")
    parser.add_argument("out", type=Path, help="folder of the pipeline")
    args = parser.parse_args()
    fix_random_seed(0)
    nlp = spacy.blank("en")
    nlp.add_pipe("morphologizer")
    nlp.add_pipe("parser", config={"min_action_freq": 1})
    examples = []
    for row in map(json.loads, args.sentences.read_text(encoding="utf-8").splitlines()):
        annotation = {"pos": row["pos"].split(), "deps": row["deps"].split(), "heads": row["heads"]}
        examples.append(Example.from_dict(nlp.make_doc(row["text"]), annotation))
    optimizer = nlp.initialize(lambda: examples)
    for _ in range(ROUNDS):
        nlp.update(examples, sgd=optimizer)
    args.out.parent.mkdir(parents=True, exist_ok=True)
    nlp.to_disk(args.out)


if __name__ == "__main__":
    main()
