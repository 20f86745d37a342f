"""What options of other trainers mean here, by the tables of names.toml.

python names.py                     writes the table at the end of docs/migrating.md
"""

import tomllib
from pathlib import Path

from model import UserError

TABLES = tomllib.loads(Path(__file__).with_suffix(".toml").read_text(encoding="utf-8"))
NAMES = {  # {theirs: (table, meaning)}
    name: (table, meaning)
    for table in ("same", "no_effect", "answers", "removed")
    for meaning, names in TABLES[table].items()
    for name in names.split()
} | {name: ("by_value", choices) for names, choices in TABLES["by_value"].items() for name in names.split()}
SYNONYMS = {name: ours for name, (table, ours) in NAMES.items() if table == "same"}
OFF = {"none": "", "null": "", "false": "", "": ""}  # accepted for names that are answered with a sentence


def translate(name, value):
    """(our option or "", its value, what to note) for one of NAMES. UserError for what is answered with a sentence."""
    table, meaning = NAMES[name]
    if table == "same":
        return meaning, value, f"--{name} is --{meaning} here"
    if table == "no_effect":
        return "", None, f"--{name} has no effect: {meaning}"
    if table == "removed":
        raise UserError(f"was removed; {meaning}")
    choices = meaning if table == "by_value" else OFF | {"otherwise": meaning}
    word = str(value).lower()
    if word not in choices or word == "otherwise":
        raise UserError(f"{value!r} is not an option here; {choices['otherwise']}")
    option, _, ours = choices[word].partition("=")
    is_so = f"is --{option} {ours} here" if option else "has no effect: it is so already"
    return option, ours, f"--{name} {value} {is_so}"


HEAD = "\n| theirs | here |\n|---|---|\n"  # the text above it in docs/migrating.md is written by hand


def migrating(text):
    """The text of docs/migrating.md with the table as it is now."""
    rows = {names: f"`--{ours}`" for ours, names in TABLES["same"].items()}
    for names, choices in TABLES["by_value"].items():
        pairs = [f"{value or 'empty'}: {f'`--{ours}`' if ours else 'no effect'}" for value, ours in choices.items()]
        rows[names] = f"{', '.join(pairs[:-1])}; else {choices['otherwise']}"
    for table, head in {"no_effect": "no effect: ", "answers": "", "removed": "was removed; "}.items():
        rows |= {names: head + meaning for meaning, names in TABLES[table].items()}
    lines = [f"| {', '.join(f'`--{name}`' for name in names.split())} | {rows[names]} |\n" for names in rows]
    return text.partition(HEAD)[0] + HEAD + "".join(lines)


if __name__ == "__main__":
    page = Path(__file__).with_name("docs") / "migrating.md"
    page.write_text(migrating(page.read_text(encoding="utf-8")), encoding="utf-8")
