"""Finds the sets of records of a data set: a file, a folder, or a data set of the Hub."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lorax.errors import nearest
from lorax.tasks import records, tabular
from lorax.tasks.records import Record

FORMATS = (".jsonl", ".json", ".csv", ".tsv", ".parquet", ".arrow")
SETS = ("train", "eval", "test")
#: Names of a set, the first that is there is taken.
NAMES = {"train": ("train",), "eval": ("eval", "validation", "valid", "dev"), "test": ("test",)}
HUB = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # OWNER/NAME
SAVED = ("dataset_dict.json", "state.json")  # of `datasets`' save_to_disk
EXPECTED = (
    f"a file ({', '.join(FORMATS)}), a folder with train and eval (or test, or both) in such "
    "files, or the id of a data set of the Hub (OWNER/NAME)"
)


def read(config: Mapping[str, Any]) -> dict[str, list[Record]]:
    """{"train": records, "eval": ..., "test": ...} of what `task.path` names; "train" alone for
    a single file, and no "eval" or "test" if there is none.

    A folder has a set in one file (train.jsonl), or in parquet shards, in itself or in data/
    (train-00000-of-00002.parquet). `task.split` names the sets if they are called otherwise:
    "train_sft,test_sft". `task.columns` renames fields: "question=prompt,answer=completion"; a
    field renamed to nothing, "chosen=", is left out. `task.subset` is the name of a configuration
    of a data set of the Hub.

    Data sets are only read: those that need code to be loaded are refused, `datasets` 4 runs none.
    Raises ValueError or FileNotFoundError naming the field of `config.task` or the file.
    """
    given, split = config.get("path"), _split(config.get("split"))
    if not given:
        raise ValueError(f"task.path: task {config['name']!r} needs {EXPECTED}; none was given")
    path = Path(given).expanduser()
    if path.exists() and config.get("subset"):
        raise ValueError(
            f"task.subset: {config['subset']!r} given, but {given!r} is no data set of the Hub"
        )
    if path.is_file():
        if split:
            raise ValueError(f"task.split: {config['split']!r} given, but {given!r} is one file")
        sets = {"train": read_file(path)}
    elif path.is_dir():
        sets = _saved(path, split) if _is_saved(path) else _folder(path, split)
    elif not HUB.fullmatch(given) or path.suffix in FORMATS:
        raise FileNotFoundError(f"task.path: {given!r} does not exist; expected {EXPECTED}")
    else:
        sets = _of_hub(given, config.get("subset"), split)
    return _renamed(sets, config.get("columns"))


def read_file(path: Path) -> list[Record]:
    """The records of one file, by its suffix; JSON Lines or a JSON array for any other."""
    is_table = path.suffix in (*tabular.SEPARATORS, *tabular.ARROW)
    return tabular.read(path) if is_table else records.read(path)


def _split(setting: str | None) -> dict[str, str]:
    """{set: the name that the user gives it}: "a,b" -> {"train": "a", "eval": "b"}."""
    names = [name.strip() for name in setting.split(",")] if setting else []
    if len(names) > len(SETS) or not all(names):
        raise ValueError(
            f"task.split: {setting!r} given; expected the names of the train, eval and test sets "
            'in this order, such as "train_sft,test_sft"'
        )
    return dict(zip(SETS, names, strict=False))


def _named(available, split: Mapping[str, str], place: str) -> dict[str, str]:
    """{set: its name among those available}. Raises ValueError without a train set, or for a name
    of `task.split` that is not there."""
    for name in split.values():
        if name not in available:
            raise ValueError(
                f"task.split: {place} has no set {name!r}, it has {', '.join(available)}"
                f"{nearest(name, available)}"
            )
    if split:
        return dict(split)
    found = {part: next((name for name in NAMES[part] if name in available), None) for part in SETS}
    if not found["train"]:
        raise ValueError(
            f"task.split: {place} has no set 'train', it has {', '.join(available) or 'none'}; "
            'name them, such as "train_sft,test_sft"'
        )
    return {part: name for part, name in found.items() if name}


# ------------------------------------------------------------------------------------------ folders


def _folder(folder: Path, split: Mapping[str, str]) -> dict[str, list[Record]]:
    wanted = {part: (split[part],) for part in split} or NAMES
    files = {part: _files(folder, names) for part, names in wanted.items()}
    for part in split or ("train",):
        if not files[part]:
            field = f"task.split: {split[part]!r}" if split else "task.path"
            raise FileNotFoundError(
                f"{field}: {str(folder)!r} has no {wanted[part][0]}.jsonl; expected {EXPECTED}"
            )
    if not split and not files["eval"] and not files["test"]:
        raise FileNotFoundError(
            f"task.path: {str(folder)!r} has no eval.jsonl or test.jsonl; expected {EXPECTED}"
        )
    return {
        part: [record for file in some for record in read_file(file)]
        for part, some in files.items()
        if some
    }


def _files(folder: Path, names: tuple[str, ...]) -> list[Path]:
    """The files of the first of these names that there is, [] for none."""
    for name in names:
        for suffix in FORMATS:
            if (folder / (name + suffix)).is_file():
                return [folder / (name + suffix)]
        for place in (folder, folder / "data"):
            if place.is_dir():
                shards = sorted(x for x in place.iterdir() if x.match(f"{name}-*-of-*.parquet"))
                if shards:
                    return shards
    return []


# ----------------------------------------------------------------------------------------- datasets


def _is_saved(folder: Path) -> bool:
    return any((folder / name).is_file() for name in SAVED)


def _datasets(given: str):
    """The library `datasets`, of a version that runs no code of a data set."""
    try:
        import datasets
    except ImportError:
        why = "is no file or folder; as a data set of the Hub it" * (not Path(given).exists())
        raise ValueError(
            f"task.path: {given!r} {why}{' ' * bool(why)}needs datasets: {tabular.EXTRA}"
        ) from None
    if int(datasets.__version__.split(".")[0]) < 4:
        raise ValueError(
            f"task.path: {given!r} needs datasets 4 or later, which runs no code of a data set, "
            f"not {datasets.__version__}: {tabular.EXTRA}"
        )
    return datasets


def _saved(folder: Path, split: Mapping[str, str]) -> dict[str, list[Record]]:
    """The sets of a folder that `datasets` wrote with save_to_disk."""
    datasets = _datasets(str(folder))
    try:
        loaded = datasets.load_from_disk(str(folder))
    except Exception as error:  # the library raises anything
        raise ValueError(f"task.path: {str(folder)!r}: {_reason(error)}") from None
    whole = loaded if isinstance(loaded, dict) else {"train": loaded}
    return _sets(whole, split, str(folder))


def _of_hub(name: str, subset: str | None, split: Mapping[str, str]) -> dict[str, list[Record]]:
    """The sets of a data set of the Hub, downloaded or cached."""
    datasets = _datasets(name)
    try:
        if split:
            parts = datasets.load_dataset(name, subset, split=list(split.values()))
            whole = dict(zip(split.values(), parts, strict=True))
        else:
            whole = datasets.load_dataset(name, subset)
    except Exception as error:  # of the Hub, the network, the cache or a file: any type
        raise _not_loaded(name, error) from None
    return _sets(whole, split, name)


def _not_loaded(name: str, error: Exception) -> Exception:
    """What to tell the user of a failed download."""
    text = str(error)
    if "scripts are no longer supported" in text:
        return ValueError(
            f"task.path: {name!r} needs code to be loaded, which lorax doesn't run; convert it to "
            "parquet, or take a copy in parquet"
        )
    if isinstance(error, ValueError) and "Config name is missing" in text:
        return ValueError(f"task.subset: {name!r} needs one: {_reason(error, text.count(chr(10)))}")
    if isinstance(error, ValueError) and ("split" in text or "BuilderConfig" in text):
        field = "subset" if "BuilderConfig" in text else "split"
        return ValueError(f"task.{field}: {name!r}: {_reason(error)}")
    return FileNotFoundError(
        f"task.path: {name!r} is no file or folder, and loading it as a data set of the Hub failed "
        f"({type(error).__name__}: {_reason(error)}); expected {EXPECTED}"
    )


def _reason(error: Exception, line: int = 0) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[min(line, len(lines) - 1)][:200]


def _sets(whole: Mapping, split: Mapping[str, str], place: str) -> dict[str, list[Record]]:
    """The records of the sets of a `datasets.DatasetDict`."""
    sets = {}
    for part, name in _named(whole, split, repr(place)).items():
        table = whole[name].with_format("arrow")[:]  # images and audio stay undecoded
        sets[part] = tabular.of_table(table, f"{place}/{name}")
        if not sets[part]:
            raise ValueError(f"{place}/{name}: no records; expected at least one row")
    return sets


# ------------------------------------------------------------------------------------------ columns


def _renamed(sets: dict[str, list[Record]], setting: str | None) -> dict[str, list[Record]]:
    """The records with the fields that `task.columns` renames. Raises ValueError if it is malformed
    or names a field that no record has, or that would replace another one."""
    if not setting:
        return sets
    pairs = [pair.rpartition("=") for pair in setting.split(",")]
    names = {theirs.strip(): ours.strip() for theirs, _, ours in pairs}
    if "" in names or len(names) < len(pairs):
        raise ValueError(
            f"task.columns: {setting!r} given; expected YOURS=OURS for each column to rename, such "
            'as "question=prompt,answer=completion" ("scores=" leaves a column out)'
        )
    return {part: _with_names(found, names, part) for part, found in sets.items()}


def _with_names(found: list[Record], names: Mapping[str, str], part: str) -> list[Record]:
    present = dict.fromkeys(name for record in found for name in record.fields)
    for name in names:
        if name not in present:
            raise ValueError(
                f"task.columns: no {part} record has a field {name!r}, they have "
                f"{', '.join(present)}{nearest(name, present)}"
            )
    renamed = []
    for place, fields in found:
        moved = {ours: fields[name] for name, ours in names.items() if ours and name in fields}
        kept = {name: value for name, value in fields.items() if name not in names}
        for ours in moved.keys() & kept.keys():
            raise ValueError(
                f"{place}: task.columns renames a field to {ours!r}, which the record has already"
            )
        renamed.append(Record(place, kept | moved))
    return renamed
