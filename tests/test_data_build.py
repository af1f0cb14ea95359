"""Datasets made by `pgjax data build`: from files with all that can be wrong in them to rows, a card and pages."""

import gzip
import json
import os
from collections import Counter
from pathlib import Path

import pytest
from chat_server import chat_server

from pgjax.cli import main
from pgjax.conversation import answer_text
from pgjax.data.build import read_dataset, splits_of
from pgjax.data.sources.files import split_of, text_group
from pgjax.data.toy import draw

CONFIG = Path(__file__).parent.parent / "configs" / "data"
WORDS = "amber basin cedar delta ember fjord grove haven inlet jetty knoll lagoon meadow nook orchard pier quarry ridge thicket".split()


def request(n: int) -> str:
    """Texts that share few shingles."""
    return f"May I {WORDS[n % 19]} the {WORDS[n // 19 % 19]} beside {WORDS[(7 * n + 3) % 19]} number {n} {WORDS[(3 * n + 1) % 19]}?"


def write_rows(path: Path, rows: list[dict | str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8")


@pytest.fixture
def root(tmp_path) -> Path:
    """Two files of rows: 60 texts and 40 pictures of two categories and of none; copies; and every kind of what is broken."""
    root = tmp_path / "sets"
    about = lambda n: {"request_label": "unsafe", "category": ("C8S1", "C9S1")[n % 4 == 3]} if n % 2 else {"request_label": "safe"}  # noqa: E731
    texts: list[dict | str] = [{"id": f"t{n}", "request": request(n), **about(n)} for n in range(60)]
    texts += [{"id": f"copy{n}", "request": request(n).upper(), **about(n)} for n in range(3)]
    texts += [{"id": "near", "request": request(5) + "!? thicket", **about(5)}]
    texts += [{"id": "other", "request": request(7), "request_label": "safe"}]  # labelled otherwise elsewhere
    texts += ["{", {"id": "l", "request": "x", "request_label": "perhaps"}, {"id": "k", "request": "x", "category": "C99"}]
    write_rows(root / "texts.jsonl", texts)
    pictures = root / "shown" / "files"
    pictures.mkdir(parents=True)
    rows: list[dict | str] = []
    for n in range(40):
        (pictures / f"{n}.png").write_bytes(draw(("C8S1", "C9S1")[n % 4 == 3], "unsafe" if n % 2 else "safe", 56, 56, n))
        rows.append({"id": f"p{n}", "image": f"files/{n}.png", **about(n)})
    (pictures / "cut.png").write_bytes((pictures / "0.png").read_bytes()[:60])
    rows += [
        {"id": "cut", "image": "files/cut.png", "request_label": "safe"},
        {"id": "out", "image": "../../x.png", "request_label": "safe"},
    ]
    write_rows(root / "shown" / "rows.jsonl", rows)
    return root


def configured(tmp_path: Path, root: Path, **values) -> Path:
    given = {
        "name": "small",
        "sources": ("texts.jsonl", "shown/rows.jsonl"),
        "root": str(root),
        "out": str(tmp_path / "out"),
        "max_rejected": 0.2,
    }
    path = tmp_path / "small.py"
    targets = "(Target('text', 30, unsafe=0.5, even=True), Target('image', 100), Target('text', 8, split='eval'))"
    told = ", ".join(f"{key}={value if key == 'vote' else repr(value)}" for key, value in (given | values).items())
    head = "from pgjax.data.dataset import Dataset, Target\nfrom pgjax.data.vote import Vote\nfrom pgjax.endpoint import Limits\n"
    path.write_text(f"{head}dataset = Dataset(targets={targets}, {told})\n")
    return path


def test_a_dataset(tmp_path, root, capsys):
    assert main(["data", "build", str(configured(tmp_path, root))]) == 0
    plan, out = capsys.readouterr().out, tmp_path / "out"
    card = json.loads((out / "card.json").read_text())
    assert splits_of(out) == ["eval", "train"] and "Targets" in plan and str(out) in plan
    rows = {split: list(read_dataset(out, split)) for split in ("train", "eval")}
    kinds = Counter((row.modality, row.request_label, row.category) for row in rows["train"])
    assert kinds["text", "unsafe", "node"] == kinds["text", "safe", "none"] == 15
    even = Counter(row.node for row in rows["train"] if row.modality == "text" and row.node)
    assert abs(even["C8S1"] - even["C9S1"]) <= 1
    assert not {row.group for row in rows["train"]} & {row.group for row in rows["eval"]}
    by_target = {(t["split"], t["modality"], t["unsafe"]): t for t in card["targets"]}
    images = [by_target["train", "image", unsafe] for unsafe in (True, False)]
    assert sum(t["taken"] for t in images) == sum(row.modality == "image" for row in rows["train"]) < 40
    assert sum(t["short"] for t in images) == 100 - sum(t["taken"] for t in images)
    texts, shown = (card["sources"][name] for name in ("texts.jsonl", "shown/rows.jsonl"))
    assert texts["rows"] == 68 and shown["rows"] == 42
    assert texts["rejected"] == {"not JSON": 1, "unknown label": 2}
    assert shown["rejected"] == {"unreadable picture": 1, "path outside the set": 1}
    assert sum(texts["left_out"].values()) == 6 and texts["left_out"]["conflict"] == 2
    rejected = [json.loads(line) for line in (out / "rejected.jsonl").read_text().splitlines()]
    assert len(rejected) == 5 and all({"source", "kind", "where", "reason"} <= row.keys() for row in rejected)
    assert not any(word in (out / "rejected.jsonl").read_text() for word in WORDS) and not (out / "pool").exists()
    assert "| train text unsafe | 15 |" in (out / "card.md").read_text()


def test_the_same_whatever_the_order_and_more_sources_change_no_split(tmp_path, root):
    hashes, splits = set(), []
    for n, sources in enumerate((("texts.jsonl", "shown/rows.jsonl"), ("shown/rows.jsonl", "texts.jsonl"), ("texts.jsonl",))):
        assert main(["data", "build", str(configured(tmp_path, root, sources=sources)), "--out", str(tmp_path / f"out{n}")]) == 0
        out = tmp_path / f"out{n}"
        if n < 2:
            hashes.add(json.loads((out / "card.json").read_text())["hash"])
        splits.append({row.id: row.split for split in splits_of(out) for row in read_dataset(out, split) if row.modality == "text"})
    assert len(hashes) == 1 and splits[0] == splits[1] == splits[2]


def test_too_many_broken_rows(tmp_path, root, capsys):
    write_rows(root / "texts.jsonl", [{"id": str(n), "request": request(n), "request_label": "perhaps"} for n in range(30)])
    assert main(["data", "build", str(configured(tmp_path, root))]) == 2
    last = capsys.readouterr().err.splitlines()[-1]
    kept = tmp_path / "out-rejected.jsonl"
    assert "30 of 30 rows are broken: unknown label (30)" in last and str(kept) in last
    assert len(kept.read_text().splitlines()) == 30 and not (tmp_path / "out").exists()


def test_a_file_that_cannot_be_read_counts_with_all_its_rows(tmp_path, root, capsys):
    for n in range(10):
        write_rows(root / "own" / f"{n}.jsonl", [{"id": k, "request": request(10 * n + k), "request_label": "safe"} for k in range(9)])
    (root / "own" / "5.jsonl.gz").write_bytes(gzip.compress((root / "own" / "5.jsonl").read_bytes())[:-40])
    (root / "own" / "5.jsonl").unlink()
    config = str(configured(tmp_path, root, sources=("own",), max_rejected=0.09))
    assert main(["data", "build", config]) == 2
    assert "10% of the files cannot be read on" in capsys.readouterr().err.splitlines()[-1]
    assert main(["data", "build", config, "--max-rejected", "0.1"]) == 0
    assert json.loads((tmp_path / "out" / "rejected.jsonl").read_text())["kind"] == "broken file"


def test_half_characters_and_pictures_that_are_not_there(tmp_path, root):
    half = {
        "id": "\ud800",
        "group": "\udc00",
        "request": request(1) + "\ud800",
        "request_label": "unsafe",
        "category": "ood",
        "name": "\ud800",
    }
    gone = {"id": "gone", "image": "files/gone.png", "request_label": "safe"}
    rows = [{"id": n, "request": request(n), "request_label": "safe"} for n in range(2, 30)]
    write_rows(root / "half.jsonl", [half, gone, {"id": {}, "request": request(0)}, {"id": True, "request": request(0)}, *rows])
    assert main(["data", "build", str(configured(tmp_path, root, sources=("half.jsonl",)))]) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["sources"]["half.jsonl"]["rejected"] == {"no picture": 1, "wrong value": 2}
    assert "half-?" in {row.id for split in splits_of(tmp_path / "out") for row in read_dataset(tmp_path / "out", split)}


def test_benchmarks(tmp_path, root, capsys):
    """What one holds is left out of training and counted; one that cannot be read whole might hold anything."""
    held = [f"Physical harm,{request(n)}\n" for n in range(60) if split_of(text_group(request(n))) == "train"][:2]
    file = root / "simple_safety_tests" / "tests.csv"
    file.parent.mkdir()
    file.write_text("harm_area,prompts_final\n" + "".join(held))
    config = str(configured(tmp_path, root, benchmarks=("simple_safety_tests",)))
    assert main(["data", "build", config]) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert card["benchmarks"] == {"simple_safety_tests": {"rows": 2, "left_out": {}, "leaked": 2}}
    assert card["sources"]["texts.jsonl"]["left_out"]["in a benchmark"] == 2
    file.write_text("moon,prompts_final\n" + "".join(held))
    assert main(["data", "build", config, "--out", str(tmp_path / "again")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "benchmark simple_safety_tests" in error and "take it out of benchmarks" in error and not (tmp_path / "again").exists()


def test_unlabelled_rows_are_voted_on(tmp_path, root):
    """Two judges that agree on every other row; the rows that they part on have no label."""
    write_rows(root / "texts.jsonl", [{"id": f"u{n}", "request": request(n)} for n in range(40)])

    def answer(body: dict) -> str:
        number = int(str(body["messages"][-1]["content"]).partition("number ")[2].split()[0])
        unsafe = number % 4 == 0 or (number % 2 == 1 and body["model"] == "brass")
        return answer_text("unsafe" if unsafe else "safe", "safe", "C8S1" if unsafe else None, "It is brass.", "text", "think")

    with chat_server() as server:
        server.answer = answer
        judges = f"Vote(judges=('brass@{server.url}', 'tin@{server.url}'), limits=Limits(tries=1))"
        config = configured(tmp_path, root, sources=("texts.jsonl",), vote=judges)
        assert main(["data", "build", str(config)]) == 0
        first = len(server.calls)
        assert main(["data", "build", str(config), "--out", str(tmp_path / "again")]) == 0
    out, replies = tmp_path / "out", tmp_path / "out-replies"
    card = json.loads((out / "card.json").read_text())
    [told] = card["votes"].values()
    assert first == 80 and told["rows"] == 40 and told["fields"]["request"]["decided"] == 0.5
    assert card["sources"]["texts.jsonl"]["left_out"] == {"label unknown": 20} and replies.is_dir()
    labels = {row.id: row.request_label for split in splits_of(out) for row in read_dataset(out, split)}
    assert labels and all(label == ("unsafe" if int(id.partition("u")[2]) % 4 == 0 else "safe") for id, label in labels.items())
    assert len((out / "votes.jsonl").read_text().splitlines()) == 40


def test_stats_and_show(tmp_path, root, capsys):
    assert main(["data", "build", str(configured(tmp_path, root))]) == 0
    out = str(tmp_path / "out")
    capsys.readouterr()
    assert main(["data", "stats", out, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    rows = [row for split in ("train", "eval") for row in read_dataset(out, split)]
    assert sum(int(row["rows"]) for row in told["Rows by labels"]) == len(rows)
    assert {row["source"] for row in told["Sources"]} == {"texts", "rows"}
    assert {row["50%"] for row in told["Pictures, pixels"]} == {str(56 * 56)}
    text, picture = (next(row for row in rows if row.modality == modality) for modality in ("text", "image"))
    page = tmp_path / "row.html"
    assert main(["data", "show", out, "--id", text.id, "--out", str(page)]) == 0
    said = capsys.readouterr().out
    assert json.loads(said)["id"] == text.id and text.request not in said
    assert text.request in page.read_text() and "C8S1" in page.read_text() and "<details>" in page.read_text()
    assert main(["data", "show", out, "--id", picture.id, "--out", str(page), "--reveal"]) == 0
    assert "data:image/png" in page.read_text() and 'class="veil"' not in page.read_text()


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["build", "nowhere.py"], "no such file"),
        (["build", "CONFIG", "--sources", "texts.jsonl", "texts.jsonl"], "twice"),
        (["build", "CONFIG", "--sources", "surge_toxicty"], "did you mean surge_toxicity"),
        (["build", "CONFIG", "--sources", "none.jsonl"], "none.jsonl is not there"),
        (["build", "CONFIG", "--benchmarks", "moon"], "moon"),
        (["build", "CONFIG", "--near", "0"], "near"),
        (["build", "CONFIG", "--root", "nowhere"], "nowhere"),
        (["stats", "nowhere"], "holds no dataset"),
        (["show", "nowhere", "--id", "a"], "holds no dataset"),
        (["show", "nowhere"], "--id"),
    ],
)
def test_bad_usage_is_one_line(tmp_path, root, capsys, argv, says):
    argv = [str(configured(tmp_path, root)) if word == "CONFIG" else word for word in argv]
    assert main(["data", *argv]) == 2
    error = capsys.readouterr().err.splitlines()
    assert says in error[-1] and error[-1].startswith("pgjax: ") and not (tmp_path / "out").exists()


def test_the_published_mix_names_what_is_missing(tmp_path, capsys):
    assert main(["data", "build", str(CONFIG / "proguard_87k.py"), "--root", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is not there" in capsys.readouterr().err


@pytest.mark.skipif(not os.environ.get("PGJAX_DATA"), reason="needs the public sets")
def test_the_public_mix(tmp_path):
    assert main(["data", "build", str(CONFIG / "public.py"), "--out", str(tmp_path / "out")]) == 0
    card = json.loads((tmp_path / "out" / "card.json").read_text())
    assert all(target["short"] == 0 for target in card["targets"]) and not any(s["rejected"] for s in card["sources"].values())
    trained = {row.source for row in read_dataset(tmp_path / "out", "train")}
    assert {"openai_moderation", "surge_toxicity", "figstep", "typography"} <= trained and "mossbench" not in trained
