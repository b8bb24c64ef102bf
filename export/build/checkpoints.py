"""Checkpoint files in, checked state dicts out; and random stand-ins for trying the pipeline without any.

A checkpoint is somebody else's file: pickles are read with torch's weights-only reader, which builds tensors and plain
containers and runs nothing, and what comes out must have exactly the keys and shapes of the model that was asked for.
Does not know where files come from (download.py), what the weights are used for (reference.py), or whether the numbers
in them make sense: values are not looked at, because the file is memory-mapped and may be several GB.
"""

from __future__ import annotations

import argparse
import hashlib
import math
import pickle
import re
import warnings
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ...runtime.errors import GtrError
from ...runtime.models.architecture import Architecture
from ...runtime.models.families import known_models
from ...runtime.models.mar import MarArchitecture
from ..families import export_family
from ..graphs.decoders import build_decoder

HEAD_PREFIX = "diffloss.net."
VAE_UNUSED = ("encoder.", "quant_conv.", "loss.", "model_ema.")
"""Parts of a VAE file that decoding does not need."""

_NAMED = 3  # an error names this many keys of a kind, then counts the rest
_LONGEST_NAME = 100
_LONGEST_SAFETENSORS_HEADER = 100_000_000  # the format's own limit


def load_mar(path: Path, architecture: Architecture) -> tuple[dict[str, Tensor], str]:
    """MAR weights from an official .pth, a plain state dict, or a .safetensors file.

    Args:
        path: the file; its content decides how it is read, not its suffix.
        architecture: the model that it must hold.

    Returns:
        The state dict in the official layout, exactly the expected keys, in the file's dtype and still mapped to the
        file where the format allows; and what was taken: ``model_ema``, ``model (no EMA weights in the file)``,
        ``state dict`` or ``safetensors``.

    Raises:
        GtrError: no such file, not a checkpoint, a pickle with code in it, or another model's weights.
    """
    content, kind = _read(path)
    state, taken = content, kind
    if isinstance(content.get("model_ema"), Mapping):
        state, taken = content["model_ema"], "model_ema"
    elif isinstance(content.get("model"), Mapping):
        state, taken = content["model"], "model (no EMA weights in the file)"
    expected = expected_mar(architecture)
    problems = compare(state, expected)
    if problems:
        hint = _mar_hint(state, architecture)
        raise GtrError(f"{path} does not hold the weights of {architecture.name}: {problems}; {hint}")
    return {key: state[key].detach() for key in expected}, taken


def load_vae_decoder(path: Path, architecture: Architecture) -> dict[str, Tensor]:
    """The decoder half of a KL-16 VAE: ``decoder.*`` and ``post_quant_conv.*``.

    Args:
        path: {"model": state dict}, {"state_dict": state dict}, a plain state dict, or a .safetensors file. Not read
            where the model needs no VAE.
        architecture: the model whose latents it must decode.

    Returns:
        Exactly the keys of ``models.decoders.Kl16Decoder``; empty for a model that decodes by itself.

    Raises:
        GtrError: no such file, not a checkpoint, a pickle with code in it, or not a KL-16 VAE.
    """
    if not architecture.decoder.has_weights:
        return {}
    content, _ = _read(path)
    nested = next((content[key] for key in ("model", "state_dict") if isinstance(content.get(key), Mapping)), content)
    state = {key: value for key, value in nested.items() if not str(key).startswith(VAE_UNUSED)}
    expected = expected_vae_decoder(architecture)
    problems = compare(state, expected)
    if problems:
        hint = "give a KL-16 VAE with --vae"
        if looks_like(nested) is not None:
            hint = "this looks like a MAR checkpoint, give it with --checkpoint"
        raise GtrError(f"{path} does not hold the VAE decoder of {architecture.name}: {problems}; {hint}")
    return {key: state[key].detach() for key in expected}


# Reading


def _read(path: Path) -> tuple[Mapping[Any, Any], str]:
    """The file's top-level mapping, and ``safetensors`` or ``state dict``."""
    try:
        if path.is_dir():
            raise GtrError(f"{path} is a folder, not a checkpoint; give the file in it")
        size = path.stat().st_size
        with path.open("rb") as file:
            start = file.read(9)
    except FileNotFoundError:
        raise GtrError(f"{path} does not exist; give a checkpoint file") from None
    except OSError as error:
        raise GtrError(f"cannot read {path} ({error.strerror}); give a checkpoint file that you may read") from None
    if size == 0:
        raise GtrError(f"{path} is empty (0 bytes); download it again")
    if start[8:] == b"{" and int.from_bytes(start[:8], "little") <= _LONGEST_SAFETENSORS_HEADER:
        try:
            return load_file(path), "safetensors"
        except (SafetensorError, ValueError, OSError) as error:
            raise GtrError(f"{path} is a damaged .safetensors file ({_line(error)}); download it again") from None
    is_zip = start.startswith(b"PK\x03\x04")
    if is_zip and not zipfile.is_zipfile(path):
        raise GtrError(f"{path} is cut short: {size} bytes and no end of the archive; download it again")
    if not is_zip and not start.startswith(b"\x80"):
        raise GtrError(f"{path} is not a checkpoint: neither .safetensors nor a file that torch.save wrote")
    content = _read_pickle(path, is_zip)
    if not isinstance(content, Mapping):
        raise GtrError(f"{path} holds a {type(content).__name__}, not a state dict; give a checkpoint file")
    return content, "state dict"


def _read_pickle(path: Path, is_zip: bool) -> Any:
    """``torch.load`` without code: tensors, containers, numbers, strings and ``argparse.Namespace``, nothing else."""
    try:
        # The Namespace is what the original training script stores its arguments in. The warnings would only repeat,
        # in many lines, what the error below says in one.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except pickle.UnpicklingError as error:
        raise GtrError(_refusal(path, str(error))) from None
    except Exception as error:  # a damaged or hostile file can make the reader fail in any way at all
        raise GtrError(f"{path} is damaged or not a checkpoint ({_line(error)}); download it again") from None


def _refusal(path: Path, message: str) -> str:
    advice = "refused. Convert it to .safetensors on a machine you trust"
    found = re.search(r"GLOBAL ([\w.]+)", message)
    if found:
        name = found.group(1)[:_LONGEST_NAME]
        # torch drops the module of a builtin, and names the platform's module where Python says os.
        name = re.sub(r"^(posix|nt)\.", "os.", name if "." in name else f"builtins.{name}")
        return f"{path} holds Python code ({name}), not only weights; {advice}"
    found = re.search(r"Unsupported operand \d+", message)
    reason = found.group(0) if found else "more than tensors and plain containers"
    return f"{path} holds a pickle that cannot be read safely ({reason}); {advice}"


def _line(error: Exception) -> str:
    """An exception's first line, kept short."""
    text = _printable(str(error).strip().partition("\n")[0])
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _printable(text: str) -> str:
    """Text from a file, fit for one line of a terminal."""
    return "".join(character if character.isprintable() else "?" for character in text)[:_LONGEST_NAME]


# Checking


def expected_mar(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of a MAR state dict in the official layout."""
    networks = export_family(architecture).networks.values()
    with torch.device("meta"):
        return {key: shape for row in networks for key, shape in _shapes(row.build(architecture), row.prefix).items()}


def expected_vae_decoder(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    """Keys and shapes of the VAE's decoder; empty for a model that decodes by itself."""
    if not architecture.decoder.has_weights:
        return {}
    with torch.device("meta"):
        return _shapes(build_decoder(architecture), "")


def _shapes(module: nn.Module, prefix: str) -> dict[str, tuple[int, ...]]:
    return {prefix + key: tuple(value.shape) for key, value in module.state_dict().items()}


def compare(state: Mapping[Any, Any], expected: Mapping[str, tuple[int, ...]]) -> str:
    """What is wrong with a state dict: missing, unexpected and wrong entries, a few of each; empty if nothing is."""
    missing = [key for key in expected if key not in state]
    unexpected = [_printable(str(key)) for key in state if key not in expected]
    wrong: list[str] = []
    for key, shape in expected.items():
        if key not in state:
            continue
        value = state[key]
        if not isinstance(value, Tensor):
            wrong.append(f"{key} is a {type(value).__name__}, not a tensor")
        elif tuple(value.shape) != shape:
            wrong.append(f"{key} is {_size(value.shape)}, not {_size(shape)}")
        elif not value.is_floating_point() or value.layout != torch.strided or value.device.type != "cpu":
            wrong.append(f"{key} is {value.dtype} ({value.layout}, on {value.device.type}), not plain floating point")
    kinds = (("missing", missing), ("unexpected", unexpected), ("wrong:", wrong))
    return "; ".join(f"{kind} {_few(items)}" for kind, items in kinds if items)


def _few(items: Sequence[str]) -> str:
    rest = len(items) - _NAMED
    return ", ".join(items[:_NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _size(shape: Sequence[int]) -> str:
    return "x".join(str(length) for length in shape) or "a scalar"


def _mar_hint(state: Mapping[Any, Any], architecture: Architecture) -> str:
    found = looks_like(state)
    if found in known_models() and found != architecture.name:
        return f"this looks like {found}, try --model {found}"
    if "decoder.conv_in.weight" in state:
        return "this looks like the VAE, give it with --vae"
    return "check --model and --checkpoint"


def looks_like(state: Mapping[Any, Any]) -> str | None:
    """The zoo model whose sizes a state dict has; ``an unknown MAR`` for other sizes, None where it is no MAR."""
    embedding = _shape_of(state, "class_emb.weight")
    projection = _shape_of(state, HEAD_PREFIX + "input_proj.weight")
    if embedding is None or projection is None:
        return None
    depth, head_depth = (_blocks(state, prefix) for prefix in ("encoder_blocks.", HEAD_PREFIX + "res_blocks."))
    sizes = (*embedding, depth, projection[0], head_depth)
    for name, model in known_models().items():
        known = model.architecture
        if not isinstance(known, MarArchitecture):
            continue
        if sizes == (known.classes, known.width, known.depth, known.head_width, known.head_depth):
            return name
    return "an unknown MAR"


def _shape_of(state: Mapping[Any, Any], key: str) -> tuple[int, ...] | None:
    value = state.get(key)
    return tuple(value.shape) if isinstance(value, Tensor) and value.dim() == 2 else None


def _blocks(state: Mapping[Any, Any], prefix: str) -> int:
    return len({key[len(prefix) :].partition(".")[0] for key in map(str, state) if key.startswith(prefix)})


# Random stand-ins


def random_mar(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """Random float32 weights of the right shapes, for structure and timing only: the images are noise.

    Every key has its own generator, so its values depend on ``seed``, its name and its shape alone.
    """
    return {key: _random(key, shape, seed) for key, shape in expected_mar(architecture).items()}


def random_vae_decoder(architecture: Architecture, seed: int) -> dict[str, Tensor]:
    """As :func:`random_mar`, for the VAE's decoder; empty for a model that decodes by itself."""
    return {key: _random(key, shape, seed) for key, shape in expected_vae_decoder(architecture).items()}


def _random(key: str, shape: tuple[int, ...], seed: int) -> Tensor:
    if len(shape) == 1:  # biases, and the weights of LayerNorm and GroupNorm
        return torch.ones(shape) if key.endswith(".weight") else torch.zeros(shape)
    digest = hashlib.sha256(f"{seed}:{zlib.crc32(key.encode())}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest[:8], "little", signed=True))
    return torch.empty(shape).normal_(0.0, _deviation(key, shape), generator=generator)


def _deviation(key: str, shape: tuple[int, ...]) -> float:
    """Standard deviation of a random weight: activations of order 1, a predicted noise near 0."""
    per_input = 1 / math.sqrt(math.prod(shape[1:]))
    if key.startswith(HEAD_PREFIX + "final_layer.linear."):
        return 0.02 * per_input
    if key.startswith(("class_emb.", HEAD_PREFIX + "time_embed.")) or "adaLN_modulation" in key:
        return 0.02
    return per_input if key.endswith(".weight") else 0.02  # without ".weight": position and token embeddings
