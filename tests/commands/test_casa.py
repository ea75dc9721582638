"""`casa COMMAND`: the functions that the commands' own names end in, help without torch, completion in real shells."""

import shutil
import subprocess
import sys
import tomllib
from importlib.metadata import entry_points
from pathlib import Path

import pytest

import casa_engine
from casa_commands import casa, scripts

ROOT = Path(__file__).parent.parent.parent
BIN = Path(sys.executable).parent
# The words behind `casa`, and the command's own name.
COMMANDS = {
    ("serve",): "casa-serve",
    ("caption",): "casa-caption",
    ("export",): "casa-export",
    ("checkpoint",): "casa-checkpoint",
    ("bench",): "casa-bench",
    ("eval",): "casa-eval",
    ("digits", "train"): "casa-train-digits",
    ("digits", "eval"): "casa-eval-digits",
    ("digits", "video"): "casa-digits-video",
}
MISTAKES = [
    ("serve", ["nowhere"], 1),
    ("serve", ["--port", "70000"], 1),
    ("serve", ["--no-such-option"], 2),
    ("serve", ["--ray", "nowhere.yaml"], 1),
    ("serve", ["--ray", "--no-such-option"], 2),
    ("caption", ["nowhere.mp4"], 1),
    ("caption", ["--no-such-option"], 2),
    ("export", ["nowhere", "out"], 1),
    ("export", ["run", "nowhere", "--prompt", "Read."], 1),
    ("export", ["run"], 2),
    ("checkpoint", ["check", "nowhere"], 1),
    ("checkpoint", ["check"], 2),
    ("bench", ["stream", "nowhere"], 1),
    ("bench", ["live", "nowhere"], 1),
    ("bench", ["stream", "nowhere", "--turns", "1"], 2),
    ("eval", ["mme", "--url", "http://127.0.0.1:9", "--data", "nowhere"], 1),
    ("eval", ["vqa", "--url", "http://127.0.0.1:9", "--data", "."], 2),
    ("eval", ["mme", "--data", "."], 2),
    ("digits train", ["--threads", "0"], 1),
    ("digits eval", ["--base-url", "http://127.0.0.1:9/v1"], 1),
    ("digits video", ["out.avi"], 2),
]


def ended(run, capsys):
    """Run a command; return its exit status, stdout and stderr, both in one line."""
    capsys.readouterr()
    try:
        status = run()
    except SystemExit as left:
        status = left.code or 0
    return status, *(" ".join(words.split()) for words in capsys.readouterr())


def command_of(path):
    """The command with these words behind `casa`."""
    (command,) = (command for command in scripts.COMMANDS if command.words == path)
    return command


@pytest.fixture
def wide(tmp_path, monkeypatch):
    """An empty folder, and a terminal in which no line of argparse's is broken."""
    monkeypatch.setenv("COLUMNS", "1000")
    monkeypatch.chdir(tmp_path)


def test_help_and_version_import_nothing_heavy():
    for words in (["--help"], ["--version"], ["digits", "--help"], ["srve"], []):
        code = (
            "import sys\nfrom casa_commands.casa import main\n"
            f"try:\n    main({words})\nexcept SystemExit:\n    pass\n"
            "print(sorted({name.partition('.')[0] for name in sys.modules} & {'torch', 'vllm', 'casa_engine'}))"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout.splitlines()[-1] == "[]"


def test_help_names_each_command_with_a_sentence(wide, capsys):
    status, words, _ = ended(lambda: casa.main(["--help"]), capsys)
    digits = ended(lambda: casa.main(["digits", "--help"]), capsys)[1]
    assert status == 0
    assert ended(lambda: casa.main([]), capsys) == (0, words, "")
    for path in (*COMMANDS, ("completion",)):
        summary = casa.SUMMARIES[path]
        assert f"{path[-1]} {summary}" in (words if len(path) == 1 else digits)
        assert summary.endswith(".")


def test_one_version_everywhere(capsys):
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert casa_engine.__version__ == version
    assert ended(lambda: casa.main(["--version"]), capsys) == (0, f"casa-engine {version}", "")
    with pytest.raises(AttributeError, match="__versions__"):
        _ = casa_engine.__versions__


def test_what_is_no_command_is_a_mistake(capsys):
    for words, said in (
        (["srve"], "invalid choice: 'srve'"),
        (["digits"], "arguments are required: COMMAND"),
        (["digits", "tran"], "invalid choice: 'tran'"),
        (["--port", "1", "serve"], "invalid choice: '1'"),
        (["--version=1"], "argument --version"),
        (["--", "serve"], "invalid choice: '--'"),
    ):
        status, _, error = ended(lambda words=words: casa.main(words), capsys)
        assert status == 2
        assert "error: " in error
        assert said in error


def test_the_script_is_installed_and_runs():
    done = subprocess.run([BIN / "casa", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout == f"casa-engine {casa_engine.__version__}\n"


def test_every_command_has_both_names():
    installed = [script for script in entry_points(group="console_scripts") if script.name.startswith("casa-")]
    own = {script.name: script.load() for script in installed}
    assert own == {command.script: command for command in scripts.COMMANDS}
    assert {command.words: command.script for command in scripts.COMMANDS} == COMMANDS
    assert casa.SUMMARIES.keys() == {*COMMANDS, ("completion",)}


@pytest.mark.parametrize(("path", "name"), COMMANDS.items())
def test_help_says_the_name_it_was_called_by(path, name, wide, capsys):
    function = command_of(path)
    program = " ".join(("casa", *path))
    status, words, _ = ended(lambda: casa.main([*path, "--help"]), capsys)
    # vLLM may have something to log before.
    _, usage, words = words.partition("usage: ")
    assert (status, usage, words.startswith(f"{program} ")) == (0, "usage: ", True)
    assert name not in words
    status, own, _ = ended(lambda: function(["--help"]), capsys)
    assert own.partition("usage: ")[2].replace(name, program) == words


@pytest.mark.parametrize(("command", "arguments", "status"), MISTAKES)
def test_mistakes_say_the_name_they_were_made_with(command, arguments, status, wide, capsys, monkeypatch):
    path = tuple(command.split())
    program, name = f"casa {command}", COMMANDS[path]
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    own = ended(command_of(path), capsys)
    both = ended(lambda: casa.main([*path, *arguments]), capsys)
    assert own[0] == both[0] == status
    assert f"{name}: " in own[2] or f"usage: {name} " in own[2]
    assert f"{program}: " in both[2] or f"usage: {program} " in both[2]
    # Usage says it several times; a sentence says it first, and may name commands later on.
    assert both[2] == own[2].replace(name, program, -1 if status == 2 else 1)


# Words of a command line, the last one unfinished, and what completes it: all of it, or some of many.
COMPLETIONS = [
    ("d", {"digits"}, True),
    ("--ver", {"--version"}, True),
    ("digits ", {"train", "eval", "video"}, True),
    ("digits video --sc", {"--scale"}, True),
    ("serve --live-max", {"--live-max-sessions"}, False),
    ("serve --tensor-parallel-s", {"--tensor-parallel-size"}, True),
    ("serve --ra", {"--ray"}, False),
    ("serve --ray --num", {"--num-cpus"}, True),
    ("caption v.mp4 --allowed", {"--allowed-media-domains"}, True),
    ("export ru", {"run"}, True),
    ("export run model --pro", {"--prompt"}, True),
    ("export out --tr", {"--trt"}, True),
    ("checkpoint ", {"check", "convert", "inspect", "package", "random", "verify"}, True),
    ("checkpoint random --ca-l", {"--ca-layers"}, True),
    ("completion f", {"fish"}, True),
    ("no-command --p", set(), True),
]


# In one process, which imports vLLM once.
WRITE_COMPLETIONS = """
import contextlib, pathlib, sys
from casa_commands import casa
for shell in ("bash", "zsh", "fish"):
    with pathlib.Path(shell).open("w") as file, contextlib.redirect_stdout(file):
        assert casa.main(["completion", shell]) == 0
"""


@pytest.fixture(scope="session")
def completion_scripts(tmp_path_factory):
    """Each shell's script in a file."""
    folder = tmp_path_factory.mktemp("completion")
    command = [sys.executable, "-c", WRITE_COMPLETIONS]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert "left out" not in done.stderr
    return folder


def completed(shell, script, line):
    """Return what a real shell completes a line with that has its last word unfinished."""
    words = ["casa", *line.split(" ")]
    if shell == "fish":
        program = f"source {script}; complete -C 'casa {line}'"
    else:
        quoted = " ".join(f"'{word}'" for word in words)
        program = f"source {script}; COMP_WORDS=({quoted}); COMP_CWORD={len(words) - 1}; "
        if shell == "bash":
            program += '_casa; printf "%s\\n" "${COMPREPLY[@]}"'
        else:
            program += f"words=({quoted}); CURRENT={len(words)}; compgen -F _casa"
    without_startup_files = {"bash": "--norc", "zsh": "-f", "fish": "--no-config"}
    done = subprocess.run(
        [shell, without_startup_files[shell], "-c", program],
        capture_output=True,
        text=True,
        check=True,
        cwd=script.parent,
    )
    found = {word.partition("\t")[0] for word in done.stdout.splitlines() if word}
    # zsh itself chooses among what it is offered, when a key is pressed.
    return {word for word in found if word.startswith(words[-1])} if shell == "zsh" else found


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_real_shells_complete(shell, completion_scripts):
    if shutil.which(shell) is None:
        pytest.skip(f"{shell} is not installed")
    for line, expected, is_all in COMPLETIONS:
        found = completed(shell, completion_scripts / shell, line)
        assert found == expected if is_all else found > expected, f"{line!r}: {found}"
