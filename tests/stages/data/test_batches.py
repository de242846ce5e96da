"""Windows, the seeded permutation and batches, against brute force."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lazypipe.stages.contract import UserError
from lazypipe.stages.data.batches import count_windows, permuted, read_window, training_batch, validation_windows
from lazypipe.stages.data.shards import DOCUMENTS_SCHEMA, ShardWriter, TokenShards, write_documents


@pytest.fixture
def shards(tmp_path):
    def make(count: int) -> TokenShards:
        directory = tmp_path / "train"
        writer = ShardWriter(directory, "shard", "uint16", 4096)
        writer.append(np.arange(count))
        writer.close()
        write_documents(directory / "docs.arrow", [DOCUMENTS_SCHEMA.empty_table()])
        return TokenShards(directory)

    return make


@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.integers(1, 400), st.integers(0, 2**64), st.integers(0, 1000))
def test_permuted_is_a_permutation(count, seed, epoch):
    assert sorted(permuted(i, count, seed, epoch) for i in range(count)) == list(range(count))


def test_permuted_handles_large_counts_without_repeats():
    count = 10**12 + 39
    values = [permuted(i, count, 0, 0) for i in range(2000)]
    assert len(set(values)) == 2000
    assert all(0 <= value < count for value in values)


def test_permuted_depends_on_seed_and_epoch():
    orders = {tuple(permuted(i, 50, seed, epoch) for i in range(50)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_value_is_equally_likely_at_every_place():
    # 7 values over 7000 epochs: counts are binomial(7000, 1/7), standard deviation 29; 6 of them is far outside chance.
    counts = np.zeros((7, 7))
    for epoch in range(7000):
        for index in range(7):
            counts[index, permuted(index, 7, 1, epoch)] += 1
    assert np.abs(counts - 1000).max() < 6 * 29


@pytest.mark.parametrize("index", [-1, 5])
def test_permuted_refuses_an_index_outside(index):
    with pytest.raises(IndexError):
        permuted(index, 5, 0, 0)


@settings(deadline=None, derandomize=True)
@given(st.integers(0, 300), st.integers(1, 40))
def test_windows_are_counted_as_they_are_enumerated(num_tokens, seq_len):
    windows = [w for w in range(num_tokens + 1) if w * seq_len + seq_len + 1 <= num_tokens]
    assert count_windows(num_tokens, seq_len) == len(windows)


def test_a_batch_is_its_samples_windows(shards):
    stream, seq_len = np.arange(100), 9
    split, windows = shards(100), 11
    batch = training_batch(split, seq_len, seed=3, first_sample=8, size=7)  # crosses from epoch 0 into epoch 1
    assert batch.shape == (7, seq_len + 1)
    assert batch.dtype == np.int64
    for row, sample in enumerate(range(8, 15)):
        window = permuted(sample % windows, windows, 3, sample // windows)
        np.testing.assert_array_equal(batch[row], stream[window * seq_len : window * seq_len + seq_len + 1])


def test_an_epoch_predicts_every_token_once(shards):
    split = shards(91)
    targets = training_batch(split, 9, seed=0, first_sample=20, size=10)[:, 1:]
    assert sorted(targets.ravel().tolist()) == list(range(1, 91))


def test_batches_do_not_depend_on_how_samples_are_grouped(shards):
    split = shards(200)
    whole = training_batch(split, 8, seed=5, first_sample=0, size=12)
    parts = [training_batch(split, 8, seed=5, first_sample=start, size=4) for start in (0, 4, 8)]
    np.testing.assert_array_equal(whole, np.concatenate(parts))


@pytest.mark.parametrize("max_windows", [1, 3, 7, 12, 500])
def test_validation_windows_are_distinct_and_spread(shards, max_windows):
    chosen = validation_windows(shards(121), 10, max_windows)
    assert len(chosen) == min(12, max_windows)
    assert len(set(chosen.tolist())) == len(chosen)
    assert chosen.min() >= 0
    assert chosen.max() < 12
    gaps = np.diff(chosen)
    assert len(gaps) == 0 or gaps.max() - gaps.min() <= 1


def test_read_window(shards):
    assert read_window(shards(50), 4, 3).tolist() == [12, 13, 14, 15, 16]


def test_no_window_is_refused_with_the_numbers(shards):
    split = shards(10)
    for call in (lambda: training_batch(split, 10, 0, 0, 1), lambda: validation_windows(split, 10, 4)):
        with pytest.raises(UserError, match=r"train.*holds 10 tokens.*seq_len=10 needs 11.*lower seq_len"):
            call()
