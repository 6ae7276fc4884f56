"""`export --push-to-hub`: a student on the Hugging Face Hub, where timm loads it by its name."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError

from storage.errors import UserError, first_line
from storage.objects.network_names import outside_timm
from student import run_dir
from student.models.card import hub_card
from student.models.files import load_student
from student.models.timm_folder import save_config

_HINTS = {
    401: "Log in again with a valid token: `hf auth login`.",
    403: "The token needs write access (`hf auth login`), and USER must be you or an organization of yours.",
    404: "Check the name, and that the token may see it.",
}


def push_to_hub(path: Path, repository: str, *, private: bool) -> dict[str, Any]:
    """Put a run's student on the Hub in one commit: `config.json`, `model.safetensors` and the card as `README.md`.

    The repository is made where there is none.

    Args:
        path: the student's file in the folder of a complete run.
        repository: `USER/NAME`.
        private: whether only its owner may see it.

    Raises:
        UserError: a student that timm alone cannot build, a run that is not complete, a card whose header is damaged,
            no token, or the Hub cannot be reached or refuses.
    """
    if repository.count("/") != 1:
        raise UserError(f"--push-to-hub {repository}: expected USER/NAME or ORGANIZATION/NAME")
    config, card = _config_and_card(path, repository)
    try:
        if get_token() is None:
            raise UserError("no token for the Hugging Face Hub", hint="Log in with `hf auth login`, or set HF_TOKEN.")
        api = HfApi(library_name="teacher-store")
        url = api.create_repo(repository, private=private or None, exist_ok=True)
        if private and not api.model_info(repository).private:
            raise UserError(f"{url} already exists and is public", hint="Make it private there, or give another name.")
        files: dict[str, Path | bytes] = {run_dir.CONFIG: config, run_dir.WEIGHTS: path, run_dir.CARD: card}
        additions = [CommitOperationAdd(name, content) for name, content in files.items()]
        commit = api.create_commit(repository, additions, commit_message=f"Add {path.stem} of a teacher-store run")
    except UserError:
        raise
    except Exception as error:  # the client and what it is made of raise many kinds
        raise _refusal(repository, error) from error
    sizes = {addition.path_in_repo: addition.upload_info.size for addition in additions}
    return {"repository": repository, "url": str(url), "commit": commit.oid, "student": str(path), "files": sizes}


def _config_and_card(path: Path, repository: str) -> tuple[bytes, bytes]:
    """What lies beside the weights on the Hub."""
    _, about = load_student(path)
    if not about.plain_timm:
        why = "its patches are shifted" if about.shifted_patches else "it attends with its teacher's attention"
        why = "its network is not timm's" if outside_timm(about.model) else why
        raise UserError(
            f"{path}: timm alone cannot build this student ({why}), so `hf-hub:{repository}` would not load it",
            hint="Share the run's folder: its card says how the student is loaded.",
        )
    card, result = path.parent / run_dir.CARD, run_dir.result(path.parent)
    if result is None or not card.is_file():
        raise UserError(
            f"{path.parent}: no complete run with a model card ({run_dir.CARD})",
            hint="If the run was interrupted, resume it: the same `pipeline train` command with --resume.",
        )
    scores = {"last": result.get("top1"), "best": result.get("best_top1"), "ema": result.get("ema_top1")}
    if path.stem not in scores:
        raise UserError(f"{path}: give the run's folder, and the student by --checkpoint {', '.join(scores)}")
    try:
        text = hub_card(card.read_text(encoding="utf-8"), about, repository, path.stem, scores)
    except (ValueError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{card}: the YAML header is not a model card's: {first_line(error)}") from None
    with tempfile.TemporaryDirectory() as folder:
        save_config(Path(folder) / run_dir.CONFIG, about)
        return (Path(folder) / run_dir.CONFIG).read_bytes(), text.encode()


def _refusal(repository: str, error: Exception) -> UserError:
    """What the Hub or its client says, and what to do."""
    if isinstance(error, HFValidationError):
        return UserError(f"--push-to-hub {repository}: {first_line(error)}")
    while not isinstance(error, HfHubHTTPError) and isinstance(error.__cause__, Exception):  # of a thread that uploads
        error = error.__cause__
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else 0
    message = (isinstance(error, HfHubHTTPError) and error.server_message) or first_line(error)
    where = f"{constants.ENDPOINT} answers {status}" if status else constants.ENDPOINT
    hint = _HINTS.get(status, "Run the same command again once this is solved.")
    return UserError(f"{repository} was not pushed: {where}: {message}", hint=hint)
