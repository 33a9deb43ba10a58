"""Schedules on the Hugging Face Hub, each with a section of its figures in the repository's card."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from tempfile import TemporaryDirectory
from typing import Any

from .decisions import Decisions, S
from .reading import MAX_BYTES
from .schedule_fields import MAX_TENSOR_BYTES
from .schedule_files import read, write
from .schedule_text import headline
from .version import __version__

CARD = "README.md"
HEADER = """---
library_name: harmonica_rt
tags:
- harmonica_rt
- diffusers
---

# Reuse schedules
"""


def push(schedule: Decisions, repo: str, file: str | None, revision: str | None, token: str | bool | None) -> str:
    """`Schedule.push_to_hub`."""
    from huggingface_hub import CommitOperationAdd

    suffix = ".json" if schedule.channels is None and schedule.output_channels is None else ".safetensors"
    file = _checked(f"schedule{suffix}" if file is None else file)
    if not file.endswith(suffix):
        raise ValueError(f"filename: expected a name that ends in {suffix}, got {file!r}")
    api = _api(token)
    with TemporaryDirectory() as folder, _named(repo, file, revision):
        draft = Path(folder) / f"schedule{suffix}"
        write(schedule, draft)
        api.create_repo(repo, exist_ok=True)
        card = with_section(_card(api, repo, revision), file, section(schedule, repo, file))
        files = [CommitOperationAdd(file, draft.read_bytes()), CommitOperationAdd(CARD, card.encode())]
        commit = api.create_commit(repo, files, commit_message=f"Schedule {file}", revision=revision)
    return str(commit.commit_url)


def pull(kind: type[S], repo: str, file: str, revision: str | None, token: str | bool | None) -> S:
    """`Schedule.from_hub` of class `kind`."""
    file = _checked(file)
    if not file.endswith((".json", ".safetensors")):
        raise ValueError(f"file: expected a name that ends in .json or .safetensors, got {file!r}")
    most = MAX_TENSOR_BYTES if file.endswith(".safetensors") else MAX_BYTES
    with _named(repo, file, revision):
        path = _download(_api(token), repo, file, revision, most)
    try:
        return read(kind, path)
    except ValueError as error:
        raise ValueError(str(error).replace(str(path), f"{repo}/{file}")) from None


def section(schedule: Decisions, repo: str, file: str) -> str:
    """What a card says of `file`, in Markdown."""
    guidance = None if schedule.guidance_scale is None else f"{schedule.guidance_scale:g}"
    rows = [
        ("schedule", headline(schedule)),
        ("cache utilisation ratio (CUR)", f"{100 * schedule.cur:.1f} %"),
        ("level, order", f"{schedule.level}, {schedule.order}"),
        ("sampler, steps", f"{schedule.sampler or 'any'}, {schedule.steps}"),
        ("guidance scale", guidance or "not said"),
        ("note", schedule.note or "none"),
    ]
    table = "\n".join(f"| {name} | {_cell(value)} |" for name, value in rows)
    return f"""## {file}

| | |
| --- | --- |
{table}

```python
import harmonica_rt as hrt

schedule = hrt.Schedule.from_hub("{repo}", "{file}")
pipeline = hrt.compile(pipeline, schedule)
```"""


def with_section(card: str, file: str, text: str) -> str:
    """`card` with `text` where its section of `file` was, at its end if there was none."""
    start, end = (f"<!-- {slash}harmonica_rt: {file} -->" for slash in ("", "/"))
    before, found, rest = card.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        before, after = f"{card.rstrip()}\n\n" if card.strip() else HEADER + "\n", "\n"
    return f"{before}{start}\n{text}\n{end}{after}"


def _cell(text: str) -> str:
    """`text` as one cell of a Markdown table, which nothing in it ends."""
    text = " ".join(text.split())
    return re.sub(r"([\\|`*_\[\]])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))


def _card(api: Any, repo: str, revision: str | None) -> str:
    from huggingface_hub.errors import RemoteEntryNotFoundError

    try:
        path = _download(api, repo, CARD, revision, MAX_BYTES)
    except RemoteEntryNotFoundError:
        return ""
    return Path(path).read_text(encoding="utf-8")


def _download(api: Any, repo: str, file: str, revision: str | None, most: int) -> Path:
    """Where `file` lies, once it is known to be of at most `most` bytes."""
    found = api.hf_hub_download(repo, file, revision=revision, dry_run=True)
    if (size := found.file_size or 0) > most:
        raise ValueError(f"{repo}/{file}: expected a file of at most {most} bytes, got {size}")
    # By the name asked for: by its commit, the cache would not learn what the name means, and offline find nothing
    return Path(api.hf_hub_download(repo, file, revision=revision))


def _api(token: str | bool | None) -> Any:
    from huggingface_hub import HfApi

    return HfApi(token=token, library_name="harmonica_rt", library_version=__version__)


def _checked(file: Any) -> str:
    if not isinstance(file, str):
        raise TypeError(f"file: expected a str, got {type(file).__name__}")
    path = PurePosixPath(file)
    if not re.fullmatch(r"[\w.+-]+(/[\w.+-]+)*", file) or {".", ".."} & set(file.split("/")) or path.name == CARD:
        raise ValueError(
            f"file: expected a path of letters, digits and ._+- in the repository, other than {CARD}, got {file!r}"
        )
    return file


@contextmanager
def _named(repo: str, file: str, revision: str | None) -> Iterator[None]:
    """The Hub's refusals, as what was looked for and what was not there."""
    from huggingface_hub.errors import (
        HfHubHTTPError,
        HTTPError,
        LocalEntryNotFoundError,
        RemoteEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    at = "" if revision is None else f" at revision {revision!r}"
    try:
        yield
    except RepositoryNotFoundError as error:  # also of private and gated ones
        raise FileNotFoundError(
            f"{repo}: expected a repository that the token may read, got {_status(error)}"
        ) from error
    except RevisionNotFoundError as error:
        raise FileNotFoundError(f"{repo}: expected a branch, tag or commit, got revision {revision!r}") from error
    except RemoteEntryNotFoundError as error:
        raise FileNotFoundError(f"{repo}: no file {file}{at}") from error
    except LocalEntryNotFoundError as error:
        raise FileNotFoundError(
            f"{repo}: expected the Hub to answer, or {file}{at} in the cache, got neither: {error.__cause__ or error}"
        ) from error
    except UnicodeDecodeError as error:
        raise ValueError(f"{repo}: expected names of commits in the cache of the Hub, got {error}") from error
    except HfHubHTTPError as error:
        if error.response.status_code not in (401, 403):
            raise
        raise PermissionError(f"{repo}: expected a token that may write to it, got {_status(error)}") from error
    except HTTPError as error:  # of the connection, once there was an answer
        raise ConnectionError(
            f"{repo}: expected a whole answer about {file}{at}, got {error or type(error)}"
        ) from error


def _status(error: Any) -> str:
    return f"HTTP {error.response.status_code}"
