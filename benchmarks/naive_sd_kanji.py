"""sd_kanji: pictures rendered and prompts tokenised once, against doing both for every item asked for.

python -m benchmarks.naive_sd_kanji
python -m benchmarks.naive_sd_kanji --size 128 --rounds 10

Both ways make the same batches of 16, bit by bit, which is checked first. First table: what making a batch costs alone,
in this process. Second table: the same followed by forward and backward of the tiny model, whose losses are therefore
equal too; on one thread. The model of the second table is always tiny, so its share of rendering is that of 32 px.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ratio import interleaved, print_table
from tuner.contract.workload import SAMPLE_SEED
from tuner.randomness import sample_seeds
from workloads.sd_kanji.cache import PromptPictures, prepare
from workloads.sd_kanji.data import Kanji
from workloads.sd_kanji.presets import PRESETS
from workloads.sd_kanji.tokens import PromptTokenizer, TokenSpec
from workloads.sd_kanji.workload import COEFFICIENTS, SdKanji

BATCH, BATCHES = 16, 4
TINY = PRESETS["tiny"].sizes
NAIVE, KEPT = "rendered and tokenised per item", "rendered and tokenised once"
Item = Callable[[int], Mapping[str, Tensor]]
Batches = Callable[[], Sequence[Mapping[str, Tensor]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--size", type=int, default=TINY.picture, help="pixels of a side, for the first table")
    words = parser.parse_args()
    torch.set_num_threads(1)
    job = SdKanji({})
    with tempfile.TemporaryDirectory(prefix="tuner-naive-") as folder:
        alone = make_ways(job, Path(folder), words.size)
        check_same(alone)
        seconds = interleaved({name: batched(way) for name, way in alone.items()}, words.rounds)
        title = f"The batches alone: {BATCH} pictures of {words.size} px and their tokens, equal bit by bit"
        print_table(title, seconds, NAIVE, units_per_call=BATCHES, unit="batch")
        ways = make_ways(job, Path(folder), TINY.picture)
        torch.manual_seed(0)
        model = job.model()
        loss = check_same_loss(job, model, ways)
        steps = interleaved({name: trained(job, model, way) for name, way in ways.items()}, words.rounds)
        title = f"Batch, forward and backward of tiny; losses equal ({loss:.6f})"
        print_table(title, steps, NAIVE, units_per_call=BATCHES, unit="batch", machine=False)


def make_ways(job: SdKanji, folder: Path, size: int) -> dict[str, Batches]:
    """Each gives the same few batches, made anew at every call."""
    kept = PromptPictures(prepare(folder, Kanji(), size, TINY.tokens, quiet).train)
    places = torch.randperm(len(kept), generator=torch.Generator().manual_seed(0))[: BATCH * BATCHES].tolist()
    ways: dict[str, Item] = {NAIVE: naive_items(size, TINY.tokens), KEPT: kept.__getitem__}
    return {name: partial(cut, job, item, places) for name, item in ways.items()}


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""


def naive_items(size: int, tokens: TokenSpec) -> Item:
    """Items as a data set of SVG files and texts gives them."""
    source, tokenizer = Kanji(), PromptTokenizer(tokens)
    items = [item for item in source.items() if not item.held]

    def item(index: int) -> Mapping[str, Tensor]:
        chosen = items[index]
        picture = torch.from_numpy(source.picture(chosen, size).copy())
        return {"picture": picture, "tokens": tokenizer([chosen.text])[0]}

    return item


def cut(job: SdKanji, item: Item, places: Sequence[int]) -> Sequence[Mapping[str, Tensor]]:
    parts = [places[at : at + BATCH] for at in range(0, len(places), BATCH)]
    seeds = sample_seeds(0, 0, torch.arange(BATCH))
    return [{**job.collate([item(place) for place in part]), SAMPLE_SEED: seeds} for part in parts]


def batched(batches: Batches) -> Callable[[], None]:
    def call() -> None:
        batches()

    return call


def trained(job: SdKanji, model: nn.Module, batches: Batches) -> Callable[[], None]:
    def call() -> None:
        for batch in batches():
            model.zero_grad()
            total(job, model, batch).backward()

    return call


def total(job: SdKanji, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    terms = job.loss(model, batch)
    return torch.stack([COEFFICIENTS[name] * term.sum / term.weight for name, term in terms.items()]).sum()


def check_same(ways: Mapping[str, Batches]) -> None:
    """Raises SystemExit when the two ways make different batches."""
    for naive, kept in zip(ways[NAIVE](), ways[KEPT](), strict=True):
        if not all(torch.equal(naive[name], kept[name]) for name in ("picture", "tokens")):
            raise SystemExit("the ways do not make the same batches")


def check_same_loss(job: SdKanji, model: nn.Module, ways: Mapping[str, Batches]) -> float:
    """The mean loss of a batch. Raises SystemExit when it differs between the ways."""
    with torch.no_grad():
        naive, kept = (sum(float(total(job, model, batch)) for batch in way()) / BATCHES for way in ways.values())
    if naive != kept:
        raise SystemExit(f"the ways do not compute the same: losses {naive} and {kept}")
    return kept


if __name__ == "__main__":
    main()
