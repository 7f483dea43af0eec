"""The model hub: a network's files from `user/repo[@revision]`, and a folder that becomes a repository there."""

from __future__ import annotations

import re
import tempfile
from abc import abstractmethod
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

from ephemera import cards

ID = re.compile(r"(?P<repo>[\w][\w.-]*/[\w][\w.-]*)(?:@(?P<revision>[\w][\w./-]*))?")
# What a repository of each kind holds; nothing else is fetched. A repository is whole if it has the first two.
FILES: dict[str, tuple[str, ...]] = {
    "rate": ("rate.json", "rate.safetensors", "lens.*", "gate.*", "averaged/rate.*", "README.md"),
    "generator": ("generator.json", "generator.safetensors", "gate.*", "README.md"),
    "lens": ("lens.json", "lens.safetensors", "README.md"),
    "adapter": ("adapter_config.json", "adapter_model.safetensors", "README.md"),
}
LOCAL = "Or give a local folder."


def is_id(spec: str | Path) -> bool:
    """Whether a text names a hub repository: `user/repo[@revision]`, and no folder or file of that name is here."""
    return isinstance(spec, str) and ID.fullmatch(spec) is not None and not Path(spec).expanduser().exists()


def fetch(spec: str, *kinds: str) -> Path:
    """The local folder of `user/repo[@revision]`, which holds one of `kinds` of network (`FILES`).

    ValueError in one line if there is no such repository or revision, it lacks files, or no hub is reachable.
    """
    from huggingface_hub import errors, snapshot_download  # here, because few commands need it

    found = ID.fullmatch(spec)
    if found is None:
        raise ValueError(f"{spec!r} is no hub id. Allowed: user/repo or user/repo@revision. {LOCAL}")
    patterns = list(dict.fromkeys(pattern for kind in kinds for pattern in FILES[kind]))
    what = " or ".join(kinds)
    try:
        folder = Path(snapshot_download(repo_id=found["repo"], revision=found["revision"], allow_patterns=patterns))
    except errors.HFValidationError as error:
        raise ValueError(
            f"{spec!r} is no hub id ({_line(error)}). Allowed: user/repo or user/repo@revision."
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ValueError(
            f"cannot fetch the {what} {spec!r}: {found['repo']} has no revision {found['revision']!r}. "
            "Allowed: a branch, tag or commit of it. Check the name after @, or leave it out."
        ) from error
    except errors.GatedRepoError as error:
        raise ValueError(
            f"cannot fetch the {what} {spec!r}: its owner grants access on request. Ask on its page, then run `hf auth login`. {LOCAL}"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ValueError(
            f"cannot fetch the {what} {spec!r}: the hub has no such repository, or it is private. "
            f"Check the name, or run `hf auth login`. {LOCAL}"
        ) from error
    except (OSError, errors.EntryNotFoundError, *_http_errors()) as error:
        raise ValueError(
            f"cannot fetch the {what} {spec!r}: no such folder is here, and the hub did not give it ({_line(error)}). "
            f"Check the network and HF_HUB_OFFLINE. {LOCAL}"
        ) from error
    if not any(_whole(folder, kind) for kind in kinds):
        needed = " or ".join(" and ".join(FILES[kind][:2]) for kind in kinds)
        raise ValueError(f"the hub repository {spec!r} holds no {what}: it needs {needed}. Check the name. {LOCAL}")
    return folder


def push(folder: Path, repo: str, *, private: bool = False, revision: str | None = None, message: str) -> str:
    """Upload a folder to a repository, which is made if it is missing; returns its address.

    ValueError in one line if the name is no id, or the hub refuses or is not reachable.
    """
    from huggingface_hub import create_repo, errors, upload_folder

    found = ID.fullmatch(repo)
    if found is None or found["revision"]:
        raise ValueError(f"{repo!r} is no repository. Allowed: user/repo. Name a revision by revision=.")
    try:
        create_repo(repo, private=private, exist_ok=True)
        made = upload_folder(repo_id=repo, folder_path=folder, revision=revision, commit_message=message)
    except (OSError, ValueError, errors.HfHubHTTPError, *_http_errors()) as error:
        raise ValueError(
            f"cannot push to {repo!r}: {_line(error)}. Nothing was changed here. Run `hf auth login` with a token that "
            "may write there, and check the network."
        ) from error
    return str(made)


class OnHub:
    """A network that can be pushed to the hub as its `save_pretrained` writes it, with a card."""

    hub_kind: ClassVar[str]  # of `FILES`
    card: str | None = None  # its README.md, where it was loaded with one
    trained_for: Any = None
    made_for: Any = None
    gate: Any = None

    @abstractmethod
    def save_pretrained(self, folder: str | Path) -> None: ...

    def plain_card(self, name: str) -> str:
        """A card from what the network itself knows, for one that was loaded without."""
        model = "a model" if self.trained_for is None else self.trained_for["name"]
        tasks = () if self.made_for is None else self.made_for.tasks
        words = "" if self.made_for is None else f"\n{self.made_for.words[0].upper()}{self.made_for.words[1:]}.\n"
        validation = None if self.made_for is None else self.made_for.validation
        table = cards.harm_table(None if self.gate is None else self.gate.calibration, validation)
        return (
            cards.front_matter(model, tasks, kind=type(self).__name__.lower())
            + f"# {name}: {type(self).__name__} for {model}\n{words}\n"
            + "It fits that model only. Open it with ephemera, by this repository's id.\n"
            + table
        )

    def push_to_hub(
        self, repo: str, *, private: bool = False, revision: str | None = None, message: str = "Upload a network"
    ) -> str:
        """Upload it to `user/repo`, with its card; returns the address. ValueError if the hub refuses."""
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "network"
            self.save_pretrained(folder)
            text = self.card or self.plain_card(repo.rpartition("/")[2])
            (folder / "README.md").write_text(text, encoding="utf-8")
            return push(folder, repo, private=private, revision=revision, message=message)


def card_of(folder: Path) -> str | None:
    """The card that lies beside a network, if a hub can read its front matter."""
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    return text if text and cards.has_front_matter(text) else None


def _whole(folder: Path, kind: str) -> bool:
    return all((folder / name).exists() for name in FILES[kind][:2])


def _http_errors() -> Iterable[type[Exception]]:
    """The errors of the client that huggingface_hub uses: no connection, a proxy, a timeout."""
    from huggingface_hub import errors

    return tuple(base for base in errors.HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
