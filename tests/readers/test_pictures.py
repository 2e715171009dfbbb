"""Picture files as people have them: 16 bit, transparent, turned, hidden beside, of other kinds."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tuner.contract.errors import WorkloadError
from tuner.readers.listing import content_digest, folders_in, listed, passed_over
from tuner.readers.pictures import SUFFIXES, read_picture, refuse_equal


@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_sixteen_bits_are_scaled(tmp_path: Path, name: str) -> None:
    values = np.full((8, 8), 60000, np.uint16)
    values[:4] = 3000
    Image.fromarray(values).save(tmp_path / name)
    picture = read_picture(tmp_path / name, 8)
    assert picture.shape == (3, 8, 8)
    assert picture[:, 1, 1].tolist() == [12] * 3
    assert picture[:, 6, 6].tolist() == [233] * 3


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[..., 1] = 255
    pixels[:, 4:] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    Image.fromarray(pixels).save(tmp_path / "a.webp", lossless=True, exact=True)
    grey = Image.fromarray(np.full((8, 8, 2), (10, 0), np.uint8), "LA")
    grey.save(tmp_path / "grey.png")
    palette = Image.new("P", (8, 8), 1)
    palette.putpalette([0, 0, 0, 0, 255, 0])
    palette.save(tmp_path / "palette.png", transparency=1)
    for name in ("a.png", "a.webp"):
        picture = read_picture(tmp_path / name, 8)
        assert picture[:, 4, 1].tolist() == [255, 255, 255]
        assert picture[:, 4, 6].tolist() == [200, 0, 0]
    assert read_picture(tmp_path / "grey.png", 8).min() == 255
    assert read_picture(tmp_path / "palette.png", 8).min() == 255


@pytest.mark.parametrize("turn", [3, 6, 8])
def test_pictures_are_upright(tmp_path: Path, turn: int) -> None:
    upright = Image.new("RGB", (32, 32), "white")
    upright.paste("black", (0, 0, 32, 8))
    stored = upright.rotate({3: 180, 6: 90, 8: 270}[turn])
    exif = stored.getexif()
    exif[0x0112] = turn
    stored.save(tmp_path / "a.jpg", exif=exif)
    picture = read_picture(tmp_path / "a.jpg", 32)
    assert picture[:, 3].max() < 60
    assert picture[:, 20].min() > 200


def test_other_modes_and_the_crop(tmp_path: Path) -> None:
    Image.new("CMYK", (9, 9), (0, 0, 0, 255)).save(tmp_path / "a.jpg")
    assert read_picture(tmp_path / "a.jpg", 8).max() < 60
    wide = Image.new("L", (90, 30), 255)
    wide.paste(0, (30, 0, 60, 30))
    wide.save(tmp_path / "wide.bmp")
    assert read_picture(tmp_path / "wide.bmp", 8, crop=True)[:, :, 1:7].max() == 0
    assert read_picture(tmp_path / "wide.bmp", 8)[:, 4, 0].tolist() == [255] * 3


@pytest.mark.parametrize(
    ("values", "why"),
    [(np.full((4, 4), 1 << 20, np.int32), "32 bit"), (np.zeros((4, 4), np.float32), "floating-point numbers")],
)
def test_deeper_pixels_are_refused(tmp_path: Path, values: np.ndarray, why: str) -> None:
    Image.fromarray(values).save(tmp_path / "a.tif")
    with pytest.raises(WorkloadError, match=rf"a\.tif is no readable picture \(its pixels .*{why}.*\); mend or"):
        read_picture(tmp_path / "a.tif", 4)


def test_a_broken_picture_with_a_latin1_name_is_one_printable_line(tmp_path: Path) -> None:
    broken = tmp_path / os.fsdecode(b"caf\xe9.png")
    broken.write_bytes(b"no picture")
    with pytest.raises(WorkloadError) as caught:
        read_picture(broken, 8)
    assert r"caf\xe9.png is no readable picture" in str(caught.value)
    str(caught.value).encode()


def test_hidden_files_are_no_data_and_others_are_counted(tmp_path: Path) -> None:
    for name in ("b.png", "a.JPG", "c.webp", "._a.jpg", ".DS_Store", "x.heic", "y.HEIC", "notes"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / os.fsdecode(b"caf\xe9.gif")).write_bytes(b"")
    found = listed(tmp_path, SUFFIXES)
    assert [os.fsencode(file.name) for file in found.files] == [b"a.JPG", b"b.png", b"c.webp", b"caf\xe9.gif"]
    assert passed_over(found.others, SUFFIXES[:2]) == "3 files passed over (.heic 2, notes 1); read are .png, .jpg"
    before = content_digest(tmp_path, found.files)
    found.files[3].write_bytes(b"1")
    assert content_digest(tmp_path, found.files) != before


def test_folders_that_become_classes(tmp_path: Path) -> None:
    for name in ("b", "a", ".cache", "__MACOSX"):
        (tmp_path / name).mkdir()
    assert [folder.name for folder in folders_in(tmp_path)] == ["a", "b"]
    (tmp_path / os.fsdecode(b"caf\xe9")).mkdir()
    with pytest.raises(WorkloadError, match=r"caf\\xe9: the folder's name is not UTF-8; rename it"):
        folders_in(tmp_path)


def test_pictures_that_are_all_the_same_are_refused() -> None:
    white = np.full((4, 3, 8, 8), 255, np.uint8)
    with pytest.raises(WorkloadError, match=r"here: all 4 .* same, of the one colour \(255, 255, 255\), so nothing"):
        refuse_equal(white, "here")
    white[:, 0, 0, 0] = 1
    with pytest.raises(WorkloadError, match="all 4 training pictures are the same, so nothing"):
        refuse_equal(white, "here")
    white[3, 0, 0, 0] = 2
    refuse_equal(white, "here")
