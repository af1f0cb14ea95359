"""`pgjax reward`: rows of text in, terms out; equal to the plain reference and to the golden rows, for both variants."""

import json

import numpy as np
import pytest
import reference_reward
from test_rewards import EIGHT, FIGURE, GOLDEN, STRICT, answer, random_answer, random_row

from pgjax import explain as module
from pgjax.bank import build_bank, save_bank
from pgjax.cli import main
from pgjax.data.jsonl import read_jsonl
from pgjax.data.schema import ABSENT, CATEGORY_NODE, CATEGORY_OOD, IMAGE, LABELS, MODALITIES
from pgjax.explain import explain, table
from pgjax.models.sentence_encoder import load_embedder
from pgjax.taxonomy import load_taxonomy
from pgjax.tokenizer import byte_tokenizer, token_bytes

TAXONOMY = load_taxonomy()
KEYS = ("modality", "query_label", "response_label", "category", "original_category")
TERMS = ("format", "request", "response", "category", "bonus", "category_right", "ood_detected")
GOOD = dict(zip(KEYS, ("text", "unsafe", "safe", "", "Loose Paving"), strict=True)) | {"answer": answer("unsafe safe", "Loose Slabs")}


@pytest.fixture
def no_embedder(monkeypatch):
    monkeypatch.setattr(module, "load_embedder", lambda folder: pytest.fail("an embedder was loaded"))


def write(path, rows: list) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def explained(path, rows: list[dict], variant: str = "published", **options) -> list[dict]:
    return explain(read_jsonl(write(path / "rows.jsonl", rows)), TAXONOMY, variant, **options)["rows"]


def command(capsys, *argv: str) -> dict:
    assert main(["reward", *argv, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_token_k_is_byte_k():
    tokens = token_bytes(byte_tokenizer())
    assert tokens[:256] == [bytes([k]) for k in range(256)] and tokens[256] is None and len(tokens) == 257


# --- values ------------------------------------------------------------------------------------------------------------------------


def test_golden_rows(tmp_path, no_embedder):
    rows = [dict(zip(KEYS, case[:5], strict=True)) | {"answer": case[5], "similarities": case[6]} for case in GOLDEN]
    got = explained(tmp_path, rows)
    assert [row["reward"] for row in got] == pytest.approx([case[7] for case in GOLDEN], abs=1e-6)
    assert all(row["reward"] == pytest.approx(row["request"] + row["response"] + row["category"], abs=1e-6) for row in got)


def row_of(gold, text: str) -> dict | None:
    """A golden case of test_rewards as a row, None where a row cannot say it: accepted alternatives, an id that the prompt hides."""
    node, category = int(gold.node_P[0]), int(gold.category_P[0])
    if gold.accepted_PN[0].sum() > (node >= 0) or ("C9S1" in text and gold.node_of_id_PK[0].min() < 0):
        return None
    response = LABELS[int(gold.response_P[0])]
    return {
        "modality": MODALITIES[int(gold.modality_P[0])],
        "query_label": LABELS[int(gold.request_P[0])],
        "response_label": "" if response == LABELS[ABSENT] else response,
        "category": module.grid(TAXONOMY)[node] if category == CATEGORY_NODE else "",
        "original_category": "Some Risk" if category == CATEGORY_OOD else "",
        "answer": text,
        "similarities": EIGHT,
    }


@pytest.mark.parametrize("variant", ["published", "strict"])
def test_golden_rows_of_both_variants(tmp_path, variant, no_embedder):
    cases = [(row, case) for case in STRICT.values() if (row := row_of(case[0], case[1]))]
    got = [row["reward"] for row in explained(tmp_path, [row for row, _ in cases], variant)]
    assert got == pytest.approx([case[2 if variant == "published" else 3] for _, case in cases], abs=1e-6) and len(cases) > 15


def test_the_reference_on_random_rows(tmp_path, no_embedder):
    import random

    host, rng, rows = random.Random(3), np.random.default_rng(3), []
    for _ in range(600):
        row, _ = random_row(host)
        similarities = rng.uniform(0.3, 1, rng.integers(1, 7)).round(4).tolist()
        rows.append(row | {"answer": random_answer(host, row), "similarities": similarities})
    got = explained(tmp_path, rows)
    assert [row["reward"] for row in got] == pytest.approx([reference_reward.score(row["answer"], row) for row in rows], abs=1e-5)
    assert 0.6 < np.mean([row["format"] for row in got]) < 0.95 and sum(row["bonus"] > 0 for row in got) > 15


def test_ids_that_the_taxonomy_lacks_are_unlisted_in_strict(tmp_path, no_embedder):
    """C2S3 has its place in the grid; the packaged taxonomy ends at C2S2, and its reserved node is never shown."""
    rows = [GOOD | {"category": "C5S1", "answer": answer("unsafe safe", id)} for id in ("C2S3", "C11S1", "C99", "C2S2", "C5S1")]
    assert [row["category"] for row in explained(tmp_path, rows, "strict")] == [0, 0, 0, 0.5, 1]
    assert [row["category"] for row in explained(tmp_path, rows, "published")] == [0.5, 0.5, 0.5, 0.5, 1]


def test_unknown_gold_earns_nothing(tmp_path, no_embedder):
    rows = [GOOD | {"query_label": "unknown", "category": "unknown"}, GOOD | {"response_label": None, "category": "C1S1"}]
    first, second = explained(tmp_path, rows, "strict")
    assert (first["request"], first["response"], first["category"]) == (0, 1, 0)
    assert (second["request"], second["response"], second["category"]) == (1, 1, 0)  # no response: safe is the right line


def test_think_tag(tmp_path, no_embedder):
    rows = [GOOD | {"similarities": FIGURE, "answer": answer("unsafe safe", "Loose Slabs", tag=tag)} for tag in ("think", "thinking")]
    for tag, expected in (("think", [2.625, 0]), ("thinking", [0, 2.625])):
        assert [row["reward"] for row in explained(tmp_path, rows, think_tag=tag)] == pytest.approx(expected, abs=1e-6)


def test_long_answers_and_many_rows(tmp_path, no_embedder):
    """More rows than are read at once, some longer than the padding, in the order of the file."""
    texts = [answer("unsafe safe", "C5S1").replace("short", "ä" * n) for n in range(0, 600, 2)]
    rows = [GOOD | {"id": str(n), "category": "C5S1", "answer": text} for n, text in enumerate(texts)]
    got = explained(tmp_path, rows, "strict")
    assert [row["reward"] for row in got] == [3.0] * 300 and [row["id"] for row in got] == [str(n) for n in range(300)]


# --- similarities that are computed ------------------------------------------------------------------------------------------------


def bonus(similarity_S: np.ndarray, high: float, mean: float) -> float:
    return max(0, (similarity_S.max() - high) / (1 - high) / 2, (similarity_S.mean() - mean) / (1 - mean) / 2)


def test_names_are_compared_with_synonyms_or_the_taxonomy(tmp_path):
    node, embedder = TAXONOMY.by_id("C9S3"), load_embedder()
    synonyms = ["uneven slabs", "crooked tiles"]
    named = GOOD | {"original_category": node.name, "answer": answer("unsafe safe", node.synonyms[0])}
    got = explained(tmp_path, [GOOD | {"synonymous_phrase": synonyms}, named, named | {"answer": answer("unsafe safe", "C1S1")}])
    for row, name, phrases in (
        (got[0], "Loose Slabs", ("Loose Paving", *synonyms)),
        (got[1], node.synonyms[0], (node.name, *node.synonyms)),
    ):
        similarity_S = embedder.texts(list(phrases)) @ embedder.texts([name])[0]
        assert row["similarities"] == pytest.approx(similarity_S.tolist(), abs=1e-5)
        assert row["bonus"] == pytest.approx(bonus(similarity_S, 0.7, 0.6), abs=1e-5)
    assert got[1]["bonus"] == pytest.approx(0.5, abs=1e-4) and got[2]["similarities"] is None


def test_a_bank_brings_its_thresholds_and_what_it_excludes(tmp_path):
    embedder, path = load_embedder(), str(tmp_path / "bank.npz")
    save_bank(path, build_bank(TAXONOMY, embedder, ["C8S1"]).replace(max_threshold=0.4, mean_threshold=0.3))
    rows = []
    for id in ("C9S3", "C8S1"):
        node = TAXONOMY.by_id(id)
        rows.append(GOOD | {"original_category": node.name, "answer": answer("unsafe safe", node.synonyms[0].split()[0])})
    found = explain(read_jsonl(write(tmp_path / "rows.jsonl", rows)), TAXONOMY, "strict", bank=path)
    kept, excluded = found["rows"]
    assert (found["max_threshold"], found["mean_threshold"]) == (0.4, 0.3)
    assert kept["bonus"] == pytest.approx(bonus(np.array(kept["similarities"]), 0.4, 0.3), abs=1e-5)
    assert excluded["similarities"] == [] and excluded["bonus"] == 0 and excluded["category"] == 0.5
    published = explain(read_jsonl(tmp_path / "rows.jsonl"), TAXONOMY, "published", bank=path)
    assert (published["max_threshold"], published["mean_threshold"]) == (0.7, 0.6)


# --- the command -------------------------------------------------------------------------------------------------------------------


def test_the_command_prints_one_json_object_or_a_table(tmp_path, capsys, no_embedder):
    rows = [GOOD | {"similarities": FIGURE, "id": "a"}, GOOD | {"similarities": FIGURE, "modality": "text-image", "answer": "no answer"}]
    path = write(tmp_path / "rows.jsonl", rows)
    said = command(capsys, "--jsonl", path, "--variant", "published")
    assert said["variant"] == "published" and [row["reward"] for row in said["rows"]] == [2.625, 0]
    first, second = said["rows"]
    assert {name: first[name] for name in TERMS} == dict(zip(TERMS, (1, 1, 1, 0.625, 0.125, 0, 1), strict=True))
    assert set(first) == {"line", "id", "reward", *TERMS, "similarities", "read"} and first["line"] == 1 and first["id"] == "a"
    assert first["read"] == {"parsed": True, "request": "unsafe", "response": "safe", "category": "name", "category_id": None}
    assert second["read"]["parsed"] is False and second["id"] is None
    assert command(capsys, "--jsonl", path)["variant"] == "strict"
    assert main(["reward", "--jsonl", path]) == 0
    printed = capsys.readouterr().out
    assert "2.625" in printed and "not in format" in printed and "mean reward of 2 answers: 1.312" in printed
    assert "Loose" not in printed and "Loose" not in json.dumps(said)  # what an answer or a row says in words stays in the file


def line_of(row: dict):
    return module.Line("rows.jsonl", 1, row)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "no rows"),
        ("\n{oops\n", "line 2: not JSON"),
        ("[1]\n", "line 1: a JSON list"),
        ('{"a": ' + "9" * 5000 + "}\n", "line 1: not JSON"),
        (b"\xff\xfe", "not UTF-8"),
        (None, "cannot be read"),
    ],
)
def test_files_that_are_no_json_lines(tmp_path, capsys, content, says):
    path = tmp_path / "rows.jsonl"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    assert main(["reward", "--jsonl", str(path)]) == 2
    error = capsys.readouterr().err
    assert "rows.jsonl" in error and says in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"answer": ...}, "'answer' is missing"),
        ({"response_label": ...}, "'response_label' is missing"),
        ({"original_category": ...}, "'original_category' is missing"),
        ({"answer": 7}, "'answer' must be text, not int"),
        ({"modality": "video"}, "'modality' is 'video'; use text, text_image, image"),
        ({"query_label": "Unsafe"}, "use safe, unsafe, unknown"),
        ({"query_label": None}, "use safe, unsafe, unknown"),
        ({"category": "C77"}, "category 'C77'"),
        ({"similarities": "0.7"}, "'similarities' must be a list of numbers"),
        ({"similarities": [70]}, "'similarities' must be a list of numbers"),
        ({"similarities": [float("nan")]}, "'similarities' must be a list of numbers"),
        ({"synonymous_phrase": "slabs"}, "'synonymous_phrase' must be a list"),
        ({}, "no name of the taxonomy"),
    ],
)
def test_wrong_rows_are_named_by_line(tmp_path, capsys, change, says):
    row = {key: value for key, value in (GOOD | change).items() if value is not ...}
    path = write(tmp_path / "rows.jsonl", [GOOD | {"similarities": FIGURE}, row])
    assert main(["reward", "--jsonl", path]) == 2
    out, error = capsys.readouterr()
    assert "rows.jsonl line 2: " in error and says in error and error.count("\n") == 1 and out == ""


def test_wrong_usage(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl", [GOOD])
    for argv, says in (
        (["--jsonl", path, "--variant", "lenient"], "lenient"),
        ([], "--jsonl"),
        (["--jsonl", path, "--embedder", "no-such-folder", "--taxonomy", "no-such.yaml"], "no-such.yaml"),
    ):
        assert main(["reward", *argv]) == 2
        error = capsys.readouterr().err
        assert says in error and error.count("\n") == 1


def test_an_image_needs_no_response_label(tmp_path, no_embedder):
    row = {"modality": "image", "query_label": "safe", "category": "", "original_category": "", "answer": answer("safe", "None")}
    assert explained(tmp_path, [row], "strict")[0]["reward"] == 2 and explained(tmp_path, [row], "published")[0]["reward"] == 2.5
    assert module.read_row(line_of(row), module.grid(TAXONOMY), TAXONOMY).modality == IMAGE


def test_a_table_has_a_line_for_each_row(tmp_path):
    found = explain(read_jsonl(write(tmp_path / "rows.jsonl", [GOOD | {"similarities": FIGURE}] * 3)), TAXONOMY)
    assert len(table(found).splitlines()) == 5
