"""From a line of a local file, in its authors' fields, to the example that a task's templates read.

Each raises ValueError for a line that it cannot read; the caller adds file and line.
"""

from __future__ import annotations

import re

from twofold.evaluate.tasks.lines import Doc


def arc(doc: Doc) -> Doc:
    """Question, choices and the right one's letter, from a prompt that lists them as ` A. ...`."""
    body = doc["query"].removeprefix("Question: ").removesuffix("\nAnswer:")
    question, *pieces = re.split(r"\n ([A-Z])\. ", body)
    letters, texts = pieces[::2], pieces[1::2]
    if letters != list("ABCDEFGH"[: len(doc["choices"])]) or doc["gold"] not in range(len(letters)):
        raise ValueError(f"cannot read the choices of {doc['query'][:80]!r}")
    return {
        "question": question,
        "choices": {"text": texts, "label": letters},
        "answerKey": letters[doc["gold"]],
    }


def openbookqa(doc: Doc) -> Doc:
    made = arc(doc)
    return {"question_stem": made.pop("question"), **made}


def commonsense_qa(doc: Doc) -> Doc:
    if doc["answerKey"] not in doc["choices"]["label"]:
        raise ValueError(f"'answerKey' must be one of {doc['choices']['label']}, got {doc['answerKey']!r}")
    return doc


def boolq(doc: Doc) -> Doc:
    return {**doc, "label": int(doc["answer"])}


def boolq_shot(doc: Doc) -> Doc:
    """As the evaluated examples are: without the article's title."""
    _, dashes, rest = doc["query"].partition(" -- ")
    passage, marker, question = rest.partition("\nQuestion: ")
    if not dashes or not marker:
        raise ValueError(f"cannot read the passage and question of {doc['query'][:80]!r}")
    return {
        "passage": passage,
        "question": question.removesuffix("\nAnswer:").removesuffix("?"),
        "label": int(doc["choices"][doc["gold"]] == "yes"),
    }


def lambada(doc: Doc) -> Doc:
    return {"text": f"{doc['context']} {doc['continuation']}"}


def drop(doc: Doc) -> Doc:
    answers = doc["answers"]
    if not all(spans and all(isinstance(span, str) for span in spans) for spans in answers):
        raise ValueError(f"'answers' must be lists of strings, none of them empty, got {answers!r}")
    return doc


def word_in_context(doc: Doc) -> Doc:
    """From `word, kind, place-place, sentence, sentence` and T or F; a place counts words, `start1` characters."""
    columns = doc["first"].split("\t")
    if len(columns) != 5 or doc["second"] not in ("T", "F"):
        raise ValueError(f"must be 5 columns with a T or F, got {doc['first']!r} with {doc['second']!r}")
    _, _, places, sentence1, sentence2 = columns
    words, place = sentence1.split(" "), int(places.split("-")[0])
    if place >= len(words):
        raise ValueError(f"there is no word {place} in {sentence1!r}")
    start = sum(len(word) + 1 for word in words[:place])
    return {
        "sentence1": sentence1,
        "sentence2": sentence2,
        "start1": start,
        "end1": start + len(words[place]),
        "label": int(doc["second"] == "T"),
    }


def winograd(doc: Doc) -> Doc:
    """Both beginnings as options for a pronoun with nothing before it."""
    return {
        "text": f"_ {doc['continuation']}",
        "pronoun": "_",
        "pronoun_loc": 0,
        "options": doc["context_options"],
        "label": doc["gold"],
    }


def scitldr(doc: Doc) -> Doc:
    text = " ".join(doc["source"])
    return {"prompt": f"{text}\n\nSummarize the text in one sentence.\nSummary:", "targets": doc["target"]}


def dialogsum(doc: Doc) -> Doc:
    summaries = [doc[name] for name in ("summary", "summary1", "summary2", "summary3") if name in doc]
    return {"prompt": f"{doc['dialogue']}\n\nSummarize the dialogue.\nSummary:", "targets": summaries}


def squad(doc: Doc) -> Doc:
    """The prompt begins with the article's title, which is cut off."""
    title, _, prompt = doc["query"].partition("\n")
    if not title.startswith("Title: "):
        raise ValueError(f"must have a line 'Title: ...' in front, got {doc['query'][:80]!r}")
    return {"prompt": prompt, "targets": doc["answers_text"]}


def humaneval(doc: Doc) -> Doc:
    return {"prompt": doc["prompt"], "target": doc["canonical_solution"]}


def mbpp(doc: Doc) -> Doc:
    """In the harness's wording, with line ends as they are elsewhere."""
    tests = "\n".join(doc["test_list"])
    return {
        "prompt": f"You are an expert Python programmer, and here is your task: {doc['text']} Your code should pass "
        f"these tests:\n\n{tests}\n[BEGIN]\n",
        "target": doc["code"].replace("\r\n", "\n"),
    }


def phrase(source: str, target: str, doc: Doc) -> Doc:
    return {"prompt": f"{source} phrase: {doc['first']}\n{target} phrase:", "targets": [doc["second"]]}
