"""Folders are replaced in one step: killed at every single operation on files, the old or the whole new is there."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from gptqmodel_eora_ext.system import files
from gptqmodel_eora_ext.system.files import replaced_folder, require_space, unfinished_folder

REPOSITORY = Path(__file__).parents[2]

# One process a kill: the parent forks, and the child dies by SIGKILL at its n-th operation on files.
KILLED = """
import os, signal, sys
from pathlib import Path
from gptqmodel_eora_ext.system.files import replaced_folder, unfinished_folder

work, in_place = Path(sys.argv[1]), sys.argv[2] == "in place"
target = work / "target"
OLD = {"config.json": "old", "shard-1": "old", "shard-2": "old", "mine/notes.txt": "mine", "eora/weights": "old"}
NEW = {"config.json": "new", "shard-1": "new", "eora/weights": "new", "eora/more": "new"}
WHOLE = {**NEW, "mine/notes.txt": "mine"}

def write(folder, content):
    for name, text in content.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)

def read(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*")
            if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)}

def save():
    with replaced_folder(target, obsolete=lambda inside: inside.name.startswith("shard-")) as fresh:
        write(fresh, NEW)

outcomes = set()
for last in range(1, 1000):
    os.system(f"rm -rf {target} {work}/.*.tmp")
    write(target, OLD)
    if in_place:
        os.chdir(target)
    child = os.fork()
    if child == 0:
        count = 0
        def die(event, arguments):
            global count
            if event.startswith(("os.", "open", "shutil.", "ctypes.call_function")):
                count += 1
                if count == last:
                    os.kill(os.getpid(), signal.SIGKILL)
        sys.addaudithook(die)
        save()
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    found = read(target)
    if found not in (OLD, WHOLE):
        # Where folders cannot be swapped, a folder between the two is one that nobody opens.
        assert in_place and "config.json" not in found, (last, found)
        assert found["mine/notes.txt"] == "mine", (last, found)
        outcomes.add("closed")
    else:
        outcomes.add("old" if found == OLD else "new")
    if os.waitstatus_to_exitcode(status) == 0:
        assert found == WHOLE
        print("done", last, *sorted(outcomes))
        break
"""


@pytest.mark.skipif(os.name != "posix", reason="needs fork and SIGKILL")
@pytest.mark.parametrize(("way", "outcomes"), [("swapped", ["new", "old"]), ("in place", ["closed", "new", "old"])])
def test_killed_at_every_operation(tmp_path: Path, way: str, outcomes: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path), way], capture_output=True, text=True,
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    word, count, *found = done.stdout.split()
    assert word == "done" and int(count) > 20 and found == outcomes


def fill(folder: Path) -> None:
    (folder / "new").write_text("new")


def test_what_was_there_is_kept_without_a_copy(tmp_path: Path) -> None:
    target = tmp_path / "a"
    (target / "deep" / "empty").mkdir(parents=True)
    (target / "deep" / "large").write_text("large")
    (target / "link").symlink_to("deep")
    (target / "broken").symlink_to("nowhere")
    (target / "gone").write_text("x")
    (target / ".eora.0123abcd.tmp").mkdir()
    target.chmod(0o750)
    number = (target / "deep" / "large").stat().st_ino
    with replaced_folder(target, obsolete=lambda inside: inside == Path("gone")) as fresh:
        fill(fresh)
    found = sorted(str(path.relative_to(target)) for path in target.rglob("*") if "link/" not in str(path))
    assert found == ["broken", "deep", "deep/empty", "deep/large", "link", "new"]
    assert (target / "deep" / "large").stat().st_ino == number
    assert (target / "link").readlink() == Path("deep") and (target / "broken").is_symlink()
    assert target.stat().st_mode & 0o777 == 0o750
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]


def test_a_file_system_without_links_copies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*_: object) -> None:
        raise PermissionError

    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine").write_text("mine")
    monkeypatch.setattr(Path, "hardlink_to", refused)
    with replaced_folder(tmp_path / "a") as fresh:
        fill(fresh)
    assert (tmp_path / "a" / "mine").read_text() == "mine"


def test_new_kinds_take_the_place_of_old_ones(tmp_path: Path) -> None:
    """A file where a folder was, and the reverse."""
    target = tmp_path / "a"
    (target / "one").mkdir(parents=True)
    (target / "one" / "file").write_text("old")
    (target / "two").write_text("old")
    with replaced_folder(target) as fresh:
        (fresh / "one").write_text("new")
        (fresh / "two").mkdir()
        (fresh / "two" / "file").write_text("new")
    assert (target / "one").read_text() == (target / "two" / "file").read_text() == "new"


def test_a_link_to_the_folder_stays_one(tmp_path: Path) -> None:
    (tmp_path / "disk" / "a").mkdir(parents=True)
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    with replaced_folder(tmp_path / "a") as fresh:
        fill(fresh)
    assert (tmp_path / "a").is_symlink() and (tmp_path / "disk" / "a" / "new").read_text() == "new"


def test_the_working_directory_is_not_taken_away(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "old").write_text("old")
    with replaced_folder(Path()) as fresh:
        fill(fresh)
    assert Path("new").read_text() == "new" and Path("old").read_text() == "old"
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["new", "old"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with pytest.raises(RuntimeError), replaced_folder(tmp_path / "a") as fresh:
        fill(fresh)
        raise RuntimeError
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"] and not (tmp_path / "a" / "new").exists()


def test_an_unfinished_folder_is_gone_on_with(tmp_path: Path) -> None:
    target = tmp_path / "a"
    target.mkdir()
    begun = unfinished_folder(target)
    with pytest.raises(RuntimeError), replaced_folder(target, unfinished=begun) as fresh:
        fill(fresh)
        raise RuntimeError
    assert (begun / "new").is_file()
    with replaced_folder(target, unfinished=unfinished_folder(target)) as fresh:
        assert fresh == begun
    assert (target / "new").is_file() and not begun.exists()


def test_space_is_checked_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".a.0123abcd.tmp").mkdir()
    message = r"about 1000000000\.0 GB and `.*` has \d+\.\d GB free.*`\.a\.0123abcd\.tmp` beside it is of a save"
    with pytest.raises(OSError, match=message), replaced_folder(tmp_path / "a", needed=10**18):
        pytest.fail("the block must not begin")
    assert not (tmp_path / "a").exists()
    require_space(tmp_path / "not" / "yet" / "there", 1)


def test_where_the_system_cannot_swap_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "RENAME_EXCHANGE", 0xFF)  # flags that no kernel knows
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "old").write_text("old")
    with replaced_folder(tmp_path / "a") as fresh:
        fill(fresh)
    assert sorted(entry.name for entry in (tmp_path / "a").iterdir()) == ["new", "old"]
    assert [entry.name for entry in tmp_path.iterdir()] == ["a"]
