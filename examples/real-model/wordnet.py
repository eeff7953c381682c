"""Writes a real task with natural classes: WordNet's glosses, to be sorted into its 45 topics.

    python wordnet.py OUT                                  # train.jsonl and eval.jsonl in the folder OUT
    python wordnet.py OUT --train 60000 --eval 2500 --validation 1000 --form prompt

A gloss is a short definition, and its topic is the file in which lexicographers keep it, such as noun.food or
verb.motion. Every record has the key "category", by which `partition = "dirichlet:0.3:category"` makes clients that
differ. The order is drawn once, from a fixed seed, so that the same numbers give the same files; held-out records come
first and are in no training file.

WordNet comes from --wordnet, else from /usr/share/wordnet, else from Debian's package wordnet-base, which is downloaded
into OUT and not installed. WordNet 3.0 is free to use and to pass on, by Princeton's licence in its files.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INSTALLED = Path("/usr/share/wordnet")
PARTS = ("noun", "verb", "adj", "adv")
LICENCE = "  "  # the beginning of the lines of a data file that hold the licence
# The topics in the order of their numbers in the data files.
TOPICS = (
    *("adj.all", "adj.pert", "adv.all"),
    *("noun.Tops", "noun.act", "noun.animal", "noun.artifact", "noun.attribute", "noun.body", "noun.cognition"),
    *("noun.communication", "noun.event", "noun.feeling", "noun.food", "noun.group", "noun.location", "noun.motive"),
    *("noun.object", "noun.person", "noun.phenomenon", "noun.plant", "noun.possession", "noun.process"),
    *("noun.quantity", "noun.relation", "noun.shape", "noun.state", "noun.substance", "noun.time"),
    *("verb.body", "verb.change", "verb.cognition", "verb.communication", "verb.competition", "verb.consumption"),
    *("verb.contact", "verb.creation", "verb.emotion", "verb.motion", "verb.perception", "verb.possession"),
    *("verb.social", "verb.stative", "verb.weather", "adj.ppl"),
)
SEED = 11


@dataclass(frozen=True)
class Entry:
    """A word, its gloss (a definition and perhaps examples after semicolons), and the topic of this meaning."""

    word: str
    gloss: str
    topic: str

    @property
    def question(self) -> str:
        """The word and its definition, without examples."""
        return f"{self.word}: {self.gloss.partition(';')[0].strip()}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--wordnet", type=Path, metavar="FOLDER", help="the folder that holds data.noun")
    parser.add_argument("--train", type=int, default=20_000, metavar="N", help="number of records for the clients")
    parser.add_argument("--eval", type=int, default=400, metavar="N", help="number of held-out records")
    parser.add_argument("--validation", type=int, default=0, metavar="N", help="further ones, for choosing settings by")
    parser.add_argument("--form", choices=("chat", "prompt"), default="chat", help='"messages", or "prompt"')
    options = parser.parse_args()
    try:
        entries = shuffled(find(options.wordnet, options.out))
        parts = split(entries, {"eval": options.eval, "validation": options.validation, "train": options.train})
        write(options.out, parts, options.form)
    except (OSError, ValueError) as error:
        parser.exit(2, f"{error}\n")


def find(folder: Path | None, out: Path) -> Path:
    """Returns the folder of WordNet's data files; downloads them to `out` where there are none yet.

    Raises:
        ValueError: the named folder has no WordNet, or none can be downloaded here; states the remedy.
    """
    unpacked = out / "wordnet-base"
    candidates = [folder] if folder else [INSTALLED, unpacked / INSTALLED.relative_to("/")]
    for candidate in candidates:
        if all((candidate / f"data.{part}").is_file() for part in PARTS):
            return candidate
    if folder:
        raise ValueError(
            f"{folder}: not WordNet; expected the folder that holds data.noun, data.verb, data.adj, data.adv"
        )
    out.mkdir(parents=True, exist_ok=True)
    download(out, unpacked)
    return candidates[-1]


def download(folder: Path, unpacked: Path) -> None:
    """Downloads Debian's package, whose signature apt checks, and unpacks it without installing it.

    Raises:
        ValueError: there is no apt here, or it does not get the package.
    """
    remedy = (
        "Install WordNet 3.0 (Debian: apt-get install wordnet-base), or unpack Princeton's archive and name its folder "
        "dict with --wordnet"
    )
    try:
        subprocess.run(["apt-get", "-q", "download", "wordnet-base"], cwd=folder, check=True, timeout=300)
        package = max(folder.glob("wordnet-base_*.deb"))
        subprocess.run(["dpkg", "-x", str(package), str(unpacked)], check=True, timeout=60)
    except FileNotFoundError as error:
        raise ValueError(f"{error.filename} is not here, so WordNet cannot be downloaded. {remedy}") from error
    except (subprocess.SubprocessError, ValueError) as error:
        raise ValueError(
            f"WordNet could not be downloaded: {error}. Try again after apt-get update. {remedy}"
        ) from error


def entries(folder: Path) -> Iterator[Entry]:
    """Yields WordNet's meanings in the order of its data files, each with the first of its words.

    Raises:
        ValueError: a line is not one of WordNet's.
    """
    for part in PARTS:
        path = folder / f"data.{part}"
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            if line.startswith(LICENCE):
                continue
            try:
                fields, gloss = line.split(" | ", 1)
                _, topic, _, _, word, *_ = fields.split()
                yield Entry(word.replace("_", " "), gloss.strip(), TOPICS[int(topic)])
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path}:{number}: not a line of WordNet's data files: {line[:60]!r}") from error


def shuffled(folder: Path) -> list[Entry]:
    """Returns all meanings in a fixed random order, each question once: twins would leak into the held-out records."""
    unique = {entry.question: entry for entry in entries(folder)}
    order = list(unique.values())
    random.Random(SEED).shuffle(order)
    return order


def split(order: list[Entry], sizes: dict[str, int]) -> dict[str, list[Entry]]:
    """Deals the meanings to files of these sizes, in this order.

    Raises:
        ValueError: there are fewer.
    """
    if sum(sizes.values()) > len(order):
        raise ValueError(f"{sum(sizes.values()):,} records were asked for ({sizes}), and there are {len(order):,}")
    parts, first = {}, 0
    for name, size in sizes.items():
        parts[name] = order[first : first + size]
        first += size
    return parts


def write(out: Path, parts: dict[str, list[Entry]], form: str) -> None:
    """Writes a JSONL file for each part that is not empty."""
    out.mkdir(parents=True, exist_ok=True)
    for name, part in parts.items():
        if part:
            lines = (json.dumps(record(entry, form), ensure_ascii=False) for entry in part)
            (out / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
            print(f"{out / name}.jsonl: {len(part):,} records")


def record(entry: Entry, form: str) -> dict[str, Any]:
    """Returns one record: a conversation for models with a chat template, or a prompt and its completion."""
    if form == "prompt":
        return {"prompt": f"{entry.question}\nTopic:", "completion": f" {entry.topic}", "category": entry.topic}
    turns = [{"role": "user", "content": entry.question}, {"role": "assistant", "content": entry.topic}]
    return {"messages": turns, "category": entry.topic}


if __name__ == "__main__":
    main()
