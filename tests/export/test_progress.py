"""What `casa export` says of its steps while it works."""

import io

import pytest

from casa_export.progress import Progress

pytestmark = pytest.mark.unit


def run(progress, name, error=None):
    with progress.step(name):
        if error is not None:
            raise error


def lines(stream):
    return [line.strip() for line in stream.getvalue().replace("\r", "\n").splitlines() if line.strip()]


def test_each_step_has_a_line_with_its_seconds():
    stream = io.StringIO()
    progress = Progress(2, stream)
    run(progress, "load")
    run(progress, "export decoder")
    assert list(progress.seconds) == ["load", "export decoder"]
    said = lines(stream)
    assert said.index("[1/2] load ...") < said.index("[1/2] load: 0.0 s") < said.index("[2/2] export decoder ...")
    assert "[2/2] export decoder: 0.0 s" in said


def test_a_step_that_fails_has_no_time():
    stream = io.StringIO()
    progress = Progress(2, stream)
    with pytest.raises(OSError, match="disk full"):
        run(progress, "load", OSError("disk full"))
    assert "[1/2] load: failed" in lines(stream) and progress.seconds == {}


def test_it_can_be_silent(capsys):
    progress = Progress(1, None)
    run(progress, "load")
    assert list(progress.seconds) == ["load"]
    assert capsys.readouterr() == ("", "")
