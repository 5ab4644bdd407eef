"""Words of messages."""


def counted(count: int, what: str, several: str = "") -> str:
    """'1 box', '2,804 boxes'."""
    return f"{count:,} {what if count == 1 else several or what + 's'}"
