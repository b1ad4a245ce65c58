"""configurator.py: what a user may type, and what a mistake is answered with."""

import sys
from dataclasses import dataclass, field
from typing import Annotated, Literal
from unittest import mock

import pytest

import configurator
from configurator import UserError, configure


@dataclass
class Base:
    # shape
    n_layer: int = 12  # blocks
    ratio: float = 0.5  # share of something


@dataclass
class Settings(Base):
    # rest
    name: str = "pre"  # which one
    n_head: int | None = None  # heads; none: as many as layers
    title: str | None = None  # any text
    flag: bool = False  # on or off
    maybe: bool | None = None  # on, off or as it comes
    input: list[str] = field(default_factory=list)  # paths

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"n_layer is {self.n_layer}; it must be at least 1")


def read(*argv, **kwargs):
    return configure(Settings, "A program.", list(argv), **kwargs)


def test_command_line_forms():
    s = read("--n_layer=3", "--ratio", "1e-3", "--flag", "--n_head=none", "--maybe=false", "--name", "x=y")
    assert s == Settings(3, 1e-3, "x=y", None, None, True, False, [])
    assert read("--flag", "False").flag is False
    assert read("--flag", "--n_layer=2") == Settings(n_layer=2, flag=True)
    assert read("--ratio=2").ratio == 2.0 and isinstance(read("--ratio=2").ratio, float)
    assert read("--n_layer=3", "--n_layer=4").n_layer == 4
    assert read("--ratio", "-1").ratio == -1
    assert read("--input", "a", "b", "--flag", "--input=c").input == ["a", "b", "c"]
    assert read("--name=none").name == read("--title=none").title == "none"
    assert read("--n_layer=5e9").n_layer == read("--n_layer=5E9").n_layer == 5_000_000_000 == read("--n_layer=5_000_000_000").n_layer


def test_files_and_command_line_override_in_order(tmp_path):
    first, second = tmp_path / "a.py", tmp_path / "b.py"
    first.write_text(
        "import math\n_depth = 3\nn_layer = 2 * _depth\nratio = 1\nname = 'a'\ninput = ['x']\ndef helper(): pass\n"
    )
    second.write_text("name = 'b'\n")
    s = read(str(first), "--n_head=2", str(second))
    assert (s.n_layer, s.ratio, s.name, s.n_head, s.input) == (6, 1.0, "b", 2, ["x"])
    assert read(str(second), str(first)).name == "a"
    assert read("--name=c", str(first)).name == "a"  # in the order given


def test_what_is_given_can_be_looked_at_before_the_rest_is_filled_in():
    given = configurator.read_settings(Settings, "", ["--n_layer=3"])
    assert given == {"n_layer": 3}
    s = configurator.build_settings(Settings, {"n_layer": 5, "ratio": given["n_layer"] / 4, **given})
    assert (s.n_layer, s.ratio, s.name) == (3, 0.75, "pre")


def test_one_text_as_the_value_of_one_setting():
    assert [configurator.parse(Settings, "n_head", text) for text in ("1", "2e3", "none")] == [1, 2000, None]
    assert configurator.parse(Settings, "name", "1") == "1" and configurator.parse(Settings, "ratio", "1") == 1.0
    for name, text in (("n_layer", "1,2"), ("n_layer", "1e999"), ("flag", "2"), ("ratio", "none"), ("n_layr", "1")):
        with pytest.raises(UserError, match=f"--{name}"):
            configurator.parse(Settings, name, text)


def test_positional_arguments():
    assert read("out-a", "--flag", "out-b", positional="input").input == ["out-a", "out-b"]


def test_a_list_grows_on_the_command_line_and_replaces_that_of_a_file(tmp_path):
    path = tmp_path / "c.py"
    path.write_text("input = ['x']")
    assert read(str(path), "--input=a", "--input", "b", "c").input == ["a", "b", "c"]
    assert read("--input=a", str(path)).input == ["x"]


def test_limits(tmp_path):
    @dataclass
    class Limited:
        n: configurator.COUNT | None = None
        share: configurator.SHARE = 0.5
        kind: Literal["a", "b"] = "a"
        row: Annotated[str | None, {"c": 0, "d": 1}] = None

    s = configure(Limited, "", ["--n=3", "--share=1", "--kind=b", "--row=d"])
    assert s == Limited(3, 1.0, "b", "d")
    for text, message in {
        "--n=0": "n is 0; it must be at least 1 and at most 2147483647",
        "--share=1.5": "share is 1.5; it must be at least 0 and at most 1",
        "--kind=c": "unknown kind 'c'; known: a, b",
        "--row=a": "unknown row 'a'; known: c, d",
    }.items():
        with pytest.raises(UserError) as error:
            configure(Limited, "", [text])
        assert str(error.value) == message


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layr=3"], "unknown setting --n_layr; did you mean n_layer"),
        (["--zzzz=3"], "unknown setting --zzzz; --help lists them"),
        (["--n_layer=2.5"], "--n_layer expects int, got '2.5'"),
        (["--n_layer=true"], "--n_layer expects int, got 'true'"),
        (["--ratio=much"], "--ratio expects float, got 'much'"),
        (["--ratio=nan"], "--ratio expects float, got 'nan'"),
        (["--flag=perhaps"], "--flag expects bool, got 'perhaps'"),
        (["--n_head=two"], "--n_head expects int or none, got 'two'"),
        (["--n_layer"], "--n_layer expects int, got nothing"),
        (["--input"], "--input expects one or more str, got nothing"),
        (["stray"], "unexpected argument 'stray'"),
        (["--n_layer=0"], "n_layer is 0"),
        (["missing.py"], "config file missing.py: No such file"),
    ],
)
def test_mistakes_on_the_command_line(argv, message):
    with pytest.raises(UserError, match=message) as error:
        read(*argv)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "text, message",
    [
        ("n_layr = 3", "n_layr; did you mean n_layer"),
        ("n_layer = '3'", "n_layer expects int, got '3'"),
        ("n_layer = True", "n_layer expects int, got True"),
        ("flag = 1", "flag expects bool, got 1"),
        ("name = None", "name expects str, got None"),
        ("input = [1]", "input expects one or more str"),
        ("n_layer = ", "SyntaxError"),
        ("n_layer = 1 / 0", "ZeroDivisionError"),
        ("import sys; sys.exit(0)", "SystemExit"),
        ("ratio = 10**400", "ratio expects float"),
        ("def n_layer(): pass", "n_layer expects int"),
    ],
)
def test_mistakes_in_a_file(tmp_path, text, message):
    path = tmp_path / "c.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read(str(path))
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_a_file_replaces_a_list_and_later_arguments_replace_the_files(tmp_path):
    (tmp_path / "c.py").write_text("input = ['x']")
    assert read("--input=a", "--input=b").input == ["a", "b"]
    assert read("--input=a", str(tmp_path / "c.py")).input == ["x"]
    assert read("--input=a", str(tmp_path / "c.py"), "--input=b").input == ["b"]


def test_help_shows_every_setting(capsys):
    with pytest.raises(SystemExit) as stop:
        read("--help")
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert "--n_layer (int, 12)  blocks" in out
    assert "--n_head (int or none, None)  heads; none: as many as layers" in out
    assert "--title (str, None)  any text" in out  # on the command line a text can only be a text
    assert "--input (one or more str, [])  paths" in out
    assert out.index("shape") < out.index("--n_layer") < out.index("\nrest") < out.index("--name (")


@pytest.mark.parametrize(
    "error, message",
    [
        (MemoryError("no room\nat all"), "not enough memory: no room at all"),
        (RuntimeError("CUDA out of memory. Tried"), "not enough memory: CUDA out"),
    ],
)
def test_a_lack_of_memory_is_one_line(capsys, error, message):
    def main():
        raise error

    with pytest.raises(SystemExit) as stop:
        configurator.run(main)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith(f"error: {message}") and err.count("\n") == 1


def test_other_errors_are_not_hidden():
    def main():
        raise RuntimeError("a mistake of the program's")

    with pytest.raises(RuntimeError):
        configurator.run(main)


def test_defaults_of_another_type_and_zero_bytes(tmp_path):
    with pytest.raises(UserError, match="n_layer expects int, got 'x'"):
        configurator.build_settings(Settings, {"n_layer": "x"})
    (tmp_path / "c.py").write_text("name = 'a\\0b'")
    with pytest.raises(UserError, match="name expects str"):
        read(str(tmp_path / "c.py"))


def test_an_error_is_written_at_once(monkeypatch):
    """So that no other process writes into the line, where the streams are not buffered."""

    def main():
        raise UserError("two\nlines")

    writes = []
    monkeypatch.setattr(sys, "stderr", mock.Mock(write=writes.append))
    monkeypatch.setattr(sys, "stdout", mock.Mock())
    with pytest.raises(SystemExit) as stop:
        configurator.run(main)
    assert writes == ["error: two lines\n"] and stop.value.code == 2
