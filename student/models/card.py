"""The model card that lies beside a student: what it is, what it learned from, and how to load it.

It is meant to be published: files of weights are named without the folders of the machine that they were on.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData

from storage.errors import first_few
from storage.objects.network_names import bare, is_recorded, key_of, outside_timm
from student.models.init import channels_text
from student.settings import ATTENTION_COPY

if TYPE_CHECKING:
    from collections.abc import Mapping

    from storage.store.manifests import TeacherManifest
    from student.models.attention_copy_hooks import AttentionCopyRecord
    from student.models.files import StudentDescription
    from student.run_dir import TrainResult

_TIMM = """```python
import timm

model = timm.create_model("{source}", pretrained=True).eval()
```

{which}
"""
_IN_THE_FOLDER = """timm reads `model.safetensors`, a link to `last.safetensors`, of the last epoch. Where there is
`best.safetensors` or `ema.safetensors`, `checkpoint_path=` in place of `pretrained=True` takes it."""
_ON_THE_HUB = "`model.safetensors` is the run's `{student}.safetensors`."
_SHIFTED = """Its patches are seen with four shifts of the image (shifted patch tokenization), which timm does not have:
its weights fit no bare `{model}`, and there is no `config.json` for timm.
"""
_BY_THIS_PACKAGE = """
```python
from pathlib import Path
from student.models.files import load_student  # of the package teacher-store

model, about = load_student(Path("last.safetensors"))
```
"""
_OWN = """Its network is not timm's: the code of `{model}` makes it, whose file has a sha256 that begins with
`{digest}`. `network.py`, where it lies here, is a copy. That is code, which runs only where you name it:
commands of this package take `--network {model}`.

```python
from pathlib import Path
from student import allow_network, load_student  # of the package teacher-store

allow_network("{model}")
model, about = load_student(Path("last.safetensors"))
```
"""
_TORCHVISION = """Its network is torchvision's `{model}`.
"""
_LOADING = "## How to load it\n\n"
_FEEDING = """
Images: RGB, the evaluation view `{evaluation}` at {size}×{size}, scaled to 0 to 1, then (x − mean) / std with mean
{mean} and std {std}. With this project: {use}.
"""
_TEACHING = """
It can be a teacher, too, with the `--target` that a recipe reads:

```
pipeline precompute --teacher {model} --weights {file} --teacher-name NAME --input-size {size} \\
  --mean {mean} --std {std} {arguments} --shards SHARDS --store STORE
```
"""
_COPYING = """It is not whole by itself: in layer(s) {layers} it attends with {source}, in the first {heads} head(s), in
place of its own (copied: {tensors}). A bare `{model}` with these weights attends otherwise, and was never trained to:
there is no `config.json` for timm. {need}
"""
_OF_EACH = "the attention of teacher {teacher} for the same image"
_FIXED = "one fixed attention for all images, a mean over the training set"
_NEEDS_TEACHER = (
    "`pipeline predict` runs the teacher's graphs in the store that it learned from ({graphs}), `pipeline evaluate` "
    "reads what that store keeps of the images; elsewhere say `--store`. It cannot be exported."
)
_NEEDS_FILE = "That lies in its file beside the weights, and this code puts it in its place."


def card(
    about: StudentDescription,
    result: TrainResult,
    identity: Mapping[str, Any],
    recipe: Mapping[str, Any],
    teachers: Mapping[str, TeacherManifest],
) -> str:
    """The card's text, Markdown with the field's YAML header.

    Args:
        about: how the student is built, fed and read.
        result: what the run gave.
        identity: what it was trained with: shards, targets, bank, policy.
        recipe: as plain data.
        teachers: target -> manifest of its teacher.
    """
    kind = "image-classification" if about.classifies else "image-feature-extraction"
    smoke, scored = result["smoke"], result["top1"] is not None
    tags = [kind, "timm", *(["knowledge-distillation"] if teachers else [])]
    header = ModelCardData(library_name="timm", pipeline_tag=kind, tags=tags)
    if scored and not smoke:
        header.model_name = about.model
        header.eval_results = [
            EvalResult(kind, "webdataset", "validation shards", "accuracy", result["top1"], metric_name="top-1")
        ]
    lines = ["---", header.to_yaml(), "---", "", f"# {about.model}, a student", ""]
    if smoke:
        lines += ["**A smoke run, to see that everything works: this student has learned nothing.**", ""]
    if scored:
        lines += ["| measured on | samples | top-1, % | top-5, % |", "|---|---|---|---|"]
        lines.append(_score("last epoch", result["samples"], result["top1"], result["top5"]))
    elif about.classifies:
        lines.append("It was not scored: there were no labeled validation images.")
    else:
        lines.append("It was trained without labels and has no classifier: it gives features, and was not scored.")
        lines.append("`pipeline evaluate knn RUN` measures them where there are labels.")
    if "ema_top1" in result:
        lines.append(_score("averaged student", result["samples"], result["ema_top1"], result["ema_top5"]))
    shards, classes = identity["shards"], identity["classes"]
    views = f"{identity['views']} stored view(s) of each image" if identity["views"] else "views drawn in each epoch"
    lines += ["", "## Learned from", "", f"- {len(shards)} shard(s): {first_few(shards, 3)}"]
    lines.append(f"- views: `{identity['policy']}`, {views}")
    if isinstance(classes, list):
        lines.append(f"- {len(classes)} classes: {first_few(classes, 10)}")
    elif classes:
        lines.append(f"- {classes} classes without names")
    else:
        lines.append("- no labels")
    for loss, targets in identity["targets"].items():
        use = "copied attention" if loss == ATTENTION_COPY else f"loss `{loss}`"
        lines += [f"- {use}: target {target} of {_teacher(teachers[target])}" for target in targets]
    if identity["control"]:
        lines.append(f"- **a control**: {', '.join(f'{k}={v}' for k, v in identity['control'].items())}")
    losses = "; ".join(
        f"`{name}` ({loss['type']}, weight {loss['weight']['start']:g} at the start)"
        for name, loss in recipe["losses"].items()
    )
    trained = f"{result['steps']} steps" if smoke else f"{result['epochs']} epochs"
    lines += [
        f"- losses: {losses}",
        f"- {trained} at batch {recipe['stream']['batch_size']}, seed {recipe['seed']}; all settings: `args.yaml`",
        "",
        "Licenses of images and of teachers' weights are those of their sources; none is recorded here.",
        "",
    ]
    if about.attention_copy is not None:
        own = _copying(about.model, about.attention_copy, identity["control"])
    elif about.shifted_patches:
        own = _SHIFTED.format(model=about.model) + _BY_THIS_PACKAGE
    elif is_recorded(about.model):
        own = _OWN.format(model=bare(about.model), digest=key_of(about.model).rpartition("#")[2])
    elif outside_timm(about.model):
        own = _TORCHVISION.format(model=about.model) + _BY_THIS_PACKAGE
    else:
        own = _TIMM.format(source="local-dir:.", which=_IN_THE_FOLDER)
    return "\n".join([*lines, _loading(about, own, "last.safetensors")])


def _score(student: str, samples: int | None, top1: float | None, top5: float | None) -> str:
    """A line of the table of scores."""
    return f"| {student} | {samples} | {top1:.2f} | {'' if top5 is None else f'{top5:.2f}'} |"


def _teacher(teacher: TeacherManifest) -> str:
    """A teacher with the name and digest of its weights."""
    about = teacher.identity
    weights = f"weights {Path(teacher.weights).name}, sha256 {about.weights_sha256[:12]}"
    return f"teacher {teacher.id} ({about.model}, {weights})"


def hub_card(
    text: str, about: StudentDescription, repository: str, student: str, scores: Mapping[str, float | None]
) -> str:
    """A run's card as it lies on the Hugging Face Hub, beside one student called `model.safetensors`.

    How to load it and the score in the header are of that student; all else stays, also what was added by hand.

    Args:
        text: the card in the run's folder.
        about: of a student that timm alone builds.
        repository: `USER/NAME`.
        student: `last`, `best` or `ema`.
        scores: student -> top-1.

    Raises:
        ValueError: the header is no model card's.
        yaml.YAMLError: the header is not YAML.
    """
    hub = ModelCard(text)
    for result in hub.data.get("eval_results", []):
        if result.metric_value == scores["last"]:
            result.metric_value = scores[student]
    own = _TIMM.format(source=f"hf-hub:{repository}", which=_ON_THE_HUB.format(student=student))
    loading = _loading(about, own, "model.safetensors")
    hub.text = re.sub(rf"(?s){_LOADING}.*?(?=\n## |\Z)", lambda _: loading, hub.text)
    return str(hub)


def _loading(about: StudentDescription, own: str, file: str) -> str:
    """The section on how the student is loaded (`own`), fed, and made a teacher by its file."""
    mean, std = channels_text(about.mean), channels_text(about.std)
    uses = ["`pipeline predict RUN IMAGE…`"] if about.classifies else []
    uses += ["`pipeline export RUN` (ONNX)"] if about.attention_copy is None else []
    feeding = _FEEDING.format(evaluation=about.evaluation, size=about.img_size, mean=mean, std=std, use=", ".join(uses))
    text = _LOADING + own + feeding
    if not about.plain_timm:
        return text
    kept = {n: v for n, v in about.arguments.items() if n != "img_size" and "drop" not in n}  # a teacher drops nothing
    return text + _TEACHING.format(
        model=about.model,
        file=file,
        size=about.img_size,
        mean=mean.replace(" ", ""),
        std=std.replace(" ", ""),
        arguments=" ".join(f"--teacher-arg {shlex.quote(f'{name}={value}')}" for name, value in kept.items()),
    )


def _copying(model: str, copied: AttentionCopyRecord, control: Mapping[str, Any]) -> str:
    """What a student needs that copies attention."""
    graphs = ", ".join(sorted({graph[:12] for graph, _ in copied.graphs}))
    fixed = bool(control.get("mean_targets")) or copied.settings.average == "examples"
    text = _COPYING.format(
        model=model,
        layers=", ".join(map(str, copied.layers)),
        heads=copied.heads,
        tensors=copied.settings.tensors,
        source=_FIXED if fixed else _OF_EACH.format(teacher=copied.teacher),
        need=_NEEDS_FILE if fixed else _NEEDS_TEACHER.format(graphs=graphs),
    )
    return text + _BY_THIS_PACKAGE
