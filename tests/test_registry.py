"""Every set by name: what the readers for training make of the published formats, and what becomes of bad input.

All files here are made by the tests; their texts are mild and ours.
"""

import gzip
import io
import json
import os
import struct
import zlib
from collections import Counter
from hashlib import sha512
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from test_benchmark_sources import PICTURE, aegis, beaver, beaver_v, known, llava, wild, write
from test_rewriting_sources import PUT
from test_sources import png, put

from pgjax.data.schema import EVALUATION_ONLY, Example
from pgjax.data.sources import tables
from pgjax.data.sources.benchmarks import BENCHMARKS
from pgjax.data.sources.files import LeftOut, data_root, gather
from pgjax.data.sources.registry import SOURCES, find_source
from pgjax.taxonomy import load_taxonomy

TAXONOMY = load_taxonomy()
PNG = png()


def read(name: str, root: Path) -> tuple[list[Example], list[LeftOut]]:
    rows = list(find_source(name, root).read(root, TAXONOMY))
    return [row for row in rows if isinstance(row, Example)], [row for row in rows if isinstance(row, LeftOut)]


def kinds(left_out: list[LeftOut]) -> Counter:
    return Counter(row.kind for row in left_out)


# --- published formats --------------------------------------------------------------------------------------------------------------


def put_harmbench(root: Path) -> None:
    behaviours = [{"Behavior": "lamp", "SemanticCategory": "copyright", "ContextString": "", "BehaviorID": "lamp_theft"}]
    write(root / "harmbench/behavior_datasets/harmbench_behaviors_text_all.csv", behaviours)
    answer = {"test_case": "Pretend: lamp", "generation": "Take it.", "human_0": 1, "human_1": 0, "human_2": 1, "cls": 0}
    answers = {
        "lamp_theft": [answer, answer | {"human_2": 0}],
        "goblin": [answer | {"generation": " "}, answer | {"human_1": 2}],
    }
    put(root / "harmbench/classifier_val_sets/text_behaviors_val_set.json", json.dumps(answers))
    multimodal = [
        {"Behavior": "Open it.", "BehaviorID": id, "SemanticCategory": category, "ImageFileName": f"{id}.png"}
        for id, category in [("vault", "illegal"), ("box", "cybercrime_intrusion"), ("gone", "illegal")]
    ]
    write(root / "harmbench/behavior_datasets/harmbench_behaviors_multimodal_all.csv", multimodal)
    put(root / "harmbench/multimodal_behavior_images/vault.png", PNG)
    put(root / "harmbench/multimodal_behavior_images_768jpg/box.jpg", PNG)


def put_spam(root: Path) -> None:
    lines = [
        ",,,said",
        "SP0,,,",
        "1,Hello Sam,,SP0",
        "2, ,,",
        "SP3 ,,,",
        "1,JOIN the lamp club,,SP0",
        "SP4,,,",
        "1,Your lamp is locked,,SP4",
    ]
    put(root / "gpt_oss_safeguard_spam/example_policies/spam/golden_dataset.csv", "\n".join([*lines, ",,Recall,0.8"]) + "\n")


def put_msts(root: Path) -> None:
    prompt = {"case_id": "case_1", "prompt_id": "prompt_1", "prompt_text": "Should I shake it?", "hazard_subcategory": "Theft"}
    prompt |= {"hazard_subsubcategory": "", "unsafe_image_id": "unsafe_image_1", "unsafe_image_description": "A lamp"}
    other = prompt | {"case_id": "case_2", "prompt_id": "prompt_2", "unsafe_image_id": "unsafe_image_2"}
    withheld = prompt | {"case_id": "case_3", "prompt_id": "prompt_3", "hazard_subsubcategory": "Minors"}
    write(root / "msts/prompts/english_multimodal.csv", [prompt, other, withheld])
    put(root / "msts/unsafe_images/unsafe_image_1.png", PNG)
    said = {"case_id": "case_1", "prompt_text": "Should I shake it?", "model": "m", "response": "Yes.", "final_label": "2 - unsafe"}
    rows = [said, said | {"final_label": "1 - safe"}, said | {"prompt_text": "Who?"}, said | {"final_label": "3 - other"}]
    write(root / "msts/response_annotations/english_multimodal.csv", rows)


def put_do_not_answer(root: Path) -> None:
    row = {"id": "1", "risk_area": "Malicious Uses", "types_of_harm": "Adult Content", "specific_harms": "s", "question": "A lamp?"}
    row |= {"GPT4_response": "No.", "GPT4_harmful": "0", "GPT4_action": "1", "vicuna-7b_response": "Yes.", "vicuna-7b_harmful": "1"}
    write(root / "do_not_answer/data_en.csv", [row, row | {"specific_harms": "About children"}, row | {"types_of_harm": "Goblins"}])


def wild_train(subcategory: str, **row) -> dict:
    return wild("a lamp", "it shines", "harmful", "unharmful") | {"subcategory": subcategory} | row


def said(*turns: str, as_json: bool = True):
    entries = [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]
    return json.dumps(entries) if as_json else entries


def proguard(modality: str, labels: str, category: str = "", original: str = "", message: str | None = None, **row) -> dict:
    first, _, second = labels.partition(" ")
    made = {"modality": modality, "message": said("A lamp?", "It shines.") if message is None else message, "query_label": first}
    made |= {"response_label": second, "category": category, "original_category": original, "synonymous_phrase": ["a", "b"]}
    return made | {"image": PICTURE if modality != "text" else None} | row


PROGUARD = [
    proguard("text", "safe safe"),
    proguard("text", "unsafe safe", "C8S1", "Weapons", said("Hi", "Hello", "A lamp?", "It shines.")),
    proguard("text", "unsafe unsafe", "", "Goblin Mischief"),
    proguard("text", "unsafe safe", "", "Weapons"),
    proguard("text", "unsafe ", "C8S1", "Weapons", said("A lamp?")),
    proguard("text-image", "safe unsafe", "C9", message=said("<image>\nA lamp?", "Grr.")),
    proguard("image", "unsafe ", "C7S3", message=said("<image>")),
    proguard("image", "safe ", message="[]"),
    proguard("image", "safe ", image=None),
    proguard("text", "unsafe safe", "C11S1"),
    proguard("text", "unsafe safe", "C99S9"),
    proguard("text", "grumpy safe"),
    proguard("video", "safe safe"),
    proguard("text", "safe safe", message="grumpy"),
    proguard("text", "safe safe", message=said()),
    proguard("text", "safe safe", message=said(" ")),
]

# Set: what puts its files below a root, what is known of the examples, and how many rows are left out for which reason.
CASES = {
    "aegis2_train": (
        lambda root: write(root / "aegis2/train.json", [aegis("a lamp", None, "unsafe", "Harassment"), aegis("a lamp", "no", "", "")]),
        [("unsafe", "absent", "C7S1 C3S2"), ("unknown", "unknown", "unknown")],
        {},
    ),
    "aegis2_validation": (
        lambda root: write(root / "aegis2/validation.json", [aegis("REDACTED", None, "unsafe", "Violence"), aegis("a", None, "safe", "")]),
        [("safe", "absent", "none")],
        {"redacted": 1},
    ),
    "ailuminate_demo": (
        lambda root: write(
            root / "ailuminate_demo/demo.csv",
            [{"prompt_text": "a lamp", "hazard": hazard} for hazard in ("ssh", "spc_fin", "cse", "lamps")],
        ),
        [("unknown", "absent", "C9S1"), ("unknown", "absent", "Specialised Financial Advice")],
        {"withheld category": 1, "unknown label": 1},
    ),
    "beavertails_train": (
        lambda root: write(root / "beavertails/train.jsonl.xz", [beaver(True), beaver(False, "self_harm"), beaver(False, "child_abuse")]),
        [("unknown", "safe", "unknown"), ("unknown", "unsafe", "C9S1")],
        {"withheld category": 1},
    ),
    "beavertails_v_train": (
        lambda root: [
            write(root / f"beavertails_v/{n}/train-0.parquet", [beaver_v("animal_abuse", "no"), beaver_v("x", "no", image=None)])
            for n in (1, 2)
        ],
        [("unknown", "unsafe", "C9S2")] * 2,
        {"unknown label": 2},
    ),
    "do_not_answer": (
        put_do_not_answer,
        [("unsafe", "safe", "C11S2 C3S3"), ("unsafe", "unsafe", "C11S2 C3S3")],
        {"withheld category": 1, "unknown label": 1},
    ),
    "gpt_oss_safeguard_spam": (
        put_spam,
        [
            ("safe", "absent", "none"),
            ("unsafe", "absent", "Spam and Unsolicited Promotion C3S1 C6S1"),
            ("unsafe", "absent", "C3S1 C4S2 C6S1"),
        ],
        {"empty": 1},
    ),
    "harmbench_answers": (
        put_harmbench,
        [("unsafe", "unsafe", "C1S1 C1S2 C1S3"), ("unsafe", "safe", "C1S1 C1S2 C1S3"), ("unsafe", "absent", "unknown")],
        {"unknown label": 1},
    ),
    "harmbench_multimodal": (
        put_harmbench,
        [("unsafe", "absent", "C6S2 C8S1 C8S2 C8S3 C9S3 C2S2"), ("unsafe", "absent", "C4S1 C4S2 C2S2")],
        {"no picture": 1},
    ),
    "llavaguard_train": (
        lambda root: [
            write(root / "llavaguard/set.json", [llava("1", "O4: Nudity", "Unsafe"), llava("2", "O2: Violence", "Unsafe", "train")]),
            put(root / "llavaguard/pictures/1.png", PNG),
        ],
        [("unsafe", "absent", "C9S3 C10S3 C7S3")],
        {"other split": 1},
    ),
    "med_safety_bench_train": (
        lambda root: [
            write(
                root / f"med_safety_bench/train/{model}/category_{n}.csv",
                [{"": "0", "harmful_medical_request": "A lamp?", "safe_response": "No."}],
            )
            for model in ("gpt4", "llama2")
            for n in (1, 2)
        ],
        [("unsafe", "safe", "unknown")] * 4,
        {},
    ),
    "mm_safetybench": (
        PUT["mm_safetybench"],
        [("unsafe", "absent", "C3S1 C6S1")] * 3 + [("unsafe", "absent", "Specialised Legal Advice")],
        {"no picture": 5},
    ),
    "msts": (put_msts, [("unsafe", "absent", "C9S3 C6S2")], {"no picture": 1, "withheld category": 1}),
    "msts_response": (
        put_msts,
        [("unsafe", "unsafe", "C9S3 C6S2"), ("unsafe", "safe", "C9S3 C6S2")],
        {"no prompt of this case": 1, "unknown label": 1},
    ),
    "proguard_data": (
        lambda root: write(root / "proguard_data/data/train-0.parquet", PROGUARD),
        [
            ("safe", "safe", "none"),
            ("unsafe", "safe", "C8S1"),
            ("unsafe", "unsafe", "Goblin Mischief"),
            ("unsafe", "safe", "C8S1"),
            ("unsafe", "absent", "C8S1"),
            ("safe", "unsafe", "C9"),
            ("unsafe", "absent", "C7S3"),
            ("safe", "absent", "none"),
        ],
        {"no picture": 1, "withheld category": 1, "unknown label": 3, "wrong value": 2, "empty": 1},
    ),
    "siuo": (
        PUT["siuo"],
        [("unsafe", "safe", "C9S3 C9S1"), ("unsafe", "absent", "Political and Social Controversy C7S1")],
        {},
    ),
    "toxic_chat_train": (
        lambda root: write(root / "toxic_chat/toxic-chat_annotation_train.csv", [{"user_input": "a lamp", "toxicity": "1"}]),
        [("unsafe", "absent", "unknown")],
        {},
    ),
    "vlguard": (
        PUT["vlguard"],
        [("safe", "safe", "none"), ("unsafe", "safe", "unknown"), ("unsafe", "absent", "C2S1"), ("unsafe", "safe", "C2S2")],
        {"empty": 1, "no picture": 2},
    ),
    "vlsbench": (PUT["vlsbench"], [("unsafe", "absent", "C9S3")], {"no picture": 1}),
    "wildguard_train": (
        lambda root: write(
            root / "wildguard/wildguard_train.parquet",
            [
                wild_train("cyberattack"),
                wild_train("benign", prompt_harm_label="unharmful"),
                wild_train("others"),
                wild_train("lamps"),
                wild_train("benign", prompt_harm_label=None, response=None),
            ],
        ),
        [("unsafe", "safe", "C4S1 C4S2"), ("safe", "safe", "none"), ("unsafe", "safe", "unknown"), ("unknown", "absent", "unknown")],
        {"unknown label": 1},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_published_formats(tmp_path, name):
    put_set, expected, left_out = CASES[name]
    put_set(tmp_path)
    examples, out = read(name, tmp_path)
    assert [known(example) for example in examples] == expected
    assert kinds(out) == left_out and all(row.where.startswith(f"{Path(str(SOURCES[name].where)).parts[0]}/") for row in out)
    assert len({example.id for example in examples}) == len(examples) and {example.source for example in examples} == {name}
    assert not any("grumpy" in row.reason or "lamp" in row.reason.lower() for row in out), "no reason holds what stands in a row"
    for example in examples:
        assert (example.response is None) == (example.response_label == "absent")
        assert example.images in ((), (PNG,)) or name in PUT


def test_proguard_data_as_conversations(tmp_path):
    write(tmp_path / "proguard_data/train.parquet", PROGUARD[:8])
    examples, _ = read("proguard_data", tmp_path)
    assert examples[1].turns == (("user", "Hi"), ("assistant", "Hello"))
    assert {(e.request, e.response) for e in examples[:4]} == {("A lamp?", "It shines.")}
    assert [(e.modality, e.request, e.response) for e in examples[4:7]] == [
        ("text", "A lamp?", None),
        ("text_image", "A lamp?", "Grr."),
        ("image", None, None),
    ]
    assert examples[3].name == TAXONOMY.by_id("C8S1").name, "a name of the taxonomy without its id was hidden in a prompt"


def test_proguard_data_holds_pictures_in_several_ways(tmp_path):
    put(tmp_path / "proguard_data/a/1.png", PNG)
    parts = [{"type": "image", "image": "a/1.png"}, {"type": "text", "text": "A lamp?"}]
    message = json.dumps([{"role": "system", "content": "s"}, {"role": "user", "content": parts}])
    row = proguard("text-image", "safe ", message=message)
    for columns in ({"image": "a/1.png"}, {"images": [{"bytes": None, "path": "a/1.png"}]}, {"images": [PICTURE]}, {}):
        kept = {key: value for key, value in row.items() if key != "image"} | columns
        write(tmp_path / "proguard_data/train.parquet", [kept])
        [example], out = read("proguard_data", tmp_path)
        assert (example.request, example.images, out) == ("A lamp?", (PNG,), [])
    write(tmp_path / "proguard_data/train.parquet", [{key: value for key, value in row.items() if key != "message"}])
    examples, [missing] = read("proguard_data", tmp_path)
    assert not examples and missing.broken and missing.kind == "missing column"
    assert missing.where == "proguard_data/train.parquet" and missing.reason.startswith("lacks the column 'message'; it has modality, ")


def test_harmbench_answers_are_of_their_behaviours_group(tmp_path):
    put_harmbench(tmp_path)
    [behaviour], _ = read("harmbench", tmp_path)
    first, second, other = read("harmbench_answers", tmp_path)[0]
    assert first.group == second.group == behaviour.group != other.group
    (tmp_path / "harmbench/behavior_datasets/harmbench_behaviors_text_all.csv").unlink()
    _, out = read("harmbench_answers", tmp_path)
    assert out[0].broken and out[0].kind == "broken file", "what answers are about is not forgotten in silence"


def test_the_registry():
    assert BENCHMARKS.keys() <= SOURCES.keys() >= EVALUATION_ONLY
    readers = [source.read for source in SOURCES.values()]
    assert len(set(readers)) == len(readers) and all(source.origin and source.licence for source in SOURCES.values())
    listed = (Path(__file__).parent.parent / "docs" / "data.md").read_text()
    assert [name for name in SOURCES.keys() - {"probes"} if f"`{name}`" not in listed] == []
    with pytest.raises(ValueError, match=r"there is no source 'wildgard'; did you mean wildguard\?"):
        find_source("wildgard", Path())
    with pytest.raises(ValueError, match="source rows.jsonl: .* is not there"):
        find_source("rows.jsonl", Path("nowhere"))


# --- a user's own rows ---------------------------------------------------------------------------------------------------------------

OWN = [
    {"id": "a", "request": "A lamp?", "request_label": "safe"},
    {"request": "Take it.", "response": "No.", "request_label": "unsafe", "response_label": "safe", "category": "C8S1", "group": "g"},
    {"image": "pictures/1.png", "request_label": "unsafe", "category": "ood", "name": "Goblin Mischief"},
    {"request": "Nobody knows."},
    {"request": "kept away", "request_label": "unsafe", "category": "C11S1"},
    {"request": "A lamp?", "request_label": "grumpy"},
    {"request": "A lamp?", "request_label": "unsafe", "category": "grumpy"},
    {"request": "A lamp?", "request_label": "safe", "category": "C8S1"},
    {"request": "A lamp?", "respons": "grumpy"},
    {"request": ["grumpy"]},
    {"image": "../outside.png"},
    {"image": "pictures/nowhere.png"},
]


def put_own(root: Path, *rows: dict, name: str = "own/mine.jsonl") -> None:
    put(root / name, "".join(json.dumps(row) + "\n" for row in rows))


def test_own_rows(tmp_path):
    put_own(tmp_path, *OWN)
    put(tmp_path / "own/pictures/1.png", PNG)
    put(tmp_path / "outside.png", PNG)
    examples, out = read("own", tmp_path)
    assert [(e.id, e.modality, *known(e)) for e in examples] == [
        ("mine-a", "text", "safe", "absent", "none"),
        ("mine-2", "text", "unsafe", "safe", "C8S1"),
        ("mine-3", "image", "unsafe", "absent", "Goblin Mischief"),
        ("mine-4", "text", "unknown", "absent", "unknown"),
    ]
    assert [(row.kind, row.where.rpartition(" ")[2]) for row in out] == [
        ("withheld category", "5"),
        ("unknown label", "6"),
        ("unknown label", "7"),
        ("wrong value", "8"),
        ("wrong value", "9"),
        ("wrong value", "10"),
        ("path outside the set", "11"),
        ("no picture", "12"),
    ]
    assert not any("grumpy" in row.reason for row in out)
    assert examples[1].group == "own-g" and {e.source for e in examples} == {"mine"}
    assert read("own/mine.jsonl", tmp_path)[0] == examples
    with pytest.raises(ValueError, match="public data: own/mine.jsonl: row 6 has a label in `request_label`"):
        gather(find_source("own", tmp_path).read(tmp_path, TAXONOMY))


@pytest.mark.parametrize("id", [None, "", ["1"]])
def test_a_row_without_an_id_is_told_from_a_copy(tmp_path, id):
    rows = [{"instruction": "Clean the vault", "image_path": "imgs/1.png", "sub_category": "Violence"} | {"instruction_id": id}] * 2
    put(tmp_path / "vlsbench/data.json", json.dumps(rows))
    examples, out = read("vlsbench", tmp_path)
    assert not examples and [(row.kind, row.reason) for row in out] == [("wrong value", "needs an id in `instruction_id`")] * 2


# --- bad input -----------------------------------------------------------------------------------------------------------------------


def bomb() -> bytes:
    """A PNG of a hundred bytes that would be of 100,000 x 100,000 pixels."""
    chunk = lambda kind, data: struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))  # noqa: E731
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"0" * 64)) + chunk(b"IEND", b"")


def large() -> bytes:
    """One that Pillow itself would still decode."""
    out = io.BytesIO()
    Image.new("1", (8200, 8200)).save(out, "PNG")
    return out.getvalue()


def jpeg() -> bytes:
    out = io.BytesIO()
    Image.effect_noise((96, 96), 60).convert("RGB").save(out, "JPEG")
    return out.getvalue()


@pytest.mark.parametrize(
    ("data", "kind"),
    [
        (PNG[:-30], "unreadable picture"),
        (jpeg()[:-200], "unreadable picture"),
        (b"no picture at all", "unreadable picture"),
        (bomb(), "picture too large"),
        (large(), "picture too large"),
    ],
    ids=["cut png", "cut jpeg", "no picture", "bomb", "large"],
)
def test_a_bad_picture_is_one_row(tmp_path, data, kind):
    write(tmp_path / "beavertails_v/train.parquet", [beaver_v("animal_abuse", "no", image={"bytes": b}) for b in (PNG, data, jpeg())])
    put(tmp_path / "vlsbench/imgs/1.png", data)
    put(tmp_path / "vlsbench/imgs/2.png", PNG)
    row = {"instruction": "How?", "sub_category": "Cybercrime"}
    write(tmp_path / "vlsbench/data.json", [row | {"instruction_id": n, "image_path": f"imgs/{n}.png"} for n in (1, 2)])
    for name, where, good in (
        ("beavertails_v_train", "beavertails_v/train.parquet: row 2", 2),
        ("vlsbench", "vlsbench/data.json: row 1", 1),
    ):
        for _ in range(2):  # a set is read more than once
            examples, [out] = read(name, tmp_path)
            assert (len(examples), out.kind, out.where, out.broken) == (good, kind, where, True)


def test_no_picture_is_read_from_outside_of_its_set(tmp_path):
    secret = put(tmp_path / "secret.png", PNG)
    inside = put(tmp_path / "vlsbench/imgs/1.png", PNG)
    (inside.parent / "link.png").symlink_to(secret)
    (inside.parent / "near.png").symlink_to(inside)
    (inside.parent / "circle.png").symlink_to(inside.parent / "circle.png")
    row = {"instruction": "How?", "sub_category": "Cybercrime"}
    named = {
        "imgs/1.png": None,
        "imgs/../imgs/near.png": None,
        "../secret.png": "path outside the set",
        "imgs/../../secret.png": "path outside the set",
        str(secret): "path outside the set",
        "imgs/link.png": "path outside the set",
        "/dev/zero": "path outside the set",
        "imgs/circle.png": "unreadable picture",
        "imgs/\0.png": "unreadable picture",
        "a" * 5000: "unreadable picture",
        "imgs": "no picture",
        "": "no picture",
    }
    write(tmp_path / "vlsbench/data.json", [row | {"instruction_id": n, "image_path": path} for n, path in enumerate(named)])
    examples, out = read("vlsbench", tmp_path)
    assert [row.kind for row in out] == [kind for kind in named.values() if kind] and len(examples) == 2


def test_a_broken_parquet_file_is_one_entry(tmp_path):
    """Cut, overwritten in the middle, and with a text that is not UTF-8; the other files and rows are read."""
    rows = [wild_train("cyberattack", prompt=f"lamp {n} " + sha512(bytes([n % 256])).hexdigest() * 4) for n in range(300)]
    folder = tmp_path / "proguard_data"
    write(folder / "b.parquet", [proguard("text", "safe safe")] * 2)
    whole = (folder / "b.parquet").read_bytes()
    put(folder / "a.parquet", whole[: len(whole) // 2])
    put(folder / "c.parquet", b"")
    examples, out = read("proguard_data", tmp_path)
    assert len(examples) == 2
    assert [(row.kind, row.where[-9:]) for row in out] == [("broken file", "a.parquet"), ("broken file", "c.parquet")]

    path = tmp_path / "wildguard/wildguard_train.parquet"
    path.parent.mkdir()
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=100, use_dictionary=False)
    data = bytearray(path.read_bytes())
    begin = pq.ParquetFile(path).metadata.row_group(1).column(0).data_page_offset
    data[begin : begin + 200] = bytes(200)
    path.write_bytes(data)
    examples, [out] = read("wildguard_train", tmp_path)
    assert 0 < len(examples) <= 100 and (out.kind, out.where) == ("broken file", "wildguard/wildguard_train.parquet")
    assert f"behind row {len(examples)} " in out.reason

    table = pa.Table.from_pylist([wild_train("cyberattack") | {"prompt": text} for text in (b"lamp", b"l\xe4mp", b"boat")])
    pq.write_table(table.set_column(0, "prompt", pa.Array.from_buffers(pa.string(), 3, table["prompt"].chunk(0).buffers())), path)
    examples, [out] = read("wildguard_train", tmp_path)
    assert [e.request for e in examples] == ["lamp", "boat"] and (out.kind, out.where[-5:]) == ("wrong encoding", "row 2")


def test_files_that_break_in_the_middle(tmp_path):
    lines = [json.dumps(beaver(True)) + "\n"] * 2000
    path = tmp_path / "beavertails/train.jsonl.gz"
    whole = gzip.compress("".join(lines).encode())
    put(path, whole[: len(whole) // 2])
    examples, [out] = read("beavertails_train", tmp_path)
    assert 100 < len(examples) < 2000 and out.kind == "broken file" and f"behind row {len(examples)}" in out.reason
    put(path, gzip.compress("".join(lines[:2]).encode() + b'{"prompt": "l\xe4mp"}\n{"pro\n[1]\n"grumpy"\n' + lines[0].encode()))
    examples, out = read("beavertails_train", tmp_path)
    assert len(examples) == 3 and [(row.kind, row.where[-5:]) for row in out] == [
        ("wrong encoding", "row 3"),
        ("not JSON", "row 4"),
        ("not JSON", "row 5"),
        ("not JSON", "row 6"),
    ]
    put(tmp_path / "surge_toxicity/toxicity_en.csv", b"text,is_toxic\n" + b"lamp,Toxic\n" * 2000 + b"l\xe4mp,Toxic\n" * 9)
    examples, [out] = read("surge_toxicity", tmp_path)
    assert examples and (out.kind, out.where, out.broken) == ("wrong encoding", "surge_toxicity/toxicity_en.csv", True)
    put(tmp_path / "surge_toxicity/toxicity_en.csv", "text,is_toxic\nlamp,Toxic\n".encode("utf-16"))
    assert [row.kind for row in read("surge_toxicity", tmp_path)[1]] == ["wrong encoding"]


def test_a_line_without_end_is_not_held(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "LONGEST_LINE", 2000)
    put(tmp_path / "beavertails/train.jsonl.gz", gzip.compress(json.dumps(beaver(True)).encode() + b"\n" + b" " * 10_000))
    examples, [out] = read("beavertails_train", tmp_path)
    assert len(examples) == 1 and out.kind == "broken file" and "line 2 longer" in out.reason


def test_halves_of_characters_become_question_marks(tmp_path):
    put_own(tmp_path, {"request": "a \ud800 lamp", "request_label": "safe"})
    put(tmp_path / "beavertails/train.jsonl.gz", gzip.compress(json.dumps(beaver(True) | {"prompt": "a \ud800 lamp"}).encode()))
    assert [read(name, tmp_path)[0][0].request for name in ("own", "beavertails_train")] == ["a ? lamp"] * 2


@given(
    st.binary(max_size=60),
    st.sampled_from(["own/a.jsonl", "aegis2/train.json", "do_not_answer/a.csv", "wildguard/wildguard_train.parquet"]),
)
def test_no_bytes_end_a_reader(tmp_path_factory, data, file):
    root = tmp_path_factory.mktemp("any")
    put(root / file, data)
    name = {"own": "own", "aegis2": "aegis2_train", "do_not_answer": "do_not_answer", "wildguard": "wildguard_train"}[file.split("/")[0]]
    examples, out = read(name, root)
    assert not examples and all(row.broken and row.where.startswith(file) and "\n" not in row.reason for row in out)


# --- the real files ------------------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not os.environ.get("PGJAX_DATA"), reason="PGJAX_DATA names no folder of public sets")
@pytest.mark.parametrize(
    ("name", "labels", "left_out"),
    [
        ("ailuminate_demo", {("unknown", "absent"): 1100}, {}),
        ("gpt_oss_safeguard_spam", {("safe", "absent"): 18, ("unsafe", "absent"): 22}, {}),
        ("harmbench_answers", {("unsafe", "unsafe"): 273, ("unsafe", "safe"): 329}, {}),
        ("harmbench_multimodal", {("unsafe", "absent"): 110}, {}),
        ("med_safety_bench", {("unsafe", "safe"): 900}, {}),
        ("med_safety_bench_train", {("unsafe", "safe"): 900}, {}),
    ],
)
def test_counts_of_the_real_files(name, labels, left_out):
    examples, out = read(name, data_root(None))
    assert Counter((e.request_label, e.response_label) for e in examples) == labels and kinds(out) == left_out
    assert len({e.id for e in examples}) == len(examples)
