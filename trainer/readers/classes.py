"""Maps a dataset's own classes to contiguous labels, by name."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from trainer.readers.findings import Finding
from vidt.errors import UserError, shown


@dataclass(frozen=True)
class ClassMatch:
    """`label_of` maps the dataset's own ids to labels, -1 for a class that is not trained.
    `category_ids[label]` is the dataset's id, -1 for a class that it does not have.
    """

    names: tuple[str, ...]
    category_ids: tuple[int, ...]
    label_of: Mapping[int, int]


def match_classes(
    source: str, own_names: Mapping[int, str], class_names: Sequence[str] | None
) -> ClassMatch:
    """Match the dataset's ids and names to `class_names`; None takes all, in the order of ids.

    Raises UserError if there is no class, if two have the same name, or if a name is not one line.
    """
    if not own_names:
        raise UserError(f"{source}: no classes are named")
    own_ids = sorted(own_names)
    names = tuple(own_names[own_id] for own_id in own_ids) if class_names is None else class_names
    for where, given in ((source, own_names.values()), ("class_names", names)):
        twice = [name for name, times in Counter(given).items() if times > 1]
        broken = [name for name in given if len(name.splitlines()) > 1]
        odd = [name for name in given if not is_text(name)]
        if odd:
            raise UserError(
                f"{where}: class name {shown(odd[0])} is not text of UTF-8; save the file as UTF-8"
            )
        if broken:
            raise UserError(f"{where}: class name {broken[0]!r} is not one line; rename it")
        if twice:
            raise UserError(f"{where}: class name {twice[0]!r} is used twice; names must differ")
    id_of = {own_names[own_id]: own_id for own_id in own_ids}
    label_of_name = {name: label for label, name in enumerate(names)}
    return ClassMatch(
        names=tuple(names),
        category_ids=tuple(id_of.get(name, -1) for name in names),
        label_of={own_id: label_of_name.get(own_names[own_id], -1) for own_id in own_ids},
    )


def is_text(name: str) -> bool:
    """False for bytes of another encoding, which Python reads as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def foreign_class_findings(
    source: str, names: Iterable[str], trained: Sequence[str]
) -> list[Finding]:
    """One finding per class that is not among those `trained`; `names` holds the class of each of
    its boxes.
    """
    alike = {name.strip().lower(): name for name in trained}

    def hint(name: str) -> str:
        same = alike.get(name.strip().lower())
        return f"; {same!r} is, and differs only in case or blanks" if same is not None else ""

    return [
        Finding(
            kind="class not trained",
            severity="warning",
            action="dropped",
            detail=f"boxes of class {name!r}, which is not among the classes to learn{hint(name)}",
            source=source,
            count=count,
        )
        for name, count in Counter(names).items()
    ]
