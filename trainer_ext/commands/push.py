"""``hf-precond push DIR REPO``: a run on the Hub, with the optimizer's state."""

from __future__ import annotations

from typing import Annotated

import typer

from hf_precond.explain import format_bytes
from trainer_ext.commands.output import JsonOption, print_json, print_table
from trainer_ext.hub import files_to_publish, publish

FolderArgument = Annotated[
    str, typer.Argument(metavar="DIR", help="A run's output_dir, or a checkpoint.")
]
RepoArgument = Annotated[str, typer.Argument(metavar="REPO", help="On the Hub, as user/name.")]
CheckpointOption = Annotated[
    str | None, typer.Option(help="Which checkpoint goes along; the last complete one.")
]
ExcludeOption = Annotated[
    list[str] | None, typer.Option(help="Pattern of files to leave out; may be given again.")
]
PrivateOption = Annotated[bool, typer.Option("--private", help="A new repository is private.")]
RevisionOption = Annotated[str | None, typer.Option(help="Branch, made where there is none.")]
MessageOption = Annotated[str, typer.Option(help="Of the commit.")]
DryRunOption = Annotated[
    bool, typer.Option("--dry_run", help="List files and sizes, and upload nothing.")
]


def push_command(
    folder: FolderArgument,
    repo: RepoArgument,
    checkpoint: CheckpointOption = None,
    exclude: ExcludeOption = None,
    private: PrivateOption = False,
    revision: RevisionOption = None,
    message: MessageOption = "Upload model and optimizer state",
    dry_run: DryRunOption = False,
    as_json: JsonOption = False,
) -> None:
    """Publish weights, tokenizer, card and the checkpoint with its optimizer state, in one commit.

    Refuses secrets and whatever could run code. A push that broke off goes on where it was.
    """
    uploads = files_to_publish(folder, checkpoint=checkpoint, exclude=exclude or ())
    total = sum(upload.size for upload in uploads)
    url = None
    if not dry_run:
        url = publish(uploads, repo, private=private, revision=revision, message=message)
    if as_json:
        files = {upload.name: upload.size for upload in uploads}
        print_json({"repo": repo, "files": files, "bytes": total, "commit": url})
        return
    rows = [(upload.name, format_bytes(upload.size)) for upload in uploads]
    print_table(("file", "size"), rows)
    what = f"{len(uploads)} files, {format_bytes(total)}"
    print(f"\n{what}; nothing uploaded" if url is None else f"\n{what} in {url}")
