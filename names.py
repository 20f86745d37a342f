"""What options of other trainers mean here, by the tables of names.toml.

python names.py                     writes the table at the end of docs/migrating.md
"""

import tomllib
from pathlib import Path

from model import UserError, nearest

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NAMES = {  # {theirs: (table, meaning)}
    name: (table, meaning)
    for table in ("same", "no_effect", "answers", "removed")
    for meaning, names in TABLES[table].items()
    for name in names.split()
} | {name: ("by_value", choices) for names, choices in TABLES["by_value"].items() for name in names.split()}
SYNONYMS = {name: ours for name, (table, ours) in NAMES.items() if table == "same"}


def translate(name, value):
    """(our option or "", its value, [note]) for a name of another trainer; a name that is in no table is returned as it
    is. UserError for one that is answered with a sentence."""
    table, meaning = NAMES.get(name, ("unknown", ""))
    if table == "unknown":
        return name, value, []
    if table == "same":
        return meaning, value, [f"--{name} is --{meaning} here"]
    if table == "no_effect":
        return "", None, [f"--{name} has no effect: {meaning}"]
    if table == "removed":
        raise UserError(f"was removed; {meaning}")
    off = dict.fromkeys(("none", "null", "false", ""), "")
    choices = meaning if table == "by_value" else off | {"otherwise": meaning}
    word = str(value).lower()
    if word not in choices or word == "otherwise":
        raise UserError(f"{value!r} is not an option here; {choices['otherwise']}")
    option, _, ours = choices[word].partition("=")
    is_so = f"is --{option} {ours} here" if option else "has no effect: it is so already"
    return option, ours, [f"--{name} {value} {is_so}"]


def suggestion(name, names):
    """A hint: at most three options that hold all words of `name` and few others, or the one spelt almost like it. ""
    otherwise: a wrong guess is worse than none."""
    words = set(name.split("_"))
    close = [other for other in names if words <= (theirs := set(other.split("_"))) and len(theirs) <= len(words) + 2]
    if 0 < len(close) <= 3:
        return f"; did you mean {' or '.join(sorted(close))}?"
    return nearest(name, names, cutoff=0.85)


HEAD = "\n| theirs | here |\n|---|---|\n"  # the text above it in docs/migrating.md is written by hand


def migrating(text):
    """The text of docs/migrating.md with the table as it is now."""
    rows = {names: f"`--{ours}`" for ours, names in TABLES["same"].items()}
    for names, choices in TABLES["by_value"].items():
        pairs = [f"{value or 'empty'}: {f'`--{ours}`' if ours else 'no effect'}" for value, ours in choices.items()]
        rows[names] = f"{', '.join(pairs[:-1])}; else {choices['otherwise']}"
    rows |= {names: f"no effect: {why}" for why, names in TABLES["no_effect"].items()}
    rows |= {names: answer for answer, names in TABLES["answers"].items()}
    rows |= {names: f"was removed; {answer}" for answer, names in TABLES["removed"].items()}
    flags = lambda names: ", ".join(f"`--{name}`" for name in names.split())
    return text.partition(HEAD)[0] + HEAD + "".join(f"| {flags(names)} | {rows[names]} |\n" for names in rows)


if __name__ == "__main__":
    page = Path(__file__).with_name("docs") / "migrating.md"
    page.write_text(migrating(page.read_text(encoding="utf-8")), encoding="utf-8")
