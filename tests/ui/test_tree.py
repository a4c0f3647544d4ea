from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from tests.ui.fake_run import gpt_parameters
from tui_trainer.ui.panels.gradients import NameTree

NAMES = [parameter.name for parameter in gpt_parameters(4)]
part = st.sampled_from(["a", "b", "0", "1", "weight", "bias"])


def test_a_model_reads_as_its_modules():
    tree = NameTree(NAMES)
    shown = [("  " * tree.depths[n]) + tree.labels[n] for n in tree.visible()]
    assert shown[:5] == [
        "token_embedding.weight",
        "position_embedding.weight",
        "blocks.0",
        "  attention",
        "    W_query.weight",
    ]
    assert shown[-1] == "head.weight"


@given(st.lists(st.lists(part, min_size=1, max_size=5).map(".".join), unique=True, max_size=40))
def test_every_parameter_is_shown_once_and_modules_add_up(names):
    tree = NameTree(names)
    visible = tree.visible().tolist()
    assert sorted(n for n in visible if not tree.is_module(n)) == list(range(len(names)))
    assert len(set(visible)) == len(visible)
    values = np.arange(1, len(names) + 1, dtype=np.float32)
    norms = tree.root_sum_squares(values)
    for node, members in tree.leaves.items():
        assert np.isclose(norms[node], np.sqrt((values[members].astype(float) ** 2).sum()))
        assert all(names[m].startswith(names[members[0]].split(".")[0]) for m in members)


def test_folding_hides_what_is_inside():
    tree = NameTree(NAMES)
    everything = len(tree.visible())
    node = next(n for n in tree.leaves if tree.labels[n] == "blocks.0")
    tree.toggle(node)
    assert len(tree.visible()) == everything - 8
    tree.toggle(node)
    assert len(tree.visible()) == everything
    tree.fold_from_depth(0)
    assert len(tree.visible()) == 7


def test_a_filter_needs_every_word():
    tree = NameTree(NAMES)
    assert [NAMES[i] for i in tree.matching("blocks.1 QUERY")] == [
        "blocks.1.attention.W_query.weight"
    ]
    assert len(tree.matching("")) == len(NAMES)
    assert len(tree.matching("nothing like it")) == 0


def test_how_much_a_depth_leaves_in_sight_is_known_before_folding():
    names = [f"blocks.{i}.{part}.{x}" for i in range(3) for part in ("a.q", "m") for x in "wb"]
    tree = NameTree([*names, "head.weight", "norm"])
    for depth in range(5):
        tree.fold_from_depth(depth)
        assert tree.visible_count(depth) == len(tree.visible())
