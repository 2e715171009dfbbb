"""gpt2: texts tokenised once and batched by length, against tokenising every item and padding it to 128 tokens.

python -m benchmarks.naive_gpt2
python -m benchmarks.naive_gpt2 --rounds 10 --max-tokens 64

All ways run the same texts forward and backward, 32 at a time, through the same weights without dropout: 32 batches of
the plain order, sorted by length or not. That the sum of their losses is equal is checked first. A second table: what
making the batches costs alone. The model is the tiny one, on one thread.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.ratio import interleaved, print_table
from tuner.engine.loader import WINDOW_STEPS, BucketedOrder, SampleOrder
from workloads.gpt2.workload import Gpt2

BATCH = 32
SAME_LOSS = 1e-5
"""Relative, of the sum over all texts."""
NAIVE, KEPT = "tokenised per item, padded to all tokens", "tokenised once, padded to all tokens"
DYNAMIC, BUCKETS = "tokenised once, padded to the longest", "tokenised once, texts of equal length together"
Batches = Callable[[], Sequence[Mapping[str, Tensor]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--max-tokens", type=int, default=128, help="the guide's 128")
    words = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(prefix="tuner-naive-") as folder:
        ways = make_ways(Path(folder), words.max_tokens)
        job = prepared(Path(folder), words.max_tokens, "bucket")
        torch.manual_seed(0)
        model = job.model().eval()
        sums = check_same(job, model, ways)
        seconds = interleaved({name: trained(job, model, ways[name]) for name in ways}, words.rounds, warmup=0)
        title = f"A step of {BATCH} texts, forward and backward; {sums}"
        print_table(title, seconds, NAIVE, units_per_call=WINDOW_STEPS, unit="step")
        alone = interleaved({name: batched(ways[name]) for name in ways}, words.rounds)
        print_table("The batches alone", alone, NAIVE, units_per_call=WINDOW_STEPS, unit="batch", machine=False)


def prepared(folder: Path, max_tokens: int, padding: str) -> Gpt2:
    job = Gpt2({"max_tokens": max_tokens, "padding": padding})
    job.prepare(folder, quiet)
    return job


def quiet(done: int, total: int, text: str) -> None:
    """Progress nobody watches."""


def make_ways(folder: Path, max_tokens: int) -> dict[str, Batches]:
    """Each gives the batches of one window of the training stream, made anew."""
    fixed, bucket = (prepared(folder, max_tokens, padding) for padding in ("fixed", "bucket"))
    data = bucket.dataset("train")
    plain = SampleOrder(len(data), 0)
    sorted_order = BucketedOrder(plain, data.lengths, BATCH)
    places = range(WINDOW_STEPS * BATCH)
    in_order, by_length = ([order.key(i)[1] for i in places] for order in (plain, sorted_order))
    return {
        NAIVE: lambda: cut(in_order, naive_items(fixed, max_tokens), fixed),
        KEPT: lambda: cut(in_order, fixed.dataset("train").__getitem__, fixed),
        DYNAMIC: lambda: cut(in_order, data.__getitem__, bucket),
        BUCKETS: lambda: cut(by_length, data.__getitem__, bucket),
    }


def naive_items(job: Gpt2, max_tokens: int) -> Callable[[int], Mapping[str, Tensor]]:
    """Items as a data set of texts gives them: tokenised when asked for."""
    tokens, data = job.tokens, job.dataset("train")
    counts = tokens.train.counts.tolist()
    texts = [tokens.decode(tokens.train.ids[at : at + n]) for at, n in zip(data.starts, counts, strict=True)]

    def item(index: int) -> Mapping[str, Tensor]:
        ids = tokens.tokenizer.encode(texts[index]).ids[:max_tokens]
        return {**data[index], "ids": torch.tensor(ids, dtype=torch.int32)}

    return item


def cut(
    indices: Sequence[int], item: Callable[[int], Mapping[str, Tensor]], job: Gpt2
) -> Sequence[Mapping[str, Tensor]]:
    parts = [indices[at : at + BATCH] for at in range(0, len(indices), BATCH)]
    return [job.collate([item(index) for index in part]) for part in parts]


def trained(job: Gpt2, model: nn.Module, batches: Batches) -> Callable[[], None]:
    def call() -> None:
        for batch in batches():
            model.zero_grad()
            job.loss(model, batch)["bce"].sum.backward()

    return call


def batched(batches: Batches) -> Callable[[], None]:
    def call() -> None:
        batches()

    return call


def check_same(job: Gpt2, model: nn.Module, ways: Mapping[str, Batches]) -> str:
    """Loss and padding of every way in words. Raises SystemExit when a loss is another."""
    with torch.no_grad():
        sums = {name: sum(float(job.loss(model, batch)["bce"].sum) for batch in ways[name]()) for name in ways}
    wanted = sums[NAIVE]
    apart = max(abs(found - wanted) for found in sums.values()) / wanted
    if apart > SAME_LOSS:
        raise SystemExit(f"the ways do not compute the same: losses {sums}")
    shares = ", ".join(f"{100 * padding(ways[name]()):.0f} %" for name in ways)
    return f"losses equal within {apart:.1g} of {wanted:.2f}; padding in the order below: {shares}"


def padding(batches: Sequence[Mapping[str, Tensor]]) -> float:
    """Share of the places that hold no token."""
    return 1 - sum(int(batch["lengths"].sum()) for batch in batches) / sum(batch["ids"].numel() for batch in batches)


if __name__ == "__main__":
    main()
