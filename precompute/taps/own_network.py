"""User-defined networks, made by a function in a user's file or module, and torchvision's.

A user's function is code that runs, so it is looked for only where the user names it in this process (`allow_network`).
What is recorded in stores and runs is its label, which names the function and the text it was in, and runs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from storage.errors import UserError, did_you_mean, first_line, setting
from storage.objects.network_names import OWN, TORCHVISION, bare, is_own, is_recorded, key_of


@dataclass(frozen=True, slots=True, kw_only=True)
class OwnNetwork:
    """A function that gives a network.

    Attributes:
        label: `my_net.py:build#DIGEST`, or with a module's name: what is recorded. The digest is of the file's text.
        text: of the file.
        file: with the function; None for a module's.
        folder: from which the file may import.
        function: gives the network.
    """

    label: str
    text: bytes
    file: Path | None
    folder: Path
    function: Callable[..., Any]


_RUN = "own_network_"  # opens the names of modules that are made of files
_given: dict[str, OwnNetwork] = {}  # function and digest -> what the user named in this process


def allow_network(name: str) -> OwnNetwork:
    """Run the file that the user names, and allow its function in this process.

    Args:
        name: as for `is_own`, from the command line or the user's own recipe or project file; never from a store or a
            run.

    Raises:
        UserError: no such file, module or function, or it cannot be imported.
    """
    match = OWN.fullmatch(name)
    if match is None or not is_own(name):
        raise UserError(f"{name}: this is not the name of a function", hint="Give FILE.py:FUNCTION or MODULE:FUNCTION.")
    source, function = match["source"], match["function"]
    file = Path(source).expanduser() if source.endswith(".py") else None
    if file is not None and not file.is_file():
        raise UserError(f"{name}: there is no file {source}")
    folder = file.absolute().parent if file else Path.cwd()
    text = file.read_bytes() if file else b""
    with _importing_from(folder):
        try:
            module: Any = _run(file, text) if file else importlib.import_module(source)
        except Exception as error:  # a user's code raises anything
            if isinstance(error, ModuleNotFoundError) and error.name and f"{source}.".startswith(f"{error.name}."):
                raise UserError(f"{name}: there is no module {error.name}") from None
            raise UserError(f"{name}: {source} cannot be imported: {first_line(error, kind=True)}") from error
    if file is None and (origin := getattr(module, "__file__", None)):
        text = Path(origin).read_bytes()
    build = getattr(module, function, None)
    if not callable(build):
        named = [n for n, value in vars(module).items() if inspect.isfunction(value) or inspect.isclass(value)]
        raise UserError(f"{name}: {source} has no function {function!r}", hint=did_you_mean(function, named))
    key = f"{function}#{hashlib.sha256(text).hexdigest()[:16]}"
    label = f"{file.name if file else source}:{key}"
    _given[key] = OwnNetwork(label=label, text=text, file=file, folder=folder, function=build)
    return _given[key]


def _run(file: Path, text: bytes) -> Any:
    """The module of a file; run once for the same text."""
    name = f"{_RUN}{hashlib.sha256(str(file.absolute()).encode() + text).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    module = sys.modules[name] = types.ModuleType(name)
    module.__file__ = str(file)
    try:
        exec(compile(text, str(file), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name]
        raise
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """A file may import what lies beside it, as a script does; what another imports by the same name is its own."""
    before = {*sys.modules}
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        for name in sys.modules.keys() - before:
            lies = getattr(sys.modules[name], "__file__", None)
            if lies and folder != Path.cwd() and Path(lies).is_relative_to(folder) and not name.startswith(_RUN):
                del sys.modules[name]
        with contextlib.suppress(ValueError):
            sys.path.remove(str(folder))


def given(model: str) -> OwnNetwork | None:
    """What the user named in this process that is this recorded function; None where it was not named."""
    return _given.get(key_of(model)) if is_recorded(model) else None


def not_given(model: str, owner: str, copy: str = "") -> UserError:
    """The error that a recorded function was not named by the user, or is another one now.

    Args:
        model: what is recorded.
        owner: opens the message.
        copy: of its file, where there is one.
    """
    own, (function, _, digest) = bare(model), key_of(model).partition("#")
    now = next((known for key, known in _given.items() if key.startswith(f"{function}#")), None)
    kept = f"; a copy is kept: {setting('network', f'{copy}:{function}')}" if copy else ""
    if now is not None:
        changed = f"{bare(now.label)}, which you name, has {now.label.rpartition('#')[2]}"
        message = f"{owner}: its network was made by {own} whose file has a sha256 that begins with {digest}; {changed}"
        return UserError(message, hint=f"Give the file as it was: {setting('network', own)}{kept}")
    return UserError(
        f"{owner}: its network was made by the code of {own}, which runs only if you name it",
        hint=f"If you trust the file whose sha256 begins with {digest}: {setting('network', own)}{kept}",
    )


def build_network(model: str, arguments: Mapping[str, Any], *, owner: str, pretrained: bool = False) -> nn.Module:
    """A network of one's own, or torchvision's.

    Args:
        model: recorded name of a function, or `torchvision/NAME`.
        arguments: of the function; torchvision's network has no classifier where `num_classes` is 0.
        owner: opens the message of an error.
        pretrained: whether torchvision's gets the weights that it downloads.

    Raises:
        UserError: a function that the user did not name, or that gives no network; torchvision has none of this name.
    """
    if model.startswith(TORCHVISION):
        return _torchvision(model, arguments, owner, pretrained=pretrained)
    source = given(model)
    if source is None:
        raise not_given(model, owner)
    with _importing_from(source.folder):
        try:
            network = source.function(**arguments)
        except Exception as error:  # a user's code raises anything
            with_these = f" with {dict(arguments)}" if arguments else ""
            what = f"{bare(model)} cannot be called{with_these}"
            raise UserError(f"{owner}: {what}: {first_line(error, kind=True)}") from error
    if not isinstance(network, nn.Module):
        kind = type(network).__name__
        raise UserError(f"{owner}: {bare(model)} returned a {kind}, not a torch.nn.Module")
    if next(network.parameters(), None) is None:
        raise UserError(f"{owner}: the network of {bare(model)} has no parameters")
    return network


def takes(model: str, argument: str) -> bool:
    """Whether the function of a network, recorded so, has an argument of this name."""
    source = given(model)
    if source is None:
        return model.startswith(TORCHVISION) and argument == "num_classes"
    try:
        parameters = inspect.signature(source.function).parameters.values()
    except ValueError:  # of code that is not Python's
        return False
    return any(p.name == argument or p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters)


def _models(model: str, owner: str) -> tuple[Any, str]:
    """`torchvision.models`, and a network's name there."""
    try:
        from torchvision import models
    except ImportError:
        raise UserError(f"{owner}: torchvision is not installed", hint="Install it: pip install torchvision") from None
    name = model.removeprefix(TORCHVISION)
    if name not in (known := models.list_models(module=models)):
        raise UserError(f"{owner}: torchvision has no {name!r} that classifies", hint=did_you_mean(name, known))
    return models, name


def _torchvision(model: str, arguments: Mapping[str, Any], owner: str, *, pretrained: bool) -> nn.Module:
    models, name = _models(model, owner)
    headless = arguments.get("num_classes") == 0
    passed = {k: v for k, v in arguments.items() if not (headless and k == "num_classes")}
    try:
        network: nn.Module = models.get_model(name, weights="DEFAULT" if pretrained else None, **passed)
    except Exception as error:  # torchvision and downloads raise many kinds
        problem = "its weights could not be downloaded" if pretrained else f"cannot be made with {passed}"
        raise UserError(f"{owner}: {problem}: {first_line(error)}") from None
    if headless:
        linear = [n for n, module in network.named_modules() if isinstance(module, nn.Linear)]
        if not linear:
            raise UserError(f"{owner}: it does not end in a linear layer, so its classifier cannot be removed")
        network.set_submodule(linear[-1], nn.Identity())
    return network


def torchvision_config(model: str, owner: str) -> dict[str, Any]:
    """`input_size`, `mean` and `std` of torchvision's weights of a name, which are not downloaded."""
    models, name = _models(model, owner)
    preprocessing = models.get_model_weights(name).DEFAULT.transforms()
    (side,) = getattr(preprocessing, "crop_size", [224])
    return {
        "input_size": (3, side, side),
        "mean": tuple(getattr(preprocessing, "mean", (0.5,) * 3)),
        "std": tuple(getattr(preprocessing, "std", (0.5,) * 3)),
    }


def config_of_own(network: nn.Module) -> dict[str, Any]:
    """What a network says of its input as timm's do: `pretrained_cfg`, or `default_cfg`; empty where nothing."""
    about = getattr(network, "pretrained_cfg", None) or getattr(network, "default_cfg", None) or {}
    return dict(about) if isinstance(about, Mapping) else dict(vars(about))
