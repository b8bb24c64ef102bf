"""Checkpoints whose pickle is hostile: code, bombs, tensors that cannot be, numbers that are none."""

from __future__ import annotations

import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path

import torch
from checkpoint_files import (
    HOOKS,
    KEY,
    REBUILD,
    Checkpoint,
    archive,
    called,
    named,
    pairs,
    several,
    storage,
    tensor,
    text,
    whole,
    whole_pickle,
    wholes,
)  # fmt: skip
from safetensors.torch import save_file

from gtr_deploy.export.build.checkpoints import random_mar

Write = Callable[[Path], object]
CASES: dict[str, tuple[Write, str | None]] = {}
"""Name to what writes the file, and a part of the refusal; None where the file is sound."""

_PLAIN = "more than tensors and plain containers"


def _entry(name: str, words: str | None, value: bytes | Callable[[Checkpoint], bytes], *forms: bool) -> None:
    """One tensor of an otherwise sound checkpoint is replaced, in an archive and in a file as of old."""
    for legacy in forms or (False, True):

        def write(path: Path, legacy: bool = legacy) -> None:
            checkpoint = Checkpoint(legacy)
            checkpoint.entries[KEY] = value if isinstance(value, bytes) else value(checkpoint)
            checkpoint.write(path)

        CASES[f"{name}-{'old' if legacy else 'zip'}"] = write, words


def _pickle(name: str, words: str, content: bytes, *, bare: bool = False) -> None:
    """A pickle of its own as data.pkl, or as the whole file."""
    members = {"a/data.pkl": content, "a/version": b"3\n"}
    CASES[name] = (lambda path: path.write_bytes(content if bare else archive(members))), words


# Code, and what builds at a word's notice

for function, refused in {
    "posix system": "os.system", "__builtin__ eval": "builtins.eval", "builtins exec": "builtins.exec",
    "subprocess Popen": "subprocess.Popen", "torch load": "torch.load", "torch.hub load": "torch.hub.load",
    "torch.serialization load": "torch.serialization.load", "pathlib Path": "pathlib.Path",
    "torch.storage UntypedStorage": "torch.storage.UntypedStorage", "torch Tensor": "torch.Tensor",
    "__builtin__ bytearray": "builtins.bytearray", "__builtin__ set": "builtins.set",
    "collections Counter": "collections.Counter", "_codecs encode": "_codecs.encode",
    "torch.FloatStorage from_file": "torch.FloatStorage.from_file", "torch.serialization _get_layout": "_get_layout",
    "torch._tensor _rebuild_from_type_v2": "_rebuild_from_type_v2",
}.items():  # fmt: skip
    argument = whole(10**13) if "Storage" in function or "bytearray" in function else text("touch MARKER")
    _entry(f"calls-{refused}", "holds Python code (" if refused[0] == "_" else refused, called(function, argument))
for function in (
    "_rebuild_qtensor", "_rebuild_sparse_tensor", "_rebuild_meta_tensor_no_storage", "_rebuild_nested_tensor",
    "_rebuild_wrapper_subclass", "_rebuild_device_tensor_from_numpy", "_rebuild_tensor_v3",
    "_rebuild_parameter_with_state",
):  # fmt: skip
    call = called(f"torch._utils {function}", HOOKS, whole(10**13))
    _entry(f"calls{function}", f"torch._utils.{function}", call, False)

_codec = named("_codecs encode") * 40 + text("x" * 1000) + (text("utf-16") + b"\x86R") * 40
_entry("text-that-doubles", "_codecs.encode", _codec)
_TOUCH = b"\x80\x02" + called("posix system", text("touch MARKER")) + b"."
_pickle("code-bare", "holds Python code (os.system)", _TOUCH, bare=True)
_pickle("code-bare-protocol-4", "opcode FRAME", pickle.dumps({"a": [1] * 9}, 4), bare=True)
_pickle("code-by-stack-global", "opcode STACK_GLOBAL", whole_pickle(text("os") + text("system") + b"\x93"))
_pickle("code-by-inst", "opcode INST", b"\x80\x02(" + text("touch MARKER") + b"iposix\nsystem\n.")
_pickle("code-by-extension", "opcode EXT1", b"\x80\x02\x82\x01.")
_pickle("code-after-the-end", "does not hold the weights", b"\x80\x02}." + _TOUCH)
_named_code = "posix " + "\x1b[31m" + "x" * 5000
_pickle("code-with-escapes-in-its-name", r"os.\x1b[31mxxx", whole_pickle(called(_named_code, text("a"))))
_SPACE = named("argparse Namespace") + b")\x81"
_pickle("setstate-of-its-own", _PLAIN, whole_pickle(_SPACE + pairs({"__setstate__": named("torch device")}) + b"b}b"))
for method in ("get", "items", "__class__"):
    _pickle(f"method-{method}", _PLAIN, whole_pickle(HOOKS + pairs({method: named("torch device")}) + b"b"))
_pickle("slots-set", _PLAIN, whole_pickle(_SPACE + b"N" + pairs({"__class__": named("torch float32")}) + b"\x86b"))
_pickle("new-tensor", "torch.nn.parameter.Parameter", whole_pickle(named("torch.nn.parameter Parameter") + b")\x81"))
_pickle("new-ordered-dict", _PLAIN, whole_pickle(named("collections OrderedDict") + b")\x81"))
_pickle("state-for-a-dict", _PLAIN, whole_pickle(b"}}b"))
_pickle("calls-text", _PLAIN, whole_pickle(text("os.system") + several(text("a")) + b"R"))

# Bombs

_doubling = b"".join(b"q" + bytes([n]) + b"h" + bytes([n]) + b"\x86" for n in range(100))
_lists = b"".join(b"q" + bytes([n]) + b"0" + b"](h" + bytes([n]) + b"h" + bytes([n]) + b"e" for n in range(100))
_deep = b"K\x01" + b"\x85" * 300_000
_pickle("key-of-2-to-the-100-parts", _PLAIN, whole_pickle(b"}K\x01" + _doubling + b"K\x01s"))
_pickle("key-nested-300000-deep", _PLAIN, whole_pickle(b"}" + _deep + b"K\x01s"))
_pickle("pairs-with-a-deep-key", _PLAIN, whole_pickle(b"}(" + _deep + b"K\x01u"))
_pickle("ordered-dict-of-a-deep-key", _PLAIN, whole_pickle(
    named("collections OrderedDict") + b"](" + _deep + b"K\x01\x86e\x85R"))  # fmt: skip
_pickle("calls-2-to-the-100-parts", _PLAIN, whole_pickle(b"K\x01" + _doubling + b")R"))
_pickle("lists-that-double", "opcode POP", whole_pickle(b"K\x01" + _lists + b")R"))
_pickle("makes-2-to-the-100-parts", _PLAIN, whole_pickle(b"K\x01" + _doubling + b")\x81"))
_pickle("nested-300000-deep", "holds a tuple, not a state dict", whole_pickle(_deep))
_pickle("2-to-the-100-parts", "holds a tuple, not a state dict", whole_pickle(b"K\x01" + _doubling))
_pickle("5-MB-pickle", "has 5000007 bytes, not at most 4000000", whole_pickle(text("x" * 4_999_999)))
_pickle("5-MB-pickle-bare", "damaged", whole_pickle(text("x" * 4_999_999)), bare=True)
_many = b"".join(b"K" + bytes([n % 256]) + b"K\x01" for n in range(600_000))
_pickle("a-million-steps", "more than 500000 steps", whole_pickle(b"}(" + _many + b"u"))
_keys = b"".join(b"J" + struct.pack("<I", n) + b"N" for n in range(500_000))
_pickle("500000-keys", "more than 500000 steps", whole_pickle(b"}(" + _keys + b"u"))
_pickle("249000-keys", "does not hold the weights", whole_pickle(b"}(" + _keys[: 6 * 249_000] + b"u"))
_marks = b"(" * 499_990
_pickle("marks-without-end", "nested more than 1000 deep", whole_pickle(_marks + b"}"))
_entry("storage-key-of-2-to-the-100-parts", _PLAIN, tensor(
    storage(b"K\x01" + _doubling, whole(16)), whole(0), wholes(16), wholes(1)), False)  # fmt: skip
_entry("storage-word-of-2-to-the-100-parts", _PLAIN, tensor(
    storage(text("0"), whole(16), word=b"K\x01" + _doubling), whole(0), wholes(16), wholes(1)), False)  # fmt: skip
_pickle("key-of-a-name-of-1-MB", "unexpected " + "x" * 10, whole_pickle(pairs({"x" * 1_000_000: b"N"})))
_pickle("key-with-escapes", r"unexpected \x1b]0;hello\x07\n\u202e", whole_pickle(
    pairs({"\x1b]0;hello\x07\n\u202e": b"N"})))  # fmt: skip
_pickle("key-of-a-lone-surrogate", r"unexpected a\udc80", whole_pickle(pairs({"a\udc80": b"N"})))
_pickle("key-of-600-digits", "unexpected 1000", whole_pickle(b"}" + whole(10**600) + b"Ns"))
_pickle("holds-itself", "does not hold the weights", b"\x80\x02}q\x00" + text("model") + b"h\x00s.")

_pickle("size-of-2-to-the-100-parts", _PLAIN, whole_pickle(pairs({"a": called("torch Size", b"K\x01" + _doubling)})))
_pickle("size-of-a-list", _PLAIN, whole_pickle(pairs({"a": called("torch Size", b"](K\x01e")})))
_pickle("device-of-escapes", r"\x1b[31m", whole_pickle(pairs({"a": called("torch device", text("\x1b[31m"))})))

# No pickle at all

for name, content in {
    "empty": b"", "without-end": b"\x80\x02}", "nothing-on-the-stack": b"\x80\x02.",
    "tuple-of-nothing": b"\x80\x02\x87.",
    "unknown-memo": b"\x80\x02h\x07.", "no-mark": b"\x80\x02}u.",
    "text-longer-than-the-file": b"\x80\x02X\xff\xff\xff\x7fa.",
    "text-that-is-no-utf-8": b"\x80\x02X\x02\0\0\0\xff\xfe.", "no-such-opcode": b"\x80\x02\xff.",
    "negative-length": b"\x80\x02\x8b\xff\xff\xff\xffa.", "a-million-digits": b"\x80\x02I" + b"9" * 10**6 + b"\n.",
    "8-byte-length": b"\x80\x02\x8d" + b"\xff" * 7 + b"\x7fa.", "global-without-a-name": b"\x80\x02c.",
}.items():  # fmt: skip
    _pickle(f"pickle-{name}", "damaged or not a checkpoint", content)
_pickle("pickle-odd-pairs", _PLAIN, whole_pickle(b"}(K\x01u"))
_pickle("pickle-appends-to-a-dict", _PLAIN, whole_pickle(b"}K\x01a"))
_pickle("pickle-item-of-a-tuple", _PLAIN, whole_pickle(b")K\x01K\x02s"))

# What may stand beside weights, numbers of NumPy and paths, and what looks like them

_NATIVE = several(whole(3), text("<"), b"N", b"N", b"N", whole(-1), whole(-1), whole(0))
_LATIN = text("latin1")
_EIGHT = called("_codecs encode", text("x" * 8), _LATIN)


def _dtype(code: bytes, state: bytes = _NATIVE) -> bytes:
    return called("numpy dtype", code, b"\x89", b"\x88") + state + b"b"


def _number(kind: bytes, data: bytes = _EIGHT, core: str = "_core") -> bytes:
    return called(f"numpy.{core}.multiarray scalar", kind, data)


_DOUBLE = _dtype(text("f8"))
for core in ("core", "_core"):
    _entry(f"number-of-numpy-{core}", "is a float, not a tensor", _number(_DOUBLE, core=core), False)
_entry("number-without-an-order", "is a float, not a tensor", _number(_dtype(text("f8"), b"")[:-1]), False)
_entry("path", "is a PurePosixPath, not a tensor", called("pathlib PosixPath", text("/etc"), text("passwd")), False)
_entry("path-of-windows", "is a PureWindowsPath", called("pathlib._local WindowsPath", text("C:\\")), False)
_entry("path-of-a-list", _PLAIN, called("pathlib PosixPath", b"]"))
_entry("path-of-2-to-the-100-parts", _PLAIN, called("pathlib PosixPath", b"K\x01" + _doubling))
_entry("path-with-state", _PLAIN, called("pathlib PosixPath", text("a")) + pairs({"_str": text("b")}) + b"b")
_entry("path-made-anew", _PLAIN, named("pathlib PosixPath") + several(text("a")) + b"\x81")
for code in ("O", "O8", "V8", "M8", "U2", "f16", "c8", "f8,O", "(1000000000000,)f8"):
    _entry(f"number-of-type-{code}", _PLAIN, _number(_dtype(text(code))))
_entry("number-of-a-pickled-object", "_codecs.encode", _number(
    _dtype(text("f8")), called("_codecs encode", text("cposix\nsystem\n(S'touch MARKER'\ntR."), _LATIN)))  # fmt: skip
_entry("number-of-a-listed-type", _PLAIN, _number(called("numpy dtype", b"](" + text("f8") + b"e", b"\x89", b"\x88")))
_entry("number-of-no-type", _PLAIN, _number(text("f8")))
_entry("number-of-text", _PLAIN, _number(_DOUBLE, text("x" * 8)))
_entry("number-of-too-few-bytes", _PLAIN, _number(_DOUBLE, called("_codecs encode", text("x"), _LATIN)))
_entry("number-of-many-bytes", "_codecs.encode", _number(_DOUBLE, called("_codecs encode", text("x" * 10**6), _LATIN)))
_entry("number-in-another-script", "_codecs.encode", _number(
    _DOUBLE, called("_codecs encode", text("\u0660" * 8), _LATIN)))  # fmt: skip
_entry("number-by-another-codec", "_codecs.encode", called("_codecs encode", text("x" * 8), text("unicode_escape")))
_entry("number-by-a-codec-of-2-to-the-100", "_codecs.encode", called(
    "_codecs encode", text("x" * 8), b"K\x01" + _doubling))  # fmt: skip
_entry("type-with-fields", _PLAIN, _number(_dtype(text("f8"), _NATIVE.replace(b"NNN", b"NN}"))))
_entry("type-of-another-order", _PLAIN, _number(_dtype(text("f8"), _NATIVE.replace(text("<"), text("=O")))))
_entry("type-with-state-twice", _PLAIN, _number(_DOUBLE + _NATIVE + b"b"))
_entry("type-with-attributes", _PLAIN, _number(_dtype(text("f8"), pairs({"code": text("O")}))))

# Tensors that cannot be

_BEYOND = "reaches beyond its storage"
_NEGATIVE = "negative size, stride or offset"
for name, refused, shape, strides, other in (
    ("larger-than-its-storage", _BEYOND, (10**13,), (1,), {}),
    ("one-larger", _BEYOND, (17,), (1,), {}),
    ("of-long-strides", _BEYOND, (16,), (10**12,), {}),
    ("from-beyond", _BEYOND, (16,), (1,), {"offset": 1}),
    ("from-far-beyond", _BEYOND, (16,), (1,), {"offset": 2**62}),
    ("of-2-to-the-126", _BEYOND, (2**63 - 1, 2**63 - 1), (2**62, 1), {}),
    ("empty-from-beyond", _BEYOND, (0,), (1,), {"offset": 10**15}),
    ("of-negative-size", _NEGATIVE, (-16,), (1,), {}),
    ("of-negative-stride", _NEGATIVE, (16,), (-1,), {"offset": 15}),
    ("of-negative-offset", _NEGATIVE, (16,), (1,), {"offset": -1}),
    ("of-65-axes", _PLAIN, (1,) * 65, (1,) * 65, {}),
    ("without-strides", _PLAIN, (16,), (), {}),
    ("of-a-terabyte-from-4-bytes", "is 1000000000000, not 16", (10**12,), (0,), {}),
    ("of-one-number", "those of decoder_norm.weight lie upon each other", (16,), (0,), {}),
    ("of-integers", "is torch.int32", (16,), (1,), {"kind": "torch IntStorage"}),
    ("of-complex-numbers", "torch.ComplexFloatStorage", (16,), (1,), {"kind": "torch ComplexFloatStorage"}),
    ("of-quantised-numbers", "torch.QInt32Storage", (16,), (1,), {"kind": "torch QInt32Storage"}),
):  # fmt: skip
    _entry(f"tensor-{name}", refused, lambda c, a=(shape, strides, 16), o=other: c.of(c.number(), *a, **o))


def _overlapping(path: Path) -> None:
    state = random_mar_tiny()
    key = "class_emb.weight"  # 3x16
    state[key] = torch.as_strided(torch.zeros(64), state[key].shape, (1, 1))
    torch.save(state, path)


def random_mar_tiny() -> dict[str, torch.Tensor]:
    from checkpoint_files import TINY

    return random_mar(TINY, 0)


CASES["tensor-whose-rows-overlap"] = _overlapping, "those of class_emb.weight lie upon each other"


def _made(name: str, words: str, *parts: bytes, forms: tuple[bool, ...] = (False,)) -> None:
    """A tensor of other arguments, over the storage that was there."""
    _entry(name, words, lambda c: called(REBUILD, c.held(c.number(), whole(16)), *parts), *forms)


_SHAPE, _REST = (whole(0), wholes(16), wholes(1)), (b"\x89", HOOKS)
_made("tensor-of-an-offset-in-words", _PLAIN, text("0"), *_SHAPE[1:], *_REST)
_made("tensor-of-a-shape-of-bools", _PLAIN, whole(0), several(b"\x88"), wholes(1), *_REST)
_made("tensor-of-a-deep-shape", _PLAIN, whole(0), b"K\x01" + _doubling, wholes(1), *_REST)
_made("tensor-of-a-listed-shape", _PLAIN, whole(0), b"](K\x10e", wholes(1), *_REST)
_made("tensor-with-hooks", _PLAIN, *_SHAPE, b"\x89", b"]")
_made("tensor-with-metadata", _PLAIN, *_SHAPE, *_REST, pairs({"neg": b"\x88"}))
_made("tensor-of-a-gradient-of-2", _PLAIN, *_SHAPE, whole(2), HOOKS)
_entry("tensor-of-no-storage", _PLAIN, called(REBUILD, text("a"), *_SHAPE, *_REST), False)
_entry("parameter-of-no-tensor", _PLAIN, called("torch._utils _rebuild_parameter", text("a"), *_REST))
_entry("tensor-with-state", _PLAIN, lambda c: c.entries[KEY] + pairs({}) + b"b")
_entry("entry-is-text", "decoder_norm.weight is a str, not a tensor", text("a"), False)
_entry("entry-is-a-storage", "is a TypedStorage, not a tensor", lambda c: c.held(c.number(), whole(16)))

# Storages that are not there

for name, refused, key, values, more in (
    ("of-a-petabyte", "of 4000000000000000 bytes", None, whole(10**15), {}),
    ("of-2-to-the-100", "bytes", None, whole(2**100), {}),
    ("of-negative-length", _PLAIN, None, whole(-16), {}),
    ("of-a-length-in-words", _PLAIN, None, text("16"), {}),
    ("of-a-true-length", _PLAIN, None, b"\x88", {}),
    ("of-no-archive", "the archive holds none", "10000", whole(16), {}),
    ("elsewhere", "the archive holds none", "../../../etc/passwd", whole(16), {}),
    ("called-with-escapes", r"storage \x1b[31m", "\x1b[31m", whole(16), {}),
    ("called-in-another-script", _PLAIN, "\u0660", whole(16), {}),
    ("of-two-sizes", "a storage of two sizes", "0", whole(8), {}),
    ("of-a-place-that-is-none", _PLAIN, None, whole(16), {"place": b"]"}),
    ("of-another-word", _PLAIN, None, whole(16), {"word": text("module")}),
    ("of-twice-the-bytes", "of 128 bytes, the archive holds 64", None, whole(16), {"kind": "torch DoubleStorage"}),
    ("of-half-the-bytes", "of 32 bytes, the archive holds 64", None, whole(16), {"kind": "torch HalfStorage"}),
    ("of-no-kind", _PLAIN, None, whole(16), {"kind": "collections OrderedDict"}),
):  # fmt: skip
    _entry(f"storage-{name}", refused, lambda c, k=key, v=values, m=more: tensor(
        c.held(c.number() if k is None else k, v, **m), *_SHAPE), False)  # fmt: skip
_entry("storage-is-a-number", _PLAIN, tensor(b"K\x01Q", *_SHAPE))
_entry("storage-is-a-view", _PLAIN, lambda c: tensor(storage(
    text(c.number()), whole(16), last=several(text("v"), whole(0), whole(16))), *_SHAPE), True)  # fmt: skip
_entry("storage-with-a-place-on-cuda", None, lambda c: tensor(
    c.held(c.number(), whole(16), place=text("cuda:0\x1b[31m")), *_SHAPE))  # fmt: skip


def _old(name: str, words: str, change: Callable[[Checkpoint], object]) -> None:
    def write(path: Path) -> None:
        checkpoint = Checkpoint(legacy=True)
        change(checkpoint)
        checkpoint.write(path)

    CASES[f"old-{name}"] = write, words


def _grow(checkpoint: Checkpoint) -> None:
    checkpoint.entries[KEY] = tensor(checkpoint.held(checkpoint.number(), whole(10**13)), *_SHAPE)


_LISTED = "a list of storages that is not that of the tensors"
_old("storage-of-40-terabytes", "is not all there", _grow)
_old("storage-unlisted", _LISTED, lambda c: setattr(c, "listed", b"]"))
_old("storage-listed-twice", _LISTED, lambda c: setattr(c, "listed", b"](" + text("0") * 60 + b"e"))
_old("storage-listed-deep", _LISTED, lambda c: setattr(c, "listed", b"](K\x01" + _doubling + b"e"))
_old("storage-listed-inside", _LISTED, lambda c: setattr(
    c, "listed", b"]](" + b"".join(map(text, c.storages)) + b"ea"))  # fmt: skip
_old("storage-listed-beside", _LISTED, lambda c: setattr(
    c, "listed", b"}](" + b"".join(map(text, c.storages)) + b"eK\x01K\x01\x86\x86"))  # fmt: skip
_old("version-of-2-to-the-100-parts", "no magic number", lambda c: setattr(c, "version", b"K\x01" + _doubling))
_old("storage-cut", "is not all there", lambda c: c.storages.update({"59": c.storages["59"][:-4]}))
_old("storage-of-another-length", "is not all there", lambda c: c.storages.update({"0": bytes(4)}))

# Numbers that are none

_NONE = "has weights that are not finite: decoder_norm.weight has "


def _numbers(name: str, words: str | None, value: float, dtype: torch.dtype = torch.float32, index: int = 0) -> None:
    def write(path: Path) -> None:
        state = {key: tensor.to(dtype) for key, tensor in random_mar_tiny().items()}
        state[KEY][index] = value
        if name.endswith("safetensors"):
            save_file(state, path)
        else:
            torch.save({"model": state} if "model" in name else state, path)

    CASES[f"number-{name}"] = write, words


_numbers("nan", _NONE + "1 NaN of 16", math.nan)
_numbers("nan-last", _NONE + "1 NaN of 16", math.nan, index=-1)
_numbers("nan-in-model", _NONE + "1 NaN of 16", math.nan)
_numbers("infinite", _NONE + "1 infinite of 16", math.inf)
_numbers("minus-infinite", _NONE + "1 infinite of 16", -math.inf, index=7)
_numbers("nan-in-half", _NONE + "1 NaN of 16", math.nan, torch.float16)
_numbers("nan-in-bfloat16-safetensors", _NONE + "1 NaN of 16", math.nan, torch.bfloat16)
_numbers("nan-safetensors", _NONE + "1 NaN of 16", math.nan)
_numbers("infinite-as-float32", _NONE + "1 infinite of 16", 1e300, torch.float64)
_numbers("large", None, 3e38)


def _unused(path: Path) -> None:
    state = random_mar_tiny()
    torch.save({"model": {key: value * math.nan for key, value in state.items()}, "model_ema": state}, path)


def _all(path: Path) -> None:
    torch.save({key: value * math.nan for key, value in random_mar_tiny().items()}, path)


CASES["number-nan-in-what-is-not-taken"] = _unused, None
CASES["number-nan-everywhere"] = _all, "and 59 more tensors have such"
