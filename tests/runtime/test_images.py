"""PNG files that remember their settings, and contact sheets looked at pixel by pixel."""

from __future__ import annotations

import json
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as examples
from hypothesis import strategies as st
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from gtr_deploy.runtime.errors import GtrError, UsageError
from gtr_deploy.runtime.pictures.png import SETTINGS_KEY, read_settings, save_png
from gtr_deploy.runtime.pictures.sheet import contact_sheet

IMAGE = np.arange(32 * 32 * 3, dtype=np.uint32).reshape(32, 32, 3).astype(np.uint8)


def has_colour(image: Image.Image, colour: tuple[int, int, int], tolerance: int = 0) -> int:
    distance = np.abs(np.asarray(image.convert("RGB")).astype(int) - colour).max(axis=2)
    return int((distance <= tolerance).sum())


# PNG


SETTINGS = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=10),
    st.recursive(
        st.none()
        | st.booleans()
        | st.integers()
        | st.floats(allow_nan=False, allow_infinity=False)
        | st.text(max_size=9),
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
        max_leaves=5,
    ),
    max_size=4,
)


@examples(deadline=None)
@given(settings=SETTINGS)
def test_settings_come_back(settings: dict[str, Any], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = tmp_path_factory.getbasetemp() / "image.png"
    save_png(path, IMAGE, settings)
    assert read_settings(path) == settings
    with Image.open(path) as image:
        assert (np.asarray(image) == IMAGE).all()
        assert image.mode == "RGB"


def test_numpy_values_and_paths_become_plain(tmp_path: Path) -> None:
    path = tmp_path / "new folder" / "image.png"
    save_png(
        path, IMAGE, {"seed": np.uint64(2**64 - 1), "orders": np.arange(3), "bundle": Path("a/b"), "steps": (1, 2)}
    )
    assert read_settings(path) == {"seed": 2**64 - 1, "orders": [0, 1, 2], "bundle": "a/b", "steps": [1, 2]}


def test_text_behind_the_pixels_is_found(tmp_path: Path) -> None:
    path = tmp_path / "image.png"
    save_png(path, IMAGE, {})
    body = b"tEXt" + SETTINGS_KEY.encode() + b'\0{"seed": 5}'
    chunk = (len(body) - 4).to_bytes(4, "big") + body + zlib.crc32(body).to_bytes(4, "big")
    Image.fromarray(IMAGE).save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-12] + chunk + data[-12:])
    assert read_settings(path) == {"seed": 5}


@pytest.mark.parametrize("value", [float("nan"), object()])
def test_settings_that_json_cannot_hold_leave_no_file(tmp_path: Path, value: object) -> None:
    with pytest.raises((ValueError, TypeError)):
        save_png(tmp_path / "image.png", IMAGE, {"value": value})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "image", [IMAGE.astype(np.float32), IMAGE[..., 0], IMAGE[..., :2], np.zeros((0, 3, 3), np.uint8), IMAGE[None]]
)
def test_pixels_of_another_kind_are_refused(tmp_path: Path, image: Any) -> None:
    with pytest.raises(ValueError, match=r"images must be uint8 \[N, H, W, 3\]"):
        save_png(tmp_path / "image.png", image, {})


def test_a_failing_write_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "image.png"
    save_png(path, IMAGE, {"seed": 1})
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full(self: Path, content: bytes) -> None:
        with self.open("wb") as file:
            file.write(content[:10])
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    line = r"^cannot write .*image\.png: No space left on device: the file needs \d+ bytes, [\d,]+ are free$"
    with pytest.raises(GtrError, match=line):
        save_png(path, IMAGE, {"seed": 2})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old


def test_a_folder_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "image.png").mkdir()
    for path in (tmp_path / "image.png", tmp_path / "file" / "image.png"):
        with pytest.raises(GtrError, match=r"^cannot write .*image\.png: "):
            save_png(path, IMAGE, {})
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "image.png"]


def with_text(path: Path, text: str | None, compressed: bool = False) -> Path:
    metadata = PngInfo()
    if text is not None:
        metadata.add_text(SETTINGS_KEY, text, zip=compressed)
    Image.fromarray(IMAGE).save(path, format="PNG", pnginfo=metadata)
    return path


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, r'holds no settings \(text chunk "gtr-deploy"\); was it written by another program\?'),
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ('{"seed": ' + "9" * 5000 + "}", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ("[1]", "not a JSON object"),
        ("null", "not a JSON object"),
    ],
)
def test_pngs_of_others(tmp_path: Path, text: str | None, message: str) -> None:
    with pytest.raises(GtrError, match=message) as error:
        read_settings(with_text(tmp_path / "image.png", text))
    assert "\n" not in str(error.value)
    assert "image.png" in str(error.value)


def test_files_that_are_no_png(tmp_path: Path) -> None:
    Image.fromarray(IMAGE).save(tmp_path / "photo.png", format="JPEG")
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("seed: 5")
    for name in ("photo.png", "empty.png", "text.png"):
        with pytest.raises(GtrError, match=rf"{name} is not a PNG file$"):
            read_settings(tmp_path / name)
    with pytest.raises(GtrError, match=r"^cannot read .*missing\.png: No such file or directory$"):
        read_settings(tmp_path / "missing.png")
    with pytest.raises(GtrError, match=r"^cannot read .*: Is a directory$"):
        read_settings(tmp_path)


def test_damaged_pngs(tmp_path: Path) -> None:
    data = with_text(tmp_path / "image.png", None).read_bytes()
    (tmp_path / "short.png").write_bytes(data[: len(data) // 2])
    with pytest.raises(GtrError, match=r"^cannot read .*short\.png: .*truncated"):
        read_settings(tmp_path / "short.png")
    bomb = with_text(tmp_path / "bomb.png", "x" * 80_000_000, compressed=True)
    with pytest.raises(GtrError, match=r"bomb\.png is a damaged PNG file: "):
        read_settings(bomb)


@examples(deadline=None)
@given(position=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_gives_settings_or_one_line(
    position: int, value: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    path = tmp_path_factory.getbasetemp() / "changed.png"
    save_png(path, IMAGE[:4, :4], {"seed": 5})
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    message = ""
    try:
        assert isinstance(read_settings(path), dict)
    except GtrError as error:
        message = str(error)
    assert message == "" or message.isprintable()


def test_settings_are_json_text_in_the_file(tmp_path: Path) -> None:
    save_png(tmp_path / "image.png", IMAGE, {"class": "crane ·", "seed": 1})
    with Image.open(tmp_path / "image.png") as image:
        assert json.loads(image.info["gtr-deploy"]) == {"class": "crane ·", "seed": 1}


# Contact sheets


def solid(count: int, size: tuple[int, int]) -> np.ndarray:
    """Images of one colour each, with a green corner pixel."""
    images = np.zeros((count, *size, 3), dtype=np.uint8)
    images[..., 0] = 100 + np.arange(count)[:, None, None]
    images[:, 0, 0] = (0, 255, 0)
    return images


@pytest.mark.parametrize(
    ("size", "factor"), [((32, 32), 3), ((8, 8), 12), ((256, 256), 1), ((95, 95), 2), ((96, 300), 1), ((1, 1), 96)]
)
def test_cells_are_enlarged_by_whole_factors(size: tuple[int, int], factor: int) -> None:
    sheet = contact_sheet(solid(3, size), ["", "", ""], 2, None)
    for index in range(3):
        body = has_colour(sheet, (100 + index, 0, 0))
        assert body == (size[0] * size[1] - 1) * factor**2
    assert has_colour(sheet, (0, 255, 0)) == 3 * factor**2


def test_cells_go_by_rows() -> None:
    pixels = np.asarray(contact_sheet(solid(5, (32, 32)), list("abcde"), 3, "title"))
    corners = [tuple(int(x.min()) for x in np.nonzero((pixels == (100 + i, 0, 0)).all(axis=2))) for i in range(5)]
    rows, columns = [row for row, _ in corners], [column for _, column in corners]
    assert rows[0] == rows[1] == rows[2] < rows[3] == rows[4]
    assert columns[0] == columns[3] < columns[1] == columns[4] < columns[2]


def test_captions_and_title_need_room() -> None:
    images = solid(2, (32, 32))
    bare = contact_sheet(images, ["", ""], 2)
    captioned = contact_sheet(images, ["golden retriever", "x"], 2)
    titled = contact_sheet(images, ["golden retriever", "x"], 2, "mar-digits")
    assert bare.height < captioned.height < titled.height
    assert bare.width == captioned.width == titled.width


def test_long_text_is_cut() -> None:
    images = solid(1, (32, 32))
    captions = ["golden retriever " * 100_000]
    sheet = contact_sheet(images, captions, 10**9, "a very long title " * 50)
    assert sheet.width <= 600
    cell = np.asarray(contact_sheet(images, captions, 1))
    left = int(np.nonzero((cell == (100, 0, 0)).all(axis=2))[1].min())
    background = cell[0, 0]
    assert (cell[-40:, left + 97 :] == background).all()
    assert not (cell[-40:, left : left + 96] == background).all()
    assert contact_sheet(images, ["two\nlines"], 1).size == contact_sheet(images, ["one"], 1).size


def test_sheets_that_cannot_be() -> None:
    images = solid(2, (32, 32))
    with pytest.raises(UsageError, match=r"^columns must be at least 1, not 0$"):
        contact_sheet(images, ["", ""], 0)
    with pytest.raises(ValueError, match="1 captions for 2 images"):
        contact_sheet(images, ["a"], 2)
    with pytest.raises(ValueError, match=r"not uint8 \[0, 32, 32, 3\]"):
        contact_sheet(images[:0], [], 2)
