"""sd_kanji's data: strokes to pictures, meanings to prompts, the user's folder, tokens, and what is kept of them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tuner import prepared
from tuner.contract.errors import WorkloadError
from workloads.sd_kanji.cache import Prepared, prepare, to_float
from workloads.sd_kanji.data import Kanji, held_out, normal
from workloads.sd_kanji.folder import ImageFolder
from workloads.sd_kanji.presets import CLIP_TOKENS, PRESETS
from workloads.sd_kanji.strokes import draw, flatten, strokes_of
from workloads.sd_kanji.tokens import PromptTokenizer

ROOT = Path(__file__).resolve().parents[2]
TINY = PRESETS["tiny"].sizes
PREPARE = """
import sys
from pathlib import Path
from workloads.sd_kanji.workload import SdKanji
SdKanji({}).prepare(Path(sys.argv[1]), lambda *said: print(*said, flush=True))
"""


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody reads."""


def picture_folder(folder: Path, rows: Sequence[tuple[str, str]], table: str = "metadata.jsonl") -> Path:
    """A data set as users have it: each file a picture of its own colour."""
    folder.mkdir(parents=True, exist_ok=True)
    for index, (name, _) in enumerate(rows):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 30), (index * 9 % 256, 20, 200)).save(folder / name)
    if table.endswith("jsonl"):
        lines = [json.dumps({"file_name": name, "text": text}) for name, text in rows]
    else:
        lines = ["text,file_name", *(f'"{text}",{name}' for name, text in rows)]
    (folder / table).write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def data(kanji_cache: Path) -> Prepared:
    return prepare(kanji_cache, Kanji(), TINY.picture, TINY.tokens, quiet)


# --- strokes --------------------------------------------------------------------------------------------------------


def test_a_path_of_all_commands_ends_where_it_should() -> None:
    """By hand: M 10,10; c to (20,20); S to (40,20), mirroring the control point (18,20) at (20,20) to (22,20)."""
    points = flatten("M10,10c0,5,8,10,10,10S38,24,40,20")
    assert points[0].tolist() == [10, 10]
    assert points[12].tolist() == [20, 20]
    assert points[-1].tolist() == [40, 20]
    middle = (np.array([20, 20]) + 3 * np.array([22, 20]) + 3 * np.array([38, 24]) + np.array([40, 20])) / 8
    assert points[12 + 6] == pytest.approx(middle)


def test_relative_and_absolute_commands_draw_the_same() -> None:
    absolute = flatten("M10,20C10,30,20,40,30,40S50,30,50,20")
    relative = flatten("m10,20c0,10,10,20,20,20s20-10,20-20")
    assert relative == pytest.approx(absolute)


@pytest.mark.parametrize("path", ["M10,10L20,20", "M10", "10,20"])
def test_a_path_that_cannot_be_read_is_refused(path: str) -> None:
    with pytest.raises(ValueError, match="no complete M, C or S command"):
        flatten(path)


def test_a_straight_stroke_is_drawn_where_it_lies() -> None:
    """From (20, 54.5) to (90, 54.5) of 109 units: at 109 px rows 53 to 55 are black, the ends are round."""
    grey = draw(strokes_of('<path id="a" d="M20,54.5c20,0,50,0,70,0"/>'), 109)
    assert grey.shape == (109, 109)
    assert (grey[54, 20:90] == 0).all()
    assert (grey[50] == 255).all()
    assert (grey[58] == 255).all()
    assert grey[54, 17] == grey[54, 92] == 255
    assert 3 * 68 < (255 - grey.astype(float)).sum() / 255 < 3 * 75


def test_pictures_are_antialiased() -> None:
    grey = draw(strokes_of('<path d="M20,20c20,20,50,50,70,70"/>'), 32)
    assert len(set(grey.ravel().tolist())) > 4


# --- kanji and prompts ----------------------------------------------------------------------------------------------


def test_kanji_have_their_meanings_and_strokes() -> None:
    source = Kanji()
    items = {item.name: item for item in source.items()}
    assert len(items) == sum(source.counts) == 6412
    assert items["山"].text == "mountain"
    assert items["亜"].text == "Asia, rank next, come after", "the first three of four"
    mountain = source.picture(items["山"], 64)
    assert mountain.shape == (1, 64, 64)
    assert mountain.dtype == np.uint8
    assert mountain[0, 10:45, 29:34].min() == 0, "the middle stroke"
    assert mountain[0, 0].min() == 255, "nothing at the border"


def test_nothing_is_on_both_sides(data: Prepared) -> None:
    """Neither a kanji, nor a prompt however written, nor what the model really reads, nor a picture."""
    for train, valid in (
        (set(data.train.names), set(data.valid.names)),
        ({normal(text) for text in data.train.texts}, {normal(text) for text in data.valid.texts}),
        (
            {tuple(row) for row in data.train.tokens.tolist()},
            {tuple(row) for row in data.valid.tokens.tolist()},
        ),
        (
            {picture.numpy().tobytes() for picture in data.train.pictures},
            {picture.numpy().tobytes() for picture in data.valid.pictures},
        ),
    ):
        assert train
        assert valid
        assert not train & valid


def test_a_tenth_of_the_prompts_is_held_out_and_groups_stay_whole(data: Prepared) -> None:
    assert (len(data.train.texts), len(data.valid.texts)) == Kanji().counts
    prompts = {normal(text) for text in data.valid.texts}
    everything = prompts | {normal(text) for text in data.train.texts}
    assert len(prompts) == round(0.1 * len(everything))
    shared = [text for text, count in Counter(map(normal, data.train.texts)).items() if count > 1]
    assert len(shared) > 100, "kanji with equal meanings exist, so the grouping matters"


def test_groups_are_joined_through_others() -> None:
    keys = [["a"], ["a", "b"], ["b", "c"], ["d"], ["e"], ["f"]]
    held = held_out(keys)
    assert held[0] == held[1] == held[2]
    assert 0 < sum(held) < 6
    assert held_out([["a"], ["a"]]) == [False, False], "one group cannot be divided"
    assert held_out(list(reversed(keys))) == list(reversed(held)), "the order decides nothing"


@pytest.mark.parametrize(("package", "version"), [("kanjivg", "20200101"), ("jamdict-data", None)])
def test_a_missing_or_other_package_is_named(
    package: str, version: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another environment, which this machine does not have."""
    import importlib.metadata as metadata

    real = metadata.version

    def pretend(name: str) -> str:
        if name != package:
            return real(name)
        if version is None:
            raise metadata.PackageNotFoundError(name)
        return version

    monkeypatch.setattr("importlib.metadata.version", pretend)
    with pytest.raises(WorkloadError, match=f"{package}.*pip install kanjivg==20260714 jamdict-data==1.5"):
        Kanji().items()


# --- tokens ---------------------------------------------------------------------------------------------------------


def test_tokens_are_clips_own() -> None:
    """The numbers that CLIP's published tokenizer gives."""
    tokens = PromptTokenizer(CLIP_TOKENS)(["a photo of a cat", "Kanji  character for SUCCESS", ""])
    assert tokens.shape == (3, 77)
    assert tokens.dtype == torch.int64
    assert tokens[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 49407]
    assert tokens[1, :7].tolist() == [49406, 2532, 2697, 4009, 556, 3034, 49407]
    assert torch.equal(tokens[2], CLIP_TOKENS.empty())


def test_tinys_tokens_spell_every_prompt_whole(data: Prepared) -> None:
    for side in (data.train, data.valid):
        assert int(side.tokens.max()) < TINY.tokens.vocabulary
        assert (side.tokens[:, 0] == TINY.tokens.start).all()
        assert (side.tokens[:, -1] == TINY.tokens.end).all(), "none is cut"
    used = data.train.tokens.unique()
    assert len(used) > 1000, "real tokens, not one unknown token"


# --- what is kept ---------------------------------------------------------------------------------------------------


def test_pictures_are_bytes_and_the_mean_is_theirs(data: Prepared) -> None:
    assert data.train.pictures.shape == (5758, 1, 32, 32)
    assert data.train.pictures.dtype == torch.uint8
    seen = to_float(data.train.pictures[:3])
    assert seen.shape == (3, 3, 32, 32)
    assert float(seen.max()) == 1.0
    assert torch.allclose(data.mean, to_float(data.train.pictures).mean(0)[:1], atol=1e-4)


def test_pictures_are_shared_by_presets_of_one_size(tmp_path: Path) -> None:
    folder = ImageFolder(picture_folder(tmp_path / "data", [(f"{n}.png", f"number {n}") for n in range(6)]))
    said: list[str] = []
    prepare(tmp_path / "cache", folder, 32, TINY.tokens, quiet)
    prepare(tmp_path / "cache", folder, 32, CLIP_TOKENS, lambda done, total, text: said.append(text))
    assert set(said) == {"prompts"}
    assert [entry.what for entry in prepared.entries(tmp_path / "cache")] == ["pictures", "tokens", "tokens"]


def test_a_killed_preparation_leaves_nothing_that_is_believed(tmp_path: Path) -> None:
    killed = subprocess.Popen(
        [sys.executable, "-c", PREPARE, str(tmp_path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert killed.stdout is not None
    deadline = time.monotonic() + 100
    for line in killed.stdout:
        if line.startswith("100 ") or time.monotonic() > deadline:
            break
    os.kill(killed.pid, signal.SIGKILL)
    assert killed.wait() == -signal.SIGKILL
    killed.stdout.close()
    assert prepared.entries(tmp_path) == []
    folder = ImageFolder(picture_folder(tmp_path / "data", [("a.png", "one"), ("b.png", "two")]))
    prepare(tmp_path, folder, 32, TINY.tokens, quiet)
    assert not list((tmp_path / "sd_kanji").glob(".partial*")), "the next one cleans up"


def test_a_damaged_file_is_made_again_or_named(tmp_path: Path) -> None:
    folder = ImageFolder(picture_folder(tmp_path / "data", [("a.png", "one"), ("b.png", "two")]))
    first = prepare(tmp_path / "cache", folder, 32, TINY.tokens, quiet).train.pictures.clone()
    path = next((tmp_path / "cache").rglob("train.npy"))
    path.write_bytes(path.read_bytes()[:-5])
    assert torch.equal(prepare(tmp_path / "cache", folder, 32, TINY.tokens, quiet).train.pictures, first)
    path.write_bytes(b"x" * path.stat().st_size)
    with pytest.raises(WorkloadError, match=r"are damaged .*tuner cache"):
        prepare(tmp_path / "cache", folder, 32, TINY.tokens, quiet)


# --- the user's folder ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("table", ["metadata.jsonl", "metadata.csv"])
def test_a_folder_is_read(tmp_path: Path, table: str) -> None:
    rows = [("a.png", "a red fox, running"), ("deep/b.jpg", "two"), ("c.png", "TWO "), ("d.jpeg", "three")]
    folder = ImageFolder(picture_folder(tmp_path, rows, table))
    items = folder.items()
    assert [(item.name, item.text) for item in items][:2] == rows[:2]
    assert items[1].held == items[2].held, "prompts that differ by case stay together"
    assert folder.counts[0] + folder.counts[1] == 4
    assert folder.picture(items[0], 16).shape == (3, 16, 16)


def test_the_same_picture_under_two_names_stays_on_one_side(tmp_path: Path) -> None:
    rows = [(f"{n}.png", f"number {n}") for n in range(30)]
    picture_folder(tmp_path, rows)
    (tmp_path / "0.png").write_bytes((tmp_path / "29.png").read_bytes())
    by_name = {item.name: item.held for item in ImageFolder(tmp_path).items()}
    assert by_name["0.png"] == by_name["29.png"]


def test_transparency_is_white_and_long_pictures_are_cropped(tmp_path: Path) -> None:
    picture_folder(tmp_path, [("a.png", "one"), ("b.png", "two")])
    drawn = Image.new("RGBA", (90, 30), (0, 0, 0, 0))
    drawn.paste((255, 0, 0, 255), (30, 0, 60, 30))
    drawn.save(tmp_path / "a.png")
    Image.new("RGBA", (20, 20), (0, 0, 0, 0)).save(tmp_path / "b.png")
    folder = ImageFolder(tmp_path)
    red, white = (folder.picture(item, 16) for item in folder.items())
    assert red[:, 8, 8].tolist() == [255, 0, 0]
    assert white.min() == 255


def test_changed_data_have_another_digest(tmp_path: Path) -> None:
    picture_folder(tmp_path, [("a.png", "one"), ("b.png", "two")])
    before = ImageFolder(tmp_path).digest()
    assert ImageFolder(tmp_path).digest() == before
    (tmp_path / "metadata.jsonl").write_text((tmp_path / "metadata.jsonl").read_text().replace("two", "three"))
    changed = ImageFolder(tmp_path).digest()
    Image.new("RGB", (50, 50), "green").save(tmp_path / "a.png")
    assert len({before, changed, ImageFolder(tmp_path).digest()}) == 3


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n{oops\n', "metadata.jsonl: row 2: it is no valid"),
        ("metadata.jsonl", '["a.png", "x"]\n', "row 1: it must be an object {column: value}, got"),
        ("metadata.jsonl", '{"file_name": "a.png", "caption": "x"}\n', "it has no column 'text'; its columns are "),
        ("metadata.jsonl", '{"file_name": "a.png", "text": NaN}\n', "row 1, column 'text': a text is needed, got NaN"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "  "}\n', "row 1, column 'text': it is empty"),
        ("metadata.jsonl", '{"file_name": "no.png", "text": "x"}\n', "column 'file_name': "),
        ("metadata.jsonl", '{"file_name": "../a.png", "text": "x"}\n', "below the folder is needed, got '../a.png'"),
        ("metadata.jsonl", '{"file_name": "a.heic", "text": "x"}\n', "'a.heic' is not one of .png, .jpg, .jpeg"),
        ("metadata.jsonl", "\n", "it has no rows; expected FOLDER/metadata.jsonl"),
        ("metadata.jsonl", '{"file_name": "a.png", "text": "x"}\n', "at least 2 different prompts"),
        ("metadata.csv", "file_name,caption\na.png,x\n", "no column 'text'; its columns are file_name, caption"),
        ("metadata.csv", "file_name,text\na.png,x\nb.png,\n", "metadata.csv: row 3, column 'text': it is empty"),
        ("metadata.csv", 'file_name,text\na.png,"x\n', "metadata.csv: line 2 is no valid CSV"),
        ("notes.txt", "", "neither metadata.jsonl nor metadata.csv is in it"),
    ],
)  # fmt: skip
def test_wrong_tables_are_told_by_file_line_and_column(tmp_path: Path, name: str, content: str, message: str) -> None:
    for picture in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / picture)
    (tmp_path / name).write_text(content, encoding="utf-8")
    with pytest.raises(WorkloadError) as caught:
        ImageFolder(tmp_path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"--data {tmp_path}")
    assert "\n" not in str(caught.value)


def test_other_wrong_folders(tmp_path: Path) -> None:
    with pytest.raises(WorkloadError, match="nowhere does not exist; expected FOLDER"):
        ImageFolder(tmp_path / "nowhere")
    picture_folder(tmp_path, [("a.png", "one"), ("b.png", "two")])
    (tmp_path / "metadata.jsonl").write_bytes(
        b'{"file_name": "a.png", "text": "x"}\n{"file_name": "b.png", "text": "\xff"}'
    )
    with pytest.raises(WorkloadError, match=r"metadata.jsonl: row 2, column 'text': it is not UTF-8"):
        ImageFolder(tmp_path)
    picture_folder(tmp_path, [("a.png", "one"), ("b.png", "two")], "metadata.csv")
    with pytest.raises(WorkloadError, match=r"both metadata\.jsonl and metadata\.csv"):
        ImageFolder(tmp_path)


def test_a_broken_picture_is_named(tmp_path: Path) -> None:
    folder = picture_folder(tmp_path / "data", [("a.png", "one"), ("b.png", "two")])
    (folder / "b.png").write_bytes(b"not a picture")
    with pytest.raises(WorkloadError, match=r"b.png is no readable picture .*; mend or remove it"):
        prepare(tmp_path / "cache", ImageFolder(folder), 32, TINY.tokens, quiet)
