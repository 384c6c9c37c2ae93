"""Text for people: counts in words, and text from strangers for a terminal: answers of receivers, account ids, names that somebody wrote by SQL.

A terminal obeys what is printed on it: it moves the cursor over what was said before, sets its title, answers as if
somebody had typed. And a reader obeys what turns text round or hides it.
"""


def clean(text: str, *, keep: str = "") -> str:
    """Show whatever isn't a visible character or a space as an escape, such as \\x1b or \\u202e; but for what is in `keep`."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() or c in keep else c.encode("unicode_escape").decode() for c in text)


def amount(number: float, one: str, several: str | None = None) -> str:
    """Say how many there are of what: "1 event", "2,000 events". `several` is for what isn't `one` with an s: deliveries, "events wait"."""
    return f"{number:{',' if isinstance(number, int) else ',g'}} {one if number == 1 else several or f'{one}s'}"
