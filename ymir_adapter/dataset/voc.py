"""VOC files: the `object` elements of an XML file, corners inclusive, pixels counted from 0."""

from xml.etree import ElementTree

from trainer.readers.values import truth
from ymir_adapter.dataset.ark import fault_of
from ymir_adapter.dataset.columns import Classes, Columns, Notes, Status, shown

CORNERS = ("xmin", "ymin", "xmax", "ymax")
UTF16 = (b"\xff\xfe", b"\xfe\xff")


def read_voc(
    data: bytes, owner: int, classes: Classes, path: str, columns: Columns, notes: Notes
) -> Status:
    """Adds the objects of the task's classes. The annotated size is ignored: that of the stored
    pixels counts.
    """
    try:
        root = ElementTree.fromstring(_safe_xml(data))
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        return notes.broken(f"is not usable XML ({error})", path)
    for number, element in enumerate(root.iter("object"), 1):
        label = classes.label(element.findtext("name") or "")
        try:
            corners = [float(element.findtext(f"bndbox/{key}") or "") for key in CORNERS]
            fault = fault_of(max(label, 0), classes.count, *corners)
        except ValueError:
            fault = "malformed box"  # the platform writes no bndbox for a box without area
        if label < 0:
            name = shown((element.findtext("name") or "").encode())
            notes.add("class outside the task", "warning", "dropped", f"{name}", path)
        elif fault:
            notes.skipped(fault, f"object {number} has no box of four ordered numbers", path)
        else:
            x1, y1, x2, y2 = corners
            difficult = truth(element.findtext("difficult"))
            if difficult is None:
                detail = f"object {number}: difficult is neither 0 nor 1"
                notes.add("malformed difficult", "warning", "read as 0", detail, path)
            columns.add(owner, label, (x1, y1, x2 + 1, y2 + 1), bool(difficult))
    return Status.READ


def _safe_xml(data: bytes) -> bytes | str:
    """The document. Raises ValueError if it declares a document type: an entity could expand to
    gigabytes, or to a file.
    """
    text: bytes | str = data.decode("utf-16") if data[:2] in UTF16 else data
    if isinstance(text, str):
        # ElementTree refuses text that declares an encoding.
        text = text.partition("?>")[2] if text.startswith("<?") else text
    plain = text if isinstance(text, str) else text.decode("latin-1")
    if "<!DOCTYPE" in plain or "<!ENTITY" in plain or "\0" in plain:
        raise ValueError("it declares a document type")
    return text
