"""Long documents to train on: from a folder, a dataset, or the sources of the standard library.

A seed fixes the order of the documents, so that every process reads the same.
"""

import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvbench.errors import InputError

TEXT_SUFFIXES = {
    *(".txt", ".md", ".rst", ".tex", ".html", ".json", ".jsonl", ".yaml", ".toml"),
    *(".py", ".pyi", ".c", ".h", ".cc", ".cpp", ".hpp", ".cu", ".rs", ".go", ".java", ".js", ".ts"),
    *(".rb", ".sh", ".sql", ".r", ".jl", ".lua", ".swift", ".kt", ".scala", ".hs", ".ml"),
}
STANDARD_LIBRARY = "stdlib"
DATASET = "datasets:"


def documents(data: str, seed: int) -> Iterator[str]:
    """All documents of `data` once, in an order drawn by `seed`. InputError if there are none.

    `data` is `stdlib`, a folder or file, or `datasets:NAME@CONFIG#SPLIT` (its column `text`; the
    defaults are the dataset's default configuration and the split `train`).
    """
    if data.startswith(DATASET):
        yield from dataset_documents(data.removeprefix(DATASET), seed)
        return
    groups = (
        packages(Path(sysconfig.get_path("stdlib")))
        if data == STANDARD_LIBRARY
        else files(Path(data).expanduser())
    )
    random.Random(f"corpus/{seed}").shuffle(groups)
    for paths in groups:
        try:
            text = "\n".join(path.read_text("utf-8", errors="replace") for path in paths)
        except OSError as error:
            raise InputError(f"data '{data}' cannot be read: {error}") from None
        if text.strip():
            yield text


def packages(root: Path) -> list[list[Path]]:
    """The sources of each Python package directly under `root`, and of each module alone."""
    found = [[path] for path in sorted(root.glob("*.py"))]
    for folder in sorted(root.iterdir()):
        if folder.name == "site-packages" or not (folder / "__init__.py").is_file():
            continue
        found.append(sorted(folder.rglob("*.py")))
    if not found:
        raise InputError(f"no Python sources in {root}; give --data a folder of text or code")
    return found


def files(root: Path) -> list[list[Path]]:
    """Each text or code file under a folder as a document; if `root` is a file, that file."""
    if root.is_file():
        return [[root]]
    if not root.is_dir():
        raise InputError(
            f"no data '{root}': give a folder of text or code files, '{STANDARD_LIBRARY}' or "
            f"'{DATASET}NAME'"
        )
    texts = (p for p in sorted(root.rglob("*")) if p.suffix.lower() in TEXT_SUFFIXES)
    found = [[path] for path in texts if path.is_file()]
    if not found:
        raise InputError(
            f"no text or code files in '{root}'; give a folder that has some (.txt, .md, .py, ...)"
        )
    return found


def dataset_documents(name: str, seed: int) -> Iterator[str]:
    """The column `text` of a dataset on the hub or in a local folder, streamed."""
    name, _, split = name.partition("#")
    name, _, config = name.partition("@")
    try:
        import datasets
    except ModuleNotFoundError:
        raise InputError(
            f"'{DATASET}{name}' needs the package datasets: pip install 'kvbench[train]'"
        ) from None
    try:
        rows: Any = datasets.load_dataset(
            name, config or None, split=split or "train", streaming=True
        )
        for row in rows.shuffle(seed=seed, buffer_size=100):
            if not isinstance(row.get("text"), str):
                raise InputError(
                    f"dataset '{name}' has no column 'text'; its columns: {', '.join(row)}"
                )
            yield row["text"]
    except InputError:
        raise
    except Exception as error:  # a dataset's builder may raise anything
        reason = " ".join(str(error).split())[:200]
        raise InputError(
            f"dataset '{name}' cannot be read (check its name and the connection to the hub): "
            f"{reason}"
        ) from None
