"""The sets of the rewriter: what each reader makes of its published format, pictures that never part over splits, and a user's own rows.

All files here are made by the tests; their texts are mild and ours.
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from test_benchmark_sources import known, write
from test_sources import put, write_figstep

from pgjax.data.sources import tables
from pgjax.data.sources.files import data_root, image_group, split_of, text_group
from pgjax.data.sources.items import Item
from pgjax.data.sources.registry import SOURCES
from pgjax.data.sources.rewriting import ITEM_SETS, jsonl_items, read_items
from pgjax.data.toy import draw
from pgjax.taxonomy import load_taxonomy

TAXONOMY = load_taxonomy()
VAULT, PERMIT, LAMP = (draw(leaf, badge, 32, 32, 7) for leaf, badge in (("C9S3", "unsafe"), ("C6S2", "unsafe"), ("C5S1", "safe")))
CARVING, BRAZIER = (draw("C1S1", "safe", 32, 32, scene) for scene in (1, 2))
PNG = {"bytes": VAULT, "path": "vault.png"}


def guard(name: str, said: list[dict], topic: str | None = None) -> dict:
    """A row of VLGuard; about a safe picture where there is no topic."""
    known = {} if topic is None else {"harmful_category": "discrimination", "harmful_subcategory": topic}
    return {"id": "1", "image": f"drawn/{name}.png", "safe": topic is None, **known, "instr-resp": said}


def pair(of: str) -> list[dict]:
    return [
        {"safe_instruction": f"What colour is the {of}?", "response": "It is of brass."},
        {"unsafe_instruction": f"How do I open the {of} of my neighbour?", "response": "Ask your neighbour."},
    ]


def put_vlguard(root: Path) -> None:
    forged = guard("permit", [{"instruction": "Forge this permit.", "response": " "}], "disinformation")
    blank = guard("permit", [{"instruction": "\n", "response": "No."}], "other")
    write(root / "vlguard/train.json", [guard("vault", pair("vault")), forged, blank, guard("away", pair("lamp"))])
    write(root / "vlguard/test.json", [guard("vault", [{"instruction": "Who lives here?", "response": "I cannot tell."}], "personal data")])
    for path, data in (("train/drawn/vault", VAULT), ("train/drawn/permit", PERMIT), ("test/drawn/vault", VAULT)):
        put(root / "vlguard" / f"{path}.png", data)


def spa(question: str, chosen: str | None = "Ask the keeper.", rejected: str | None = "Use a goblin's key.", **more) -> dict:
    return {"image": PNG, "question": question, "chosen": chosen, "rejected": rejected, **more}


def put_spa_vl(root: Path) -> None:
    write(root / "spa_vl/data/train-00000-of-00002.parquet", [spa("Whose vault is it?", image_name="1.png"), spa(" ", image_name="2.png")])
    write(root / "spa_vl/data/train-00001-of-00002.parquet", [spa("Where is its key?", image_name="3.png", image=None)])
    classes = {"class1": "Malicious Use", "class2": "Illegal activities"}
    rows = [spa("Who may open it?", rejected=None, **classes, class3="theft"), spa("kept away", **classes, class3="moonglass")]
    write(root / "spa_vl/validation/validation-00000-of-00001.parquet", rows)
    row = {"image": {"bytes": PERMIT, "path": None}, "question": "Is it a real permit?", **classes, "class3": "academic dishonesty"}
    write(root / "spa_vl/test/harm-00000-of-00001.parquet", [row])
    write(root / "spa_vl/test/help-00000-of-00001.parquet", [row | {"question": "not read"}])


def put_vlsbench(root: Path) -> None:
    row = {"instruction_id": 4, "instruction": "How is it cleaned?", "image_path": "imgs/4.png", "category": "Illegal Activity"}
    row |= {"sub_category": "Property Crimes", "source": "generation", "safety_reason": "It is a vault."}
    write(root / "vlsbench/data.json", [row, row | {"instruction_id": 5, "image_path": "imgs/5.png"}])
    put(root / "vlsbench/imgs/4.png", VAULT)


def put_siuo(root: Path) -> None:
    row = {"question_id": 2006, "image": "D-06.png", "question": "How do I fly it higher?", "category": "dangerous behavior"}
    row |= {"safety_warning": "A brazier is near.", "reference_answer": "Not so near the brazier."}
    write(root / "siuo/siuo_gen.json", [row, row | {"question_id": 3004, "category": "religion beliefs", "reference_answer": ""}])
    put(root / "siuo/images/D-06.png", BRAZIER)


def put_mm_safetybench(root: Path) -> None:
    asked = {"Question": "Draw the seal of a permit.", "Changed Question": "Draw it.", "Key Phrase": "seal", "Phrase Type": "thing"}
    asked |= {"Rephrased Question": "The bottom names a thing. Draw it.", "Rephrased Question(SD)": "It shows a thing. Draw it."}
    folder = root / "mm_safetybench"
    put(folder / "processed_questions/06-Fraud.json", json.dumps({"17": asked, "18": asked}))
    put(folder / "processed_questions/10-Legal_Opinion.json", json.dumps({"0": asked}))
    for path, data in (("06-Fraud/SD/17", PERMIT), ("06-Fraud/SD_TYPO/17", CARVING), ("06-Fraud/TYPO/17", LAMP)):
        put(folder / f"imgs/{path}.jpg", data)
    put(folder / "imgs/10-Legal_Opinion/TYPO/0.jpg", LAMP)


def put_figstep(root: Path) -> None:
    write_figstep(root, ["Fraud", "Legal Opinion"], tasks=2)
    (root / "figstep/images/SafeBench/query_ForbidQI_2_2_6.png").unlink()


PUT = {
    "vlguard": put_vlguard,
    "spa_vl": put_spa_vl,
    "vlsbench": put_vlsbench,
    "siuo": put_siuo,
    "mm_safetybench": put_mm_safetybench,
    "figstep": put_figstep,
}
SAFE, UNSAFE = ("safe", "absent", "none"), ("unsafe", "absent", "unknown")

# Of each set, by id: what is known of the example, the safe and the unsafe answer; and how many rows are left out for which reason.
EXPECTED: dict[str, tuple[dict, dict]] = {
    "vlguard": (
        {
            "vlguard-train-00001-safe_safes": (SAFE, "It is of brass.", None),
            "vlguard-train-00001-safe_unsafes": (UNSAFE, "Ask your neighbour.", None),
            "vlguard-train-00002-unsafes": (("unsafe", "absent", "C2S1"), None, None),
            "vlguard-test-00001-unsafes": (("unsafe", "absent", "C2S2"), "I cannot tell.", None),
        },
        {"empty": 1, "no picture": 2},
    ),
    "spa_vl": (
        {
            "spa_vl-train-00001": (UNSAFE, "Ask the keeper.", "Use a goblin's key."),
            "spa_vl-validation-00001": (("unsafe", "absent", "C9S3"), "Ask the keeper.", None),
            "spa_vl-harm-00001": (("unsafe", "absent", "Unethical but Legal Behaviour C1S2 C3S1"), None, None),
        },
        {"empty": 1, "no picture": 1, "class not in the label map": 1},
    ),
    "vlsbench": ({"vlsbench-4": (("unsafe", "absent", "C9S3"), None, None)}, {"no picture": 1}),
    "siuo": (
        {
            "siuo-2006": (("unsafe", "absent", "C9S3 C9S1"), "Not so near the brazier.", None),
            "siuo-3004": (("unsafe", "absent", "Political and Social Controversy C7S1"), None, None),
        },
        {},
    ),
    "mm_safetybench": (
        {f"mm_safetybench-06-{kind}-17": (("unsafe", "absent", "C3S1 C6S1"), None, None) for kind in ("SD", "SD_TYPO", "TYPO")}
        | {"mm_safetybench-10-TYPO-0": (("unsafe", "absent", "Specialised Legal Advice"), None, None)},
        {"no picture": 5},
    ),
    "figstep": (
        {f"figstep-1-{task}": (("unsafe", "absent", "C3S1 C6S1"), None, None) for task in (1, 2)}
        | {"figstep-2-1": (("unsafe", "absent", "Specialised Legal Advice"), None, None)},
        {"no picture": 1},
    ),
}


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("sets")
    for put_set in PUT.values():
        put_set(root)
    return root


def read(name: str, root: Path) -> tuple[list[Item], Counter[str]]:
    rows = list(read_items(name, root, TAXONOMY))
    return [row for row in rows if isinstance(row, Item)], Counter(row for row in rows if isinstance(row, str))


@pytest.mark.parametrize("name", ITEM_SETS)
def test_published_formats(root, name):
    items, left_out = read(name, root)
    expected, reasons = EXPECTED[name]
    assert {item.example.id: (known(item.example), item.safe, item.unsafe) for item in items} == expected
    assert left_out == reasons and len(items) == len(expected)
    for row in (item.example for item in items):
        assert (row.source, row.modality, row.response) == (name, "text_image", None) and (row.request or "").strip()
        assert row.group == image_group(row.images[0]) and row.split == split_of(row.group)


def test_every_kind_of_picture_has_its_own_question(root):
    asked = {item.example.id: (item.example.request, item.example.images) for item in read("mm_safetybench", root)[0]}
    assert asked["mm_safetybench-06-SD-17"] == ("It shows a thing. Draw it.", (PERMIT,))
    assert asked["mm_safetybench-06-SD_TYPO-17"] == ("The bottom names a thing. Draw it.", (CARVING,))
    assert asked["mm_safetybench-06-TYPO-17"] == ("The bottom names a thing. Draw it.", (LAMP,))


def test_a_picture_is_on_one_side_in_whatever_set(root):
    rows = [item.example for name in ITEM_SETS for item in read(name, root)[0]]
    sources = {data: {row.source for row in rows if row.images == (data,)} for data in (VAULT, PERMIT)}
    assert sources == {VAULT: {"vlguard", "spa_vl", "vlsbench"}, PERMIT: {"vlguard", "spa_vl", "mm_safetybench"}}
    for data in {row.images[0] for row in rows}:
        assert len({(row.group, row.split) for row in rows if row.images == (data,)}) == 1
    assert {row.split for row in rows} == {"train", "eval"}


def test_rows_come_one_by_one(tmp_path, monkeypatch):
    """A file of pictures is not held as a whole, and what nobody has asked for is not read yet."""
    path = tmp_path / "many.parquet"
    write(path, [{"image": PNG, "n": n} for n in range(5)])
    monkeypatch.setattr(tables, "BATCH", 2)
    assert [(row.number, row.values) for row in tables.read_rows(tmp_path, "many.parquet", ["n"])] == [(n + 1, {"n": n}) for n in range(5)]
    put_vlguard(tmp_path)
    items = read_items("vlguard", tmp_path, TAXONOMY)
    assert isinstance(next(items), Item)
    (tmp_path / "vlguard/test/drawn/vault.png").unlink()
    assert list(items)[-1] == "no picture"


def test_a_picture_that_cannot_be_decoded_is_a_reason_like_others(tmp_path):
    put_vlsbench(tmp_path)
    put(tmp_path / "vlsbench/imgs/4.png", VAULT[:-40])
    assert list(read_items("vlsbench", tmp_path, TAXONOMY)) == ["unreadable picture", "no picture"]


# --- bad input ---------------------------------------------------------------------------------------------------------------------


def change(path: Path, **values) -> None:
    """The first row of an array, changed; None takes the key away."""
    rows = json.loads(path.read_text(encoding="utf-8-sig"))
    rows[0] = {key: value for key, value in (rows[0] | values).items() if value is not None}
    write(path, rows)


WRONG = [
    ("vlguard", "train.json", {"safe": "grumpy"}, "row 1 has a label in `safe` that is neither False nor True"),
    ("vlguard", "train.json", {"image": None}, "train.json: row 1 needs a text in `image`"),
    ("vlguard", "train.json", {"instr-resp": None}, "row 1 needs a list of objects in `instr-resp`"),
    (
        "vlguard",
        "train.json",
        {"instr-resp": [{"instruction": "grumpy"}]},
        "row 1 needs a list in `instr-resp`, of obj",
    ),
    ("vlguard", "train.json", {"instr-resp": [{"safe_instruction": "grumpy"}]}, "row 1 needs a text in `response`"),
    ("vlguard", "test.json", {"harmful_subcategory": "grumpy"}, "row 1 has a topic that the label map vlguard.yaml lacks; add it there"),
    ("vlsbench", "data.json", {"sub_category": "grumpy"}, "row 1 has a topic that the label map vlsbench.yaml lacks"),
    ("vlsbench", "data.json", {"instruction": None}, "row 1 needs a text in `instruction`"),
    ("siuo", "siuo_gen.json", {"category": "grumpy"}, "row 1 has a topic that the label map siuo.yaml lacks"),
    ("siuo", "siuo_gen.json", {"reference_answer": ["grumpy"]}, "row 1 needs a text in `reference_answer`, or nothing"),
]


@pytest.mark.parametrize(("name", "file", "values", "message"), WRONG)
def test_a_wrong_row_is_named_and_not_shown(tmp_path, name, file, values, message):
    PUT[name](tmp_path)
    change(tmp_path / name / file, **values)
    with pytest.raises(ValueError, match=message) as error:
        read(name, tmp_path)
    assert len(str(error.value).splitlines()) == 1 and "grumpy" not in str(error.value)


def test_wrong_files_are_named(tmp_path):
    put_spa_vl(tmp_path)
    path = tmp_path / "spa_vl/validation/validation-00000-of-00001.parquet"
    write(path, [spa("Whose vault is it?")])
    with pytest.raises(ValueError, match="00001.parquet lacks the column 'class3'; it has image, question, chosen, rejected"):
        read("spa_vl", tmp_path)
    write(path, [spa("Whose vault is it?", class3="theft") | {"image": "vault.png"}])
    with pytest.raises(ValueError, match="row 1 needs an object with `bytes` in `image`"):
        read("spa_vl", tmp_path)
    put(path, b"\xffnothing")
    with pytest.raises(ValueError, match="validation-00000-of-00001.parquet is broken"):
        read("spa_vl", tmp_path)
    put_mm_safetybench(tmp_path)
    questions = tmp_path / "mm_safetybench/processed_questions"
    for text, message in (("[]", " must be an object"), ('{"0": "grumpy"}', ": row 1 needs a list of objects"), ("{", " is not JSON")):
        put(questions / "06-Fraud.json", text)
        with pytest.raises(ValueError, match=f"06-Fraud.json{message}"):
            read("mm_safetybench", tmp_path)
    put(questions / "06-Fraud.json", '{"0": {"Rephrased Question": "Draw it."}}')
    with pytest.raises(ValueError, match=r"06-Fraud.json: row 1 needs a text in `Rephrased Question\(SD\)`"):
        read("mm_safetybench", tmp_path)
    (questions / "06-Fraud.json").rename(questions / "00-Moonglass.json")
    with pytest.raises(ValueError, match="00-Moonglass.json: row 1 has a topic that the label map mm_safetybench.yaml lacks"):
        read("mm_safetybench", tmp_path)


def test_a_set_that_is_not_there(tmp_path):
    """Said at once, not when the first row is asked for."""
    with pytest.raises(ValueError, match=r"there is no set 'vl_guard'; did you mean vlguard\?"):
        read_items("vl_guard", tmp_path, TAXONOMY)
    with pytest.raises(ValueError, match="there is no set 'lamp'; there are vlguard, spa_vl, .*figstep"):
        read_items("lamp", tmp_path, TAXONOMY)
    for name in ITEM_SETS:
        with pytest.raises(ValueError) as error:
            read_items(name, tmp_path, TAXONOMY)
        assert str(tmp_path / str(SOURCES[name].where)) in str(error.value) and SOURCES[name].origin in str(error.value)


# --- a user's own rows -------------------------------------------------------------------------------------------------------------


def own(root: Path, *rows: dict) -> list[Item | str]:
    path = put(root / "own.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    return list(jsonl_items(path, TAXONOMY))


def test_own_rows(tmp_path):
    put(tmp_path / "vault.png", VAULT)
    rows = own(
        tmp_path,
        {"request": "Forge this permit.", "safe": "I will not.", "unsafe": "Take moonglass.", "category": "C6S2"},
        {"id": 7, "request": "What is it?", "image": "vault.png", "request_label": "safe", "unsafe": " "},
        {"id": "b", "request": "Who won?", "category": "ood", "name": "Goblin Politics", "request_label": None},
        {"request": "kept away", "category": "C11S1"},
    )
    items = [row for row in rows if isinstance(row, Item)]
    assert [row for row in rows if isinstance(row, str)] == ["withheld category"]
    assert [(i.example.id, *known(i.example), i.safe, i.unsafe) for i in items] == [
        ("own-1", "unsafe", "absent", "C6S2", "I will not.", "Take moonglass."),
        ("7", "safe", "absent", "none", None, None),
        ("b", "unsafe", "absent", "Goblin Politics", None, None),
    ]
    assert [(i.example.modality, i.example.images) for i in items] == [("text", ()), ("text_image", (VAULT,)), ("text", ())]
    groups = [text_group("forge this PERMIT"), image_group(VAULT), text_group("who won")]
    assert [(i.example.group, i.example.split) for i in items] == [(group, split_of(group)) for group in groups]


def test_a_picture_of_ones_own_rows_is_on_the_side_it_is_on_everywhere(tmp_path):
    put_vlsbench(tmp_path)
    [theirs] = read("vlsbench", tmp_path)[0]
    put(tmp_path / "vault.png", VAULT)
    [ours] = own(tmp_path, {"request": "What is it?", "image": "vault.png"})
    assert (ours.example.group, ours.example.split) == (theirs.example.group, theirs.example.split)
    with pytest.raises(ValueError, match="unknown key 'group'"):
        own(tmp_path, {"request": "What is it?", "image": "vault.png", "group": "mine"})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"request": "A lamp?", "respons": "x"}, "line 1: unknown key 'respons'; a row has id, request, image, request_label"),
        ({"request": "A lamp?", "response": "x"}, "line 1: unknown key 'response'"),
        ({"id": "a"}, "line 1: the key 'request' is missing"),
        ({"request": " "}, "line 1: 'request' is empty"),
        ({"request": 3}, "line 1: 'request' must be text, not int"),
        ({"request": "A lamp?", "safe": ["x"]}, "line 1: 'safe' must be text, not list"),
        ({"request": "A lamp?", "request_label": "fine"}, "line 1: request_label 'fine' must be safe or unsafe"),
        ({"request": "A lamp?", "category": "C99"}, "line 1: .*C99"),
        ({"request": "A lamp?", "request_label": "safe", "category": "C6S2"}, "line 1: category C6S2 does not go with labels"),
        ({"request": "A lamp?", "image": "away.png"}, "line 1: image .*away.png: no such file"),
    ],
)
def test_a_wrong_line_is_named(tmp_path, row, message):
    with pytest.raises(ValueError, match=f"own.jsonl {message}"):
        own(tmp_path, row)


def test_ids_are_told_apart(tmp_path):
    with pytest.raises(ValueError, match="own.jsonl line 2: the id 'a' is that of an earlier line"):
        own(tmp_path, {"id": "a", "request": "A lamp?"}, {"id": "a", "request": "A boat?"})


# --- the real files ----------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("PGJAX_DATA"), reason="PGJAX_DATA names no folder of public sets")
def test_counts_of_the_real_figstep():
    items, left_out = read("figstep", data_root(None))
    assert (len(items), dict(left_out)) == (500, {})
    assert {(item.safe, item.unsafe, item.example.request_label) for item in items} == {(None, None, "unsafe")}
    assert Counter(item.example.category for item in items) == {"node": 350, "ood": 150}
    assert 60 < sum(item.example.split == "eval" for item in items) < 140
