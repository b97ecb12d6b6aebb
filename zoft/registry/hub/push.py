"""Push a card to the Hugging Face Hub in one commit, or write the same files to a folder."""

from dataclasses import dataclass
from pathlib import Path

import huggingface_hub
from huggingface_hub import CommitOperationAdd

from zoft.errors import CardError, redacted
from zoft.files import write_text
from zoft.registry.card.file import Card
from zoft.registry.hub.client import TIMEOUT, HubName, call
from zoft.registry.hub.page import Publication, render
from zoft.registry.hub.pull import CARD_FILE, fetch

README = "README.md"
LONGEST_README = 1_000_000  # bytes of the existing page


@dataclass(frozen=True)
class Pushed:
    """Where a card was published: the repository at the commit, and the address of that commit."""

    name: HubName
    url: str


def push(
    card: Card,
    repo: str,
    *,
    private: bool = False,
    revision: str | None = None,
    license: str | None = None,
    base_model: str | None = None,
) -> Pushed:
    """Publish ``card`` as ``repo`` (``org/name``) on the Hub: the file and a README, in one commit.

    A repository that does not exist is created; an existing one keeps its visibility. The hand-written parts of an
    existing README are kept.

    Args:
        card: published byte for byte.
        repo: the repository.
        private: whether a new repository is private.
        revision: branch to commit to, created if necessary; default: the main branch.
        license: identifier for the front matter, such as ``mit``; default: that of the existing README.
        base_model: Hub id of the base, where the card's name for it is not one (a folder, a GGUF file).

    Raises:
        CardError: no such owner, no permission to write, a README that cannot be merged, or the Hub does not answer.

    >>> push(Card.load("base.tuner.safetensors"), "org/base-tuner", private=True).url  # doctest: +SKIP
    'https://huggingface.co/org/base-tuner/commit/7b42fd41a1d2c5d1a76e1a9ab0d10b8d3f8a7d10'
    """
    publication = _publication(repo, license, base_model)
    name = HubName.parse(repo if revision is None else f"{repo}@{revision}")
    if name.pinned:
        raise CardError(f"--revision {revision} is a commit, which cannot be changed; expected a branch")
    content, api = card.content, huggingface_hub.HfApi()
    call(repo, lambda: api.create_repo(repo, private=private or None, exist_ok=True))
    if revision is not None:
        call(str(name), lambda: api.create_branch(repo, branch=revision, exist_ok=True))
    info = call(str(name), lambda: api.model_info(repo, revision=revision, timeout=TIMEOUT))
    files = {one.rfilename for one in info.siblings or []}
    there = fetch(name.at(str(info.sha)), README, LONGEST_README).content if README in files else b""
    page = render(card, publication, _text(there, f"{name}/{README}"))
    done = call(
        str(name),
        lambda: api.create_commit(
            repo,
            [
                CommitOperationAdd(CARD_FILE, content),
                CommitOperationAdd(README, page.encode()),
            ],
            commit_message=f"Tuner card {card.digest[:16]}",
            revision=revision,
            parent_commit=info.sha,  # refused if the README that was merged is no longer the newest
        ),
    )
    return Pushed(name.at(done.oid), redacted(done.commit_url))


def write_folder(
    card: Card, repo: str, folder: Path, *, license: str | None = None, base_model: str | None = None
) -> None:
    """Write what `push` would publish to ``folder``; the hand-written parts of an existing README are kept."""
    page = folder / README
    existing = _text(page.read_bytes(), str(page)) if page.is_file() else ""
    text = render(card, _publication(repo, license, base_model), existing)
    card.save(folder / CARD_FILE)
    write_text(page, text)


def _publication(repo: str, license: str | None, base_model: str | None) -> Publication:
    if HubName.parse(repo).revision is not None:
        raise CardError(f"{repo} names a revision; expected ORG/NAME, and the branch as --revision")
    if base_model is not None and HubName.parse(base_model).revision is not None:
        raise CardError(f"--base-model {base_model} names a revision; expected ORG/NAME")
    return Publication(repo, license, base_model)


def _text(content: bytes, source: str) -> str:
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        raise CardError(f"{source} is not UTF-8 text ({error}); fix it, or delete it") from error
