"""The two demo networks, their weights and their data."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from bitwright.demo.digits import DigitsSplit, load_digits_split, normalise
from bitwright.demo.networks import (
    DEMO_NETWORKS,
    MASKED,
    PICTURE_SHAPE,
    WEIGHTS,
    DigitsMobileNet,
    DigitsTransformer,
    load_demo,
    local_mask,
)
from bitwright.demo.train import MAX_SHIFT, RECIPES, Recipe, accuracy, shift, train
from bitwright.errors import MissingExtra, UnknownName

NAMES = ("cnn", "transformer")
LEAST_ACCURACY = 0.975
MOST_BYTES = 600_000


@pytest.fixture(scope="module")
def split() -> DigitsSplit:
    pytest.importorskip("sklearn", reason="scikit-learn is not installed (extra 'demo')")
    return load_digits_split()


def test_the_demo_has_these_two_networks_and_a_recipe_for_each() -> None:
    assert tuple(DEMO_NETWORKS) == NAMES
    assert set(RECIPES) == set(NAMES)


@pytest.mark.parametrize("name, kind", [("cnn", DigitsMobileNet), ("transformer", DigitsTransformer)])
def test_a_demo_network_comes_in_eval_mode_with_all_its_weights_from_the_file(
    name: str, kind: type[nn.Module]
) -> None:
    network = load_demo(name)
    assert type(network) is kind
    assert not any(module.training for module in network.modules())
    stored = load_file(WEIGHTS / f"{name}.safetensors")
    state = network.state_dict()
    assert stored.keys() == state.keys()
    assert all(torch.equal(stored[key], state[key]) for key in stored)


@pytest.mark.parametrize("name", NAMES)
def test_loading_twice_gives_independent_networks(name: str) -> None:
    first, second = load_demo(name), load_demo(name)
    with torch.no_grad():
        next(first.parameters()).zero_()
    assert next(second.parameters()).abs().max() > 0


def test_an_unknown_demo_network_is_refused_with_the_known_names() -> None:
    with pytest.raises(UnknownName, match="cnn, transformer") as caught:
        load_demo("transfomer")
    assert "Did you mean 'transformer'?" in str(caught.value)


def test_the_committed_weights_stay_within_the_size_budget_and_nothing_else_lies_beside_them() -> None:
    files = sorted(WEIGHTS.iterdir())
    assert [f.name for f in files] == [f"{name}.safetensors" for name in NAMES]
    assert sum(f.stat().st_size for f in files) < MOST_BYTES


@pytest.mark.parametrize("name", NAMES)
def test_a_demo_network_reads_the_held_out_digits(name: str, split: DigitsSplit) -> None:
    assert accuracy(load_demo(name), split.test_x, split.test_y) >= LEAST_ACCURACY


@pytest.mark.parametrize("name", NAMES)
def test_a_picture_gets_the_same_logits_alone_and_in_a_batch(name: str) -> None:
    network = load_demo(name)
    x = torch.randn(5, *PICTURE_SHAPE, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        together = network(x)
        alone = torch.cat([network(row[None]) for row in x])
    assert together.shape == (5, 10)
    torch.testing.assert_close(together, alone, rtol=1e-4, atol=1e-4)


def test_the_mobilenet_keeps_its_batchnorm_alive_and_filters_by_channel() -> None:
    modules = list(DigitsMobileNet().modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d)]
    depthwise = [m for m in convolutions if m.groups > 1]
    assert len(depthwise) == 10
    assert all(m.groups == m.in_channels == m.out_channels for m in depthwise)
    assert sum(isinstance(m, nn.BatchNorm2d) for m in modules) == len(convolutions)


def test_the_local_mask_admits_the_class_token_and_touching_patches_only() -> None:
    side = 4
    mask = local_mask(side)
    for i in range(side * side):
        for j in range(side * side):
            touch = abs(i // side - j // side) <= 1 and abs(i % side - j % side) <= 1
            assert mask[i + 1, j + 1] == (0 if touch else MASKED)
    assert not mask[0].any()
    assert not mask[:, 0].any()


def test_a_masked_patch_has_no_influence_on_attention() -> None:
    block = DigitsTransformer().blocks[0]
    mask = local_mask(4)
    x = torch.randn(1, 17, DigitsTransformer.WIDTH, generator=torch.Generator().manual_seed(1))
    changed = x.clone()
    changed[0, 16] *= -1  # the bottom right patch, far from the top left one (token 1)
    before, after = block(x, mask), block(changed, mask)
    assert torch.equal(before[0, 1], after[0, 1])
    assert not torch.allclose(before[0, 11], after[0, 11])  # its upper left neighbour


def test_the_split_is_disjoint_complete_and_the_same_every_time(split: DigitsSplit) -> None:
    assert split.train_x.shape == (1297, 1, 16, 16)
    assert split.test_x.shape == (500, 1, 16, 16)
    assert split.train_x.dtype == split.test_x.dtype == torch.float32
    assert split.train_y.dtype == split.test_y.dtype == torch.int64
    assert set(split.test_y.tolist()) == set(range(10))
    again, other = load_digits_split(), load_digits_split(seed=1)
    assert all(torch.equal(a, b) for a, b in zip(split, again, strict=True))
    assert not torch.equal(split.test_y, other.test_y)
    # Both are reorderings of one set.
    sums = [torch.cat((d.train_x, d.test_x)).double().sum() for d in (split, other)]
    torch.testing.assert_close(*sums)
    counts = [torch.cat((d.train_y, d.test_y)).bincount().tolist() for d in (split, other)]
    assert counts[0] == counts[1]


def test_the_pictures_are_normalised(split: DigitsSplit) -> None:
    assert split.train_x.mean().abs() < 0.01
    assert abs(split.train_x.std() - 1) < 0.01


def test_enlarging_keeps_blank_paper_blank_and_full_ink_full() -> None:
    blank, full = normalise(torch.zeros(1, 8, 8)), normalise(torch.full((1, 8, 8), 16.0))
    assert blank.shape == full.shape == (1, *PICTURE_SHAPE)
    assert blank.unique().numel() == full.unique().numel() == 1
    assert blank.max() < 0 < full.min()


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(MissingExtra, match=r"bitwright\[demo\]"):
        load_digits_split()


def test_shifting_moves_each_picture_by_a_few_pixels_and_fills_with_paper() -> None:
    x = torch.zeros(64, *PICTURE_SHAPE)
    x[:, 0, 8, 8] = 1.0  # one dot in the middle
    shifted = shift(x, torch.Generator().manual_seed(0))
    assert shifted.shape == x.shape
    places = shifted.nonzero()
    assert len(places) == len(x)  # the dot is still there, once per picture
    offsets = places[:, 2:] - 8
    assert offsets.abs().max() == MAX_SHIFT
    assert len(offsets.unique(dim=0)) > 15  # both axes move, independently


def test_training_with_one_seed_repeats_and_another_seed_differs(split: DigitsSplit) -> None:
    few = DigitsSplit(split.train_x[:128], split.train_y[:128], split.test_x, split.test_y)

    def trained(seed: int) -> torch.Tensor:
        recipe = Recipe(1, 0.1, seed, RECIPES["transformer"].make_optimiser)
        network = train("transformer", few, recipe=recipe)
        assert not network.training
        return torch.cat([p.detach().flatten() for p in network.parameters()])

    torch.testing.assert_close(trained(0), trained(0))
    assert not torch.allclose(trained(0), trained(1))


def test_training_lowers_the_loss_and_reports_every_epoch(split: DigitsSplit) -> None:
    seen: list[tuple[int, int, float]] = []
    recipe = Recipe(3, 0.1, 0, RECIPES["transformer"].make_optimiser)
    train("transformer", split, recipe=recipe, progress=lambda *event: seen.append(event))
    assert [event[:2] for event in seen] == [(1, 3), (2, 3), (3, 3)]
    assert seen[-1][2] < seen[0][2]


def test_weight_decay_spares_depthwise_filters_norms_and_biases() -> None:
    network = DigitsMobileNet()
    decayed, spared = RECIPES["cnn"].make_optimiser(network).param_groups
    assert decayed["weight_decay"] > 0 == spared["weight_decay"]
    names = {id(p): n for n, p in network.named_parameters()}
    assert {names[id(p)] for p in decayed["params"]} == {
        n for n, p in network.named_parameters() if p.ndim > 1 and "depthwise" not in n
    }
    assert len(decayed["params"]) + len(spared["params"]) == len(names)
