"""A user's own rows as a source: the native format of docs/data.md, JSON Lines."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from pgjax.data.jsonl import Line
from pgjax.data.rows import LABELLED, labelled
from pgjax.data.schema import Example
from pgjax.data.sources.examples import check_picture
from pgjax.data.sources.files import LABEL, VALUE, WITHHELD, NotUsed, Rows, Unusable, each, image_group, picture, split_of, text_group
from pgjax.data.sources.tables import Row, read_rows
from pgjax.taxonomy import Taxonomy


def own(root: Path, taxonomy: Taxonomy, pattern: str = "own/**/*.jsonl*") -> Rows:
    """Rows with the keys of `pgjax.data.rows.labelled`; an `image` is a path that does not leave the folder of its file. The source's name
    is that of the file; a row without a `group` is in that of its picture, or of its text."""
    categories = {node.id for node in taxonomy.nodes} | {"none", "ood", ""}
    reserved = {node.id for node in taxonomy.nodes if node.reserved}

    def read(row: Row) -> Iterator[Example]:
        if not row.values.keys() <= set(LABELLED):
            raise Unusable(VALUE, f"has a key that is none of {', '.join(LABELLED)}")
        for key in ("request_label", "response_label"):
            if key in row.values:
                row.label(key, "safe", "unsafe", "unknown")
        if (category := row.text("category") if "category" in row.values else "") not in categories:
            raise Unusable(LABEL, "has a `category` that is no id of the taxonomy, nor ood or none")
        if category in reserved:
            raise NotUsed(WITHHELD)
        path = root / row.file
        name = path.name.partition(".")[0]
        try:
            made = labelled(Line(path, row.number, row.values), taxonomy, "", lambda file: _picture(path.parent, file))
        except ValueError as error:
            raise Unusable(VALUE, f"does not fit: {str(error).partition(f'line {row.number}: ')[2] or error}") from None
        content = image_group(made.images[0]) if made.images else text_group(made.request or "")
        group = f"own-{made.group}" if row.values.get("group") not in (None, "") else content
        id = f"{name}-{made.id if row.values.get('id') not in (None, '') else row.serial}"
        yield replace(made, id=id, source=name, group=group, split=split_of(group))

    return each(read_rows(root, pattern), read)


def _picture(folder: Path, file: Path) -> bytes:
    try:
        data = picture(folder, str(file))
    except NotUsed as error:
        raise Unusable(error.kind, "names a picture that is not there") from None
    check_picture(data)
    return data
