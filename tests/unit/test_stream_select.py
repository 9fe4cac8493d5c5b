import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from stream_stores import write_store

from mimscale.config import build_config
from mimscale.errors import ConfigError
from mimscale.store.manifest import Manifest, load_manifest, write_manifest
from mimscale.store.rows import SCHEMA
from mimscale.stream.config import StreamConfig
from mimscale.stream.select import parse_attribute, parse_filter
from mimscale.stream.shares import WeightedShares, weighted_shares


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """vol_000 ... vol_003: ct, ct, mr, mr; spacing along Z 1, 2, 3, 4 mm; three have a site; one is resampled."""
    store = tmp_path_factory.mktemp("select") / "store"
    bare = write_store(store, [(20, 32, 32 + number) for number in range(4)])
    sites = [{"site": "A"}, {"site": "B", "scanner": "x"}, {"site": "A"}, {}]
    rows = [
        dataclasses.replace(
            bare.row(number),
            modality="ct" if number < 2 else "mr",
            spacing_mm=(number + 1.0, 1.0, 1.0),
            tags=sites[number],
            resampled=number == 3,
            overlays=bare.row(number).overlays if number else {},
            warnings=("few_slices", "tilted")[: number - 1] if number > 1 else (),
        )
        for number in range(4)
    ]
    write_manifest(store, rows)
    return load_manifest(store)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('modality == "CT" and spacing_mm[0] <= 3', [0, 1]),
        ('modality != "ct"', [2, 3]),
        ("spacing_mm[0] > 1 and not resampled", [1, 2]),
        ("resampled or spacing_mm[0] == 1", [0, 3]),
        ("1.5 < spacing_mm[0] <= 3", [1, 2]),
        ("shape[3] in (32, 35)", [0, 3]),
        ('id not in ["vol_001"]', [0, 2, 3]),
        ('tags["site"] == "A"', [0, 2]),
        ('tags["site"] != "A"', [1, 3]),
        ('tags["site"] == ""', [3]),
        ('tags["scanner"] in ("x", "y")', [1]),
        ('"label" in overlays', [1, 2, 3]),
        ('"label" not in overlays', [0]),
        ('"tilted" in warnings', [3]),
        ("fill_value > -2000", [0, 1, 2, 3]),
        ("3 <= spacing_mm[0]", [2, 3]),
        ("resampled == False", [0, 1, 2]),
        ("resampled < True", [0, 1, 2]),
        ("shape[3] != -1 and spacing_mm[1] >= 1.0", [0, 1, 2, 3]),
    ],
)
def test_a_filter_selects_what_python_would(manifest: Manifest, text: str, expected: list[int]) -> None:
    assert np.flatnonzero(parse_filter(text).select(manifest)).tolist() == expected


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ('modalty == "ct"', r"no column 'modalty'; did you mean modality\? there are id, subject, .*tags"),
        ('modality == "ct', r"unterminated string literal .* at character 13; a filter is made of columns"),
        ("modality == 3", "compares modality and 3: text with number"),
        ("modality", "modality alone is no condition; compare it"),
        ("spacing_mm < 3", r"spacing_mm holds 3 numbers; write spacing_mm\[0\] \.\.\. spacing_mm\[2\]"),
        ("spacing_mm[3] < 3", r"spacing_mm holds 3 numbers"),
        ("spacing_mm[True] < 3", r"spacing_mm holds 3 numbers"),
        ('id[0] == "v"', "id holds one value; write id without brackets"),
        ("tags == 3", r'tags holds values by name; write tags\["\.\.\."\]'),
        ("overlays == 3", r'overlays holds names; write "\.\.\." in overlays'),
        ("3 in overlays", "overlays holds names; write one, in quotes"),
        ("stats == 3", "stats cannot be filtered by; usable are id, "),
        ("1 == 1", "compares 1 and 1, neither of which is a column"),
        ("shape[0] in (1, 'x')", "looks for .*which is number"),
        ("shape[0] in ()", r"in \(\): must be a list of values"),
        ("shape[0] in shape", "must be a list of values"),
        ("shape[0] is 1", "a filter is made of columns"),
        ('__import__("os").system("true") == 0', "a filter is made of columns"),
        ("id.upper() == 'A'", "a filter is made of columns"),
        ("(lambda: True)()", "a filter is made of columns"),
        ("shape[0] + 1 == 2", "a filter is made of columns"),
        ("[x for x in (1,)]", "a filter is made of columns"),
        ("id := 3", "at character"),
        ("", "at character"),
        ("\0", "null"),
        ("(" * 400 + "resampled" + ")" * 400, "too many nested parentheses|cannot be read"),
        ("x" * 3000, "has more than 2000 characters"),
        ("shape[0] < " + "9" * 1000, r"numbers may be up to 1e\+300"),
        ("shape[0] < -1e400", r"numbers may be up to 1e\+300"),
    ],
)
def test_what_is_no_filter_is_refused_in_words(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem) as caught:
        parse_filter(text)
    assert str(caught.value).startswith(f"stream.filter={text}")


def test_a_tag_that_no_volume_has_is_refused_with_those_that_exist(manifest: Manifest) -> None:
    with pytest.raises(ConfigError, match=r"no volume has tags\['center'\]; there are scanner, site"):
        parse_filter('tags["center"] == "A"').select(manifest)


def test_a_filter_knows_the_columns_that_it_reads() -> None:
    assert parse_filter('modality == "ct" or (spacing_mm[0] < 2 and tags["a"] == "")').columns == {
        "modality",
        "spacing_mm",
        "tags",
    }


@given(text=st.text(alphabet="abidmoxlty [](){}=<>!'\".,+-*012#\n\\:andornoti", max_size=60))
@settings(max_examples=300, deadline=None)
def test_any_text_is_a_filter_of_known_columns_or_a_config_error_that_names_the_key(text: str) -> None:
    columns, said = frozenset(), ""
    try:
        columns = parse_filter(text).columns
    except ConfigError as error:
        said = str(error)
    assert bool(columns) != said.startswith("stream.filter=")
    assert columns <= set(SCHEMA.names)


def test_weights_go_by_text_only() -> None:
    assert parse_attribute('tags["site"]', "stream.weights.by").columns == {"tags"}
    for wrong in ("spacing_mm[0]", '"ct"', "resampled"):
        with pytest.raises(ConfigError, match=r"stream\.weights\.by=.*: must be a column of text or a tag"):
            parse_attribute(wrong, "stream.weights.by")


@pytest.mark.parametrize("values", [{}, {"ct": 0}, {"ct": -1}, {"ct": float("nan")}, {"ct": float("inf")}])
def test_a_weight_that_is_not_above_zero_is_refused(values: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=r"every weight must be above 0; leave volumes out by stream\.filter"):
        build_config(StreamConfig, {"weights": {"by": "modality", "values": values}}, "recipe")


def test_a_weight_for_a_value_that_no_volume_has_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"weights\.values: no selected volume has 'pet'; there are 'ct', 'mr'"):
        weighted_shares(np.array(["ct", "mr"]), {"pet": 2.0}, "stream.weights.values")


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=4),
    weights=st.lists(st.floats(0.01, 100), min_size=4, max_size=4),
    seed=st.integers(0, 2**64 - 1),
    first_epoch=st.integers(0, 10**6),
)
@settings(max_examples=100, deadline=None)
def test_weighted_epochs_are_exact(sizes: list[int], weights: list[float], seed: int, first_epoch: int) -> None:
    kinds = np.random.default_rng(0).permutation(np.repeat(np.arange(len(sizes)), sizes))
    shares = WeightedShares(kinds, weights[: len(sizes)])
    relative = np.array(weights[: len(sizes)]) / max(weights[: len(sizes)])
    counts = np.zeros(len(kinds), dtype=int)
    for epoch in range(first_epoch, first_epoch + 7):
        drawn = shares.volumes(np.arange(shares.drawn_per_epoch), seed, epoch)
        assert len(np.unique(drawn)) == len(drawn), "a volume twice in an epoch"
        of_kind = np.bincount(kinds[drawn], minlength=len(sizes))
        assert np.all(np.abs(of_kind - np.array(sizes) * relative) <= 1), "the kinds in another proportion than asked"
        counts[drawn] += 1
    for kind in range(len(sizes)):
        of_kind = counts[kinds == kind]
        assert of_kind.max() - of_kind.min() <= 1, "volumes of a kind drawn unequally often"


def test_a_kind_goes_round_in_an_order_of_its_own_for_each_seed() -> None:
    shares = WeightedShares(np.repeat([0, 1], [40, 40]), [1.0, 4.0])
    first, again, other = (np.sort(shares.volumes(np.arange(50), seed, 0)) for seed in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
