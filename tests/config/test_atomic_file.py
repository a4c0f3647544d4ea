from __future__ import annotations

import pytest

from tui_trainer.config.atomic_file import replacing


def test_the_old_file_stays_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "weights.npy"
    path.write_text("old")
    with replacing(path) as partial:
        assert partial.suffix == ".npy"
        partial.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("written", [True, False])
def test_a_failure_leaves_the_old_file_and_nothing_else(tmp_path, written):
    path = tmp_path / "weights.npy"
    path.write_text("old")

    def fill_the_disk():
        with replacing(path) as partial:
            if written:
                partial.write_text("ne")
            raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        fill_the_disk()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
