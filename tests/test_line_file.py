"""Lines of metrics while their folder goes away and the disk is full."""

import resource
import shutil

import pytest

from megatron_gkd.line_file import LineFile


@pytest.fixture
def full_at():
    """Sets how long a file of this process may become, as a disk that is full there would."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    yield lambda size: resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_leaves_whole_lines_and_loses_none(tmp_path, capsys, full_at):
    file = LineFile(tmp_path / "metrics.jsonl")
    file.append("one\n")
    full_at(9)
    file.append("two, of which the half would fit\n")
    file.append("three\n")
    assert (tmp_path / "metrics.jsonl").read_text() == "one\n"
    said = capsys.readouterr().out
    assert said.count("Note:") == 1 and f"{tmp_path / 'metrics.jsonl'} cannot be written" in said
    full_at(2**20)
    file.append("four\n")
    file.close()
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert lines == ["one", "two, of which the half would fit", "three", "four"]


def test_what_found_no_place_is_counted_at_the_end(tmp_path, capsys, full_at):
    file = LineFile(tmp_path / "metrics.jsonl")
    full_at(0)
    file.append("one\ntwo\n")
    file.append("three\n")
    file.close()
    assert "its last 3 lines are not written" in capsys.readouterr().out


@pytest.mark.parametrize("replaced", [False, True])
def test_the_folder_is_removed_under_the_run(tmp_path, capsys, replaced):
    path = tmp_path / "out" / "metrics.jsonl"
    path.parent.mkdir()
    file = LineFile(path)
    file.append("one\n")
    for _ in range(2):
        shutil.rmtree(path.parent)
        if replaced:
            path.parent.mkdir()
            path.write_text("of another run\n")
        file.append("two\n")
    file.close()
    assert path.read_text() == ("of another run\n" if replaced else "") + "two\n"
    assert file.num_removals == 2
    assert capsys.readouterr().out.count("was removed or replaced under the run") == 1
